# SPDX-License-Identifier: Apache-2.0
"""Gives every line of `writings.py` between two good ones to `localglobal translate` on stdin. This
group has one process, because a model has to be compiled.

python experiments/stress/bad_input/run_translate.py        writes results/translate.csv
"""

import contextlib
import csv
import io
import pathlib
import sys
import tempfile
import time

import run
import writings

from localglobal_jax.cli import main as cli

MUSE = f"{pathlib.Path(__file__).parents[3] / 'configs' / 'muse_lohelp.py'}:size=tiny"
GOOD = b"The house number 7 is green."
RANDOM = 40


def train(root: pathlib.Path) -> None:
    """Trains one step; the quality of its translations does not matter."""
    (root / "train.tsv").write_text(
        "".join(f"The house number {i} is green.\tDas Haus Nummer {i}.\n" for i in range(300))
    )
    (root / "validation.tsv").write_text("The house.\tDas Haus.\n")
    options = {"steps": 1, "optim.warmup_steps": 0, "task.beam": 0, "data.vocab": 330}
    options |= {"checkpoint.best": None, "data.files": f"{root}/{{split}}.tsv,"}
    words = [f"--config.{key}={value}" for key, value in options.items()]
    code = cli.main(["train", f"--config={MUSE}", f"--workdir={root}/run", *words])
    assert code == 0, code


def translate(workdir: str, data: bytes) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    given, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            words = ["translate", f"--workdir={workdir}", "--beam=2", "--max_length=8"]
            code = cli.main([*words, "--max_source=64"])
    finally:
        sys.stdin = given
    for stream in (out, err):
        stream.flush()
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))


def attempt(workdir: str, line: bytes, usual: str) -> str:
    code, out, err = translate(workdir, b"\n".join([GOOD, line, GOOD]) + b"\n")
    assert "Traceback" not in err
    if writings.refused(line):
        assert code == 2 and "standard input is not UTF-8 text: line 2 holds" in err, err
        assert out == ""
        return "refused"
    lines = out.split("\n")
    assert len(lines) == 4 and lines[0] == lines[2] == usual, lines
    if code == 2:
        assert "line 2: " in err and "max_source" in err and lines[1] == "", err
        return "skipped"
    assert code == 0, err
    return "works"


def main() -> None:
    file = run.RESULTS / "translate.csv"
    with tempfile.TemporaryDirectory() as root, file.open("w", newline="") as out:
        train(pathlib.Path(root))
        code, usual, _ = translate(f"{root}/run", GOOD + b"\n")
        assert code == 0
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(run.COLUMNS)
        for name, line in {**writings.lines(), **dict(writings.fuzz(RANDOM))}.items():
            started = time.monotonic()
            try:
                kind, message = attempt(f"{root}/run", line, usual.split("\n", maxsplit=1)[0]), ""
            except Exception as error:  # the point of it all
                kind, message = "error", f"{type(error).__name__}: {error}"
                print(name, message[:400])
            took = f"{time.monotonic() - started:.2f}"
            rows.writerow((name, kind, kind != "error", took, "", message[:200]))
            out.flush()


if __name__ == "__main__":
    main()
