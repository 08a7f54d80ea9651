# SPDX-License-Identifier: Apache-2.0
"""Measures the time to the error message of wrong configs, in processes of their own.

python experiments/stress/bad_input/processes.py        writes results/processes.csv
"""

import csv
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
DIGITS = f"{HERE.parents[2] / 'configs' / 'coatnet_digits.py'}:size=tiny,data=mock"
MUSE = f"{HERE.parents[2] / 'configs' / 'muse_lohelp.py'}:size=tiny,data=mock"
WRONG = (
    (DIGITS, "optim.learning_rate=-1"), (DIGITS, "optim.learning_rate=nan"), (DIGITS, "steps=0"),
    (DIGITS, "batch_size=-8"), (DIGITS, "stepz=1"), (DIGITS, "data.image_size=(0, 8)"),
    (DIGITS, "seed=1e400"), (DIGITS, "optim.b1=" + "9" * 400), (DIGITS, "model.name=coatnot"),
    (DIGITS, "model.depths=(1,)"), (DIGITS, "model.classes=None"),
    (DIGITS, "batch_size=33333333333"), (DIGITS, "optim.accumulate=7"),
    (DIGITS, "model.widths=(16, 100000)"), (DIGITS, "checkpoint.best=test/acuracy"),
    (DIGITS + ",sise=tiny", "steps=1"), (DIGITS.replace("digits", "digit"), "steps=1"),
    (MUSE, "data.max_length=1"), (MUSE, "data.vocab=10000000000"), (MUSE, "task.beam=-1"),
    (MUSE, "model.heads=(3, 3)"), (MUSE, "batch_size=8"),
)  # fmt: skip


def main() -> None:
    file = HERE / "results" / "processes.csv"
    with file.open("w", newline="", encoding="utf-8") as out, tempfile.TemporaryDirectory() as root:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(("config", "override", "code", "wall_s", "cpu_s", "load", "first_line"))
        for config, override in WRONG:
            command = ["train", f"--config={config}", f"--workdir={root}/x"]
            command += [f"--config.{override}"]
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "localglobal_jax", *command],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                check=False,
            )
            wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            first = done.stderr.splitlines()[0][:120] if done.stderr else ""
            assert done.returncode == 2, (override, done.returncode, done.stderr[-2000:])
            assert first.startswith("localglobal train: "), first
            assert not pathlib.Path(root, "x").exists()
            name, first = (x.replace(f"{HERE.parents[2]}/", "") for x in (config, first))
            numbers = f"{wall:.2f}", f"{cpu:.2f}", f"{os.getloadavg()[0]:.1f}"
            rows.writerow((name, override[:40], done.returncode, *numbers, first))
            out.flush()


if __name__ == "__main__":
    main()
