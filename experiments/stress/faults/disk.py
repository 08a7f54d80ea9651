# SPDX-License-Identifier: Apache-2.0
"""Trains on full disks, in read-only directories and with clocks that jump; needs root.

    sudo python experiments/stress/faults/disk.py --out disk.jsonl --work /tmp/disk

A workdir on a file system of its own (tmpfs) of too few kilobytes, from none to almost enough: the
disk fills while the run writes its config, vocabulary, metrics, TensorBoard's file, a checkpoint
or the model card. Each time: exit 1, one line that says so, no traceback, every checkpoint there is
whole. Then the file system grows and the same command must end with the bits of an undisturbed run.
"""

import argparse
import functools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import compare
import runs
from etils import epath

from localglobal_jax.checkpoints import reader
from localglobal_jax.checkpoints import steps as steps_of

SHORT = {"steps": "12", "checkpoint.every": "3", "eval.every": "6", "log.every": "1"}
CLOCK = """
import random, sys, time
draw, now = random.Random(0), time.time
offset = lambda: draw.choice([-1, 1]) * draw.random() * 3e8  # ten years back or ahead, at each call
time.time = lambda: now() + offset()
time.time_ns = lambda: int((now() + offset()) * 1e9)
from localglobal_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""


class Disk:
    """Where everything lies."""

    def __init__(self, work, kind):
        self.work, self.kind = work, kind
        self.reference = work / f"{kind}-reference"
        if not (self.reference / "model_card.md").exists():
            shutil.rmtree(self.reference, ignore_errors=True)
            done = self.train(self.reference)
            assert done.returncode == 0, done.stderr

    def train(self, workdir, start=("-m", "localglobal_jax"), **overrides):
        """One life of the run in `workdir`, to its end; at most three minutes."""
        cache = {"parallel.compilation_cache": str(self.work / "compiled")}
        arguments = runs.arguments(self.kind, workdir, **{**SHORT, **cache, **overrides})
        return subprocess.run(
            [sys.executable, *start, *arguments],
            env=runs.environment(fast_compile=True),
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )

    def differences(self, workdir):
        """Returns the differences from the undisturbed run at the end."""
        steps = [entry["step"] for entry in reader.inspect(self.reference)["steps"]]
        return compare.differences(
            self.reference, workdir, steps=int(SHORT["steps"]), wanted_steps=steps, seen=False
        )

    def full(self, kilobytes):
        """Returns the result of a run on a disk of so many kilobytes, which then grows."""
        mount = self.work / "mounted"
        mount.mkdir(exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", mount], check=True
        )
        try:
            workdir = mount / "run"
            died = self.train(workdir)
            said = died.stderr.strip().splitlines()[-1]
            there = [p.name for p in sorted(workdir.rglob("*"))] if workdir.exists() else []
            found = []
            if steps_of.scan(epath.Path(workdir / "checkpoints")):
                found = reader.inspect(workdir, verify=True)["steps"]
            steps = [entry["step"] for entry in found if entry["verified"]]
            bad = [entry for entry in found if not entry["verified"]]
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            again = self.train(workdir)
            differ = self.differences(workdir) if again.returncode == 0 else [again.stderr[-500:]]
        finally:
            subprocess.run(["umount", mount], check=True)
        enough = died.returncode == 0
        return {
            "what": "full disk",
            "kilobytes": kilobytes,
            "exit": died.returncode,
            "said": runs.without_paths(said)[:250],
            "steps": steps,
            "partial": [name for name in there if name.endswith(".partial")],
            "differences": differ,
            "ok": not bad
            and not differ
            and "Traceback" not in died.stderr
            and (enough or (died.returncode == 1 and "No space left on device" in said)),
        }

    def read_only(self):
        """Checks a read-only file system: an error at once, exit 2."""
        mount = self.work / "mounted"
        mount.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", mount], check=True)
        try:
            done = self.train(mount / "run")
        finally:
            subprocess.run(["umount", mount], check=True)
        said = done.stderr.strip().splitlines()
        right = done.returncode == 2 and len(said) == 1 and "no permission to write" in said[0]
        return {
            "what": "read-only",
            "exit": done.returncode,
            "said": runs.without_paths(said[-1]),
            "ok": right,
        }

    def clock(self):
        """Checks a clock that is ten years off at every reading; files have other dates, too."""
        workdir = self.work / "clock"
        shutil.rmtree(workdir, ignore_errors=True)
        half = self.train(workdir, ("-c", CLOCK))
        rng = random.Random(0)
        shutil.rmtree(workdir / "checkpoints" / SHORT["steps"])
        for path in workdir.rglob("*"):
            then = time.time() + rng.uniform(-1e9, 1e9)
            os.utime(path, (then, then))
        again = self.train(workdir, ("-c", CLOCK))
        differ = self.differences(workdir) if again.returncode == 0 else [again.stderr[-500:]]
        codes = (half.returncode, again.returncode)
        return {"what": "clock", "exit": codes, "differences": differ, "ok": not differ}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="jsonl of results")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where runs are made")
    parser.add_argument("--kinds", nargs="+", choices=runs.RUNS, default=list(runs.RUNS))
    sizes = [4, 8, 12, 20, 40, 80, 160, 320, 480, 640, 800, 960, 1120, 1280, 1440, 1600]
    parser.add_argument("--kilobytes", nargs="+", type=int, default=sizes)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bad = 0
    with args.out.open("w") as out:
        for kind in args.kinds:
            disk = Disk(args.work, kind)
            tries = [disk.read_only, disk.clock]
            tries += [functools.partial(disk.full, n) for n in args.kilobytes]
            for attempt in tries:
                result = {"kind": kind, **attempt()}
                bad += not result["ok"]
                out.write(json.dumps(result) + "\n")
                out.flush()
                print(json.dumps(result), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
