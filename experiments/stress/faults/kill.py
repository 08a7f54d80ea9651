# SPDX-License-Identifier: Apache-2.0
"""Kills a real training repeatedly, and compares its end with an undisturbed run.

    python experiments/stress/faults/kill.py --out kills.jsonl --work /tmp/kills

A chain is one training: its data set is prepared, it starts, dies, is started again, and after
its share of kills is left to finish. Moments are drawn with a seed; the phase that each kill hit is
read from the last line on stderr and from orbax's temporary folders. After each kill every
checkpoint there is must be whole and none may be lost. One line a kill, one a chain; a chain that
was not finished when the harness itself was stopped is done anew.
"""

import argparse
import json
import pathlib
import re
import shutil
import signal
import sys
import time

import compare
import numpy as np
import runs
from etils import epath
from life import Life, await_moment

from localglobal_jax.checkpoints import reader
from localglobal_jax.checkpoints import steps as steps_of

SIGNALS = {"KILL": 0.65, "TERM": 0.2, "TERM then KILL": 0.15}
MOMENTS = {  # what to wait for: how often
    "start": 0.12,
    "compile": 0.12,
    "training": 0.26,
    "save": 0.28,
    "evaluation": 0.22,
}


class Harness:
    """Holds the folders, and starts runs of one kind."""

    def __init__(self, work, raw_files=None, overrides=None):
        self.work, self.raw_files = pathlib.Path(work), raw_files
        self.overrides = runs.KILLED | (overrides or {})

    def prepare(self, kind, data_dir):
        """The life that prepares the data set of `kind`."""
        name, _ = runs.DATA[kind]
        options = ["--source", str(self.raw_files)] if kind == "text" and self.raw_files else []
        command = runs.command(["prepare", name, *options])
        return Life(command, self.work, data_dir, runs.environment(True, data_dir))

    def train(self, kind, workdir, data_dir, compiling=False):
        """The life that trains, noting its batches in the workdir's batches.txt.

        With a cache of compiled programs, which is two thirds of a short life; without it where
        the compiling is what shall be killed.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        noted = {"OBSERVED_BATCHES": str(workdir / "batches.txt")}
        cache = {} if compiling else {"parallel.compilation_cache": str(self.work / "compiled")}
        arguments = runs.arguments(kind, workdir, **self.overrides, **cache)
        command = [sys.executable, str(runs.OBSERVED), *arguments]
        return Life(command, workdir, data_dir, runs.environment(True, data_dir) | noted)

    def reference(self, kind):
        """The undisturbed run, made once; and its data set, prepared unless it is there."""
        workdir, data_dir = self.work / f"{kind}-reference", self.work / f"{kind}-data"
        if not (workdir / "model_card.md").exists():
            shutil.rmtree(workdir, ignore_errors=True)
            if not list(data_dir.rglob("dataset_info.json")):
                prepared = self.prepare(kind, data_dir)
                assert prepared.finish() == 0, "\n".join(prepared.lines)
            trained = self.train(kind, workdir, data_dir)
            assert trained.finish() == 0, "\n".join(trained.lines)
        return workdir, data_dir

    def chain(self, kind, plan, rng, note, patience=1.0):
        """One training under the `plan`, a list of (moment, signal); returns the last line.

        A preparation that was over before its kill is made and killed again, sooner. Without a kill
        of the preparation, the data set is a copy of the reference's.
        """
        reference, reference_data = self.reference(kind)
        workdir, data_dir = self.work / f"{kind}-killed", self.work / f"{kind}-killed-data"
        for folder in (workdir, data_dir):
            shutil.rmtree(folder, ignore_errors=True)
        if "preparation" in dict(plan):
            data_dir.mkdir()
        else:
            shutil.copytree(reference_data, data_dir)
        stopped, problems, kills, newest, lives = set(), [], 0, 0, 0
        plan = list(plan)
        while True:
            moment, how = plan[0] if plan else ("", "")
            whole = list(data_dir.rglob("dataset_info.json"))
            if moment != "preparation" and not any("incomplete" not in str(p) for p in whole):
                assert self.prepare(kind, data_dir).finish() == 0
            life = (
                self.prepare(kind, data_dir)
                if moment == "preparation"
                else self.train(kind, workdir, data_dir, compiling=moment == "compile")
            )
            lives += 1
            came = bool(plan) and await_moment(life, moment, rng, patience)
            code = life.end(how, rng) if came else life.finish()
            if moment == "preparation" and not code:
                shutil.rmtree(data_dir)
                data_dir.mkdir()
                patience /= 2
                continue
            plan = plan[1:]
            last = life.lines[-1] if life.lines else ""
            died = code in (-signal.SIGKILL, -signal.SIGTERM) or (came and code == 42)
            if not died and code:
                problems.append(f"exit code {code}: {life.lines[-3:]}")
            if died:
                kills += 1
                stopped |= {int(n) for n in re.findall(r"stopped at step (\d+)", last)}
                before, (newest, bad) = newest, self.checkpoints(workdir)
                problems += bad
                if newest < before:
                    problems.append(f"the newest checkpoint was {before}, now it is {newest}")
                note(moment=moment, signal=how, exit=code, hit=life.phase(), newest=newest,
                     seconds=round(time.monotonic() - life.began, 2),
                     last=runs.without_paths(last)[:100])  # fmt: skip
            if (problems or not died) and moment != "preparation":
                break
        if not problems:
            problems = self.compare(kind, reference, workdir, stopped)
            problems += compare.data_differs(kind, reference_data, data_dir)
        return {"kills": kills, "lives": lives, "identical": not problems, "problems": problems}

    def checkpoints(self, workdir):
        """(the newest step, sentences on what is damaged)."""
        if not steps_of.scan(epath.Path(workdir / "checkpoints")):
            return 0, []
        found = reader.inspect(workdir, verify=True)
        bad = [f"step {s['step']}: {s['error']}" for s in found["steps"] if not s["verified"]]
        return found["latest"] or 0, bad

    def compare(self, kind, reference, workdir, stopped):
        """Returns the differences; see `compare.differences`."""
        steps, every = int(self.overrides["steps"]), int(self.overrides["checkpoint.every"])
        run = json.loads((workdir / "config.json").read_text())["checkpoint"]
        best = run["best"].removeprefix("-")
        split, _, name = best.rpartition("/")
        scores = {
            line["step"]: line[name] for line in compare.metrics(workdir) if line["split"] == split
        }
        wanted = compare.kept(
            {"keep": run["keep"], "sign": -1 if run["best"].startswith("-") else 1},
            {*range(every, steps, every), steps},
            stopped,
            scores,
        )
        return compare.differences(reference, workdir, steps=steps, wanted_steps=wanted)


def draw_plan(rng, kills, preparing):
    """`kills` moments with their signals; the first `preparing` of them in data preparation."""
    moments = rng.choice(list(MOMENTS), kills - preparing, p=list(MOMENTS.values()))
    signals = rng.choice(list(SIGNALS), kills, p=list(SIGNALS.values()))
    return list(zip(["preparation"] * preparing + moments.tolist(), signals.tolist(), strict=True))


def unfinished_dropped(out):
    """Returns the numbers of the finished chains; removes the lines of the others."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    chains = [(line["seed"], line["kind"], line["chain"]) for line in lines]
    done = {key for key, line in zip(chains, lines, strict=True) if "identical" in line}
    whole = [line for key, line in zip(chains, lines, strict=True) if key in done]
    out.write_text("".join(json.dumps(line) + "\n" for line in whole))
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="jsonl of results")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where runs are made")
    parser.add_argument("--raw_files", type=pathlib.Path, help="LibreOffice Help, unpacked")
    parser.add_argument("--chains", type=int, default=6, help="of each kind")
    parser.add_argument("--kills", type=int, default=12, help="of each chain")
    parser.add_argument("--kinds", nargs="+", choices=runs.RUNS, default=list(runs.RUNS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    done, harness = unfinished_dropped(args.out), Harness(args.work, args.raw_files)
    failed = 0
    for chain in range(args.chains):
        for kind in args.kinds:
            if (args.seed, kind, chain) in done:
                continue

            def note(kind=kind, chain=chain, **line):
                with args.out.open("a") as file:
                    file.write(
                        json.dumps({"seed": args.seed, "kind": kind, "chain": chain, **line}) + "\n"
                    )

            rng = np.random.default_rng([args.seed, chain, list(runs.RUNS).index(kind)])
            result = harness.chain(kind, draw_plan(rng, args.kills, preparing=2), rng, note)
            note(**result)
            failed += not result["identical"]
            print(kind, chain, json.dumps(result), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
