# SPDX-License-Identifier: Apache-2.0
"""Changes the core in 300 random places, one at a time, and counts the changes that tests notice.

nice python experiments/stress/mutants/run.py --work /tmp/mutants           resumes
nice python experiments/stress/mutants/run.py --work /tmp/mutants --again   the survivors once more
python experiments/stress/mutants/run.py --table                            tables of results.jsonl

First it records which lines each test runs (`record.py`), once, in WORK. Then every mutant
(`mutations.py`) is written into a copy of the tree. Tests that ran its lines are started until one
fails: those of the module first, cheap ones first, one case of each and then all, up to --budget
CPU seconds. results.jsonl gets a line a mutant. A survivor is either explained there by hand
("equivalent" or "left"), or a test is written and it is tried --again.

Not mutmut 3, which leaves out every decorated function (``@nn.compact``, ``@jax.custom_vjp``), and
not cosmic-ray, which has one command for all mutants: the whole suite of the core, half an hour.
"""

import argparse
import contextlib
import csv
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys

import mutations

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
RESULTS = HERE / "results.jsonl"
SEED, COUNT = 0, 300
CORE = ("operators", "models", "training", "checkpoints", "inference/decoding")
MARKUP = ("training/reporting/html/", "training/reporting/plots.py")  # pages to look at
TESTS = ("operators", "models", "blocks", "training", "checkpoints", "inference/decoding_test.py")
TESTS += ("inference/load_test.py", "inference/translator_test.py", "convert", "examples_test.py")
LONG = 16  # CPU seconds: tests that took longer in the suite's list are not recorded
LIBRARIES = ("beartype", "flax.linen", "gcsfs", "jax", "optax", "orbax.checkpoint", "pytest")
KILLED = ("killed", "timeout")
KEY = ("kind", "file", "line", "column", "was", "becomes", "text")


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def copy_tree(work: pathlib.Path) -> pathlib.Path:
    """Returns a fresh clone of the checkout, with the files that are not committed."""
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    git("clone", "--quiet", "--shared", str(ROOT), str(tree))
    changed = git("ls-files", "-z", "--modified", "--others", "--exclude-standard").split("\0")
    for name in filter(None, changed):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    return tree


def record(tree: pathlib.Path, out: pathlib.Path) -> None:
    """Runs the tests of the core once and records their lines; continues an unfinished record."""
    with (ROOT / "experiments/benchmarks/suite.csv").open(encoding="utf-8") as file:
        listed = [row for row in csv.DictReader(file) if row["when"] == "after"]
    long = [row["test"] for row in listed if float(row["seconds"]) > LONG]
    options = [f"--deselect=tests/{test}" for test in long]
    path = os.pathsep.join((str(tree), str(HERE)))
    environment = {**os.environ, "PYTHONPATH": path, "MUTANTS_RECORD": str(out)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "record", *options]
    command += [f"tests/{folder}" for folder in TESTS]
    subprocess.run(command, check=False, cwd=tree, env=environment)


def read_lines(file: pathlib.Path) -> list[dict]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def every_mutant() -> list[dict]:
    """Returns the mutants of all files of CORE."""
    package, found = ROOT / "localglobal_jax", []
    for file in sorted(path for name in CORE for path in (package / name).rglob("*.py")):
        name, source = str(file.relative_to(package)), file.read_bytes()
        if not name.startswith(MARKUP):
            found += [described(name, source, m) for m in mutations.mutants(source)]
    return found


def described(name: str, source: bytes, mutant: mutations.Mutant) -> dict:
    """Returns a mutant as it is in results.jsonl, and its bytes."""
    first = source.rfind(b"\n", 0, mutant.start) + 1
    last = source.find(b"\n", mutant.end)
    before, changed = source[first : mutant.start], source[mutant.start : mutant.end].decode()
    line, column = source.count(b"\n", 0, mutant.start) + 1, len(before)
    text = (before + mutant.new.encode() + source[mutant.end : last]).decode()
    short = {"kind": mutant.kind, "file": name, "line": line, "column": column}
    return {**short, "was": changed, "becomes": mutant.new, "text": text.strip(), "mutant": mutant}


def key(result: dict) -> tuple:
    """Returns the identity of a mutant, which stays when other lines move."""
    return tuple(result[name] for name in KEY if name != "line")


def choose(mutant: dict, records: list[dict], budget: float) -> list[str]:
    """Returns the tests that ran the mutant's lines, in the order in which they are to run."""
    file, records = mutant["file"], [r for r in records if r["passed"]]
    for first, last in mutant["mutant"].ranges:
        ran = [r for r in records if any(first <= n <= last for n in r["lines"].get(file, ()))]
        if ran:
            break
    folder, own, keyed = f"tests/{file.split('/')[0]}/", f"/{pathlib.Path(file).stem}_test.py", []
    if not ran:  # a file of constants: the tests of its package
        ran = [r for r in records if r["test"].startswith(folder)]
    for r in ran:  # one case of each test, then all
        other = not (r["test"].startswith(folder) and own in r["test"])
        cost = r["cpu"] * r["cases"]
        keyed.append((False, other, r["cpu"], r["test"]))
        if r["cases"] > 1:
            keyed.append((True, other, cost, r["test"].split("[")[0]))
    costs = itertools.accumulate(cost for *_, cost, _ in sorted(keyed))
    chosen = [
        test
        for number, (cost, (*_, test)) in enumerate(zip(costs, sorted(keyed), strict=True))
        if cost < budget or number == 0
    ]
    files = list(dict.fromkeys(test.split("::")[0] for test in chosen))
    return sorted(chosen, key=lambda test: files.index(test.split("::")[0]))  # fixtures: made once


class FirstFailure:
    """Pytest plugin that notes the first test, or file, that fails."""

    test = None

    def pytest_runtest_logreport(self, report):
        self.note(report)

    def pytest_collectreport(self, report):
        self.note(report)

    def note(self, report):
        if report.failed and self.test is None:
            self.test = report.nodeid


def run_tests(tree, tests, limit, log, sender):
    """Runs tests in this process, a child of one that has imported the libraries, not the package.

    Sends the first that fails, the exit code of pytest and CPU seconds. The child's CPU time is
    limited: an endless loop ends by a signal on a slow machine too.
    """
    import pytest  # noqa: PLC0415, not in the parent

    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = tree
    sys.path.insert(0, tree)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    failure = FirstFailure()
    code = pytest.main(["-q", "-x", *tests], plugins=[failure])
    sender.send((failure.test, int(code), sum(os.times()[:4])))
    os._exit(0)  # threads of a mutant may never end


def attempt(tree: pathlib.Path, mutant: dict, tests: list[str], budget: float) -> dict:
    """Returns what the tests made of a mutant, which is in the tree only meanwhile."""
    file, change = tree / "localglobal_jax" / mutant["file"], mutant["mutant"]
    source, context = file.read_bytes(), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    receiver, sender = context.Pipe(duplex=False)
    limit = int(30 + 3 * budget)
    arguments = (str(tree), tests, limit, str(tree.parent / "last.log"), sender)
    child = context.Process(target=run_tests, args=arguments)
    try:
        file.write_bytes(source[: change.start] + change.new.encode() + source[change.end :])
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            compiled.unlink()  # of the same second and size, it would be taken for this one
        child.start()
        sender.close()
        child.join(10 * limit)
        try:
            answer = receiver.recv() if receiver.poll() else None
        except EOFError:  # the process ended within pytest
            answer = None
        if child.is_alive():  # it waits for something, or the machine is slow: nobody can tell
            found = {"result": "unfinished"}
        elif answer is None:
            overdue = child.exitcode == -signal.SIGXCPU
            found = {"result": "timeout" if overdue else "killed", "by": f"exit {child.exitcode}"}
        else:
            test, code, cpu = answer
            word = {0: "survived", 5: "unfinished"}.get(code, "killed")  # 5: no test was found
            found = {"result": word, "by": test, "cpu": round(cpu, 1)}
        return {**found, "tests": len(tests)}
    finally:
        with contextlib.suppress(ProcessLookupError):  # processes that the tests left behind
            os.killpg(child.pid, signal.SIGKILL)
        file.write_bytes(source)
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            compiled.unlink()


def trials(args) -> None:
    """Records, draws and tries; every result is written as soon as it is there."""
    args.work.mkdir(parents=True, exist_ok=True)
    tree, recorded = copy_tree(args.work), args.work / "record.jsonl"
    if not args.recorded:
        record(tree, recorded)
    version = git("log", "-1", "--format=%h", "--", "localglobal_jax").strip()
    mutants = {key(m): m for m in every_mutant()}
    if not RESULTS.exists():
        drawn = random.Random(SEED).sample(list(mutants.values()), COUNT)
        write([{**m, "result": "not tried"} for m in drawn])
    results = read_lines(RESULTS)
    for number, result in enumerate(results):
        place = f"{result['file']}:{result['line']}"
        if args.again:
            settled = result["result"] in (*KILLED, "not tried") or "equivalent" in result
            if settled or (args.only and place not in args.only):
                continue
        elif result["result"] != "not tried":
            continue
        if (mutant := mutants.get(key(result))) is None:
            found = {"result": "gone"}  # its line has been changed since it was drawn
        else:
            tests = args.tests or choose(mutant, read_lines(recorded), args.budget)
            found = attempt(tree, mutant, tests, args.budget)
        kept = {name: result[name] for name in (*KEY, "left") if name in result}
        results[number] = kept | found | {"commit": version}
        write(results)
        print(*results[number].values(), flush=True)


def write(results: list[dict]) -> None:
    lines = [{k: v for k, v in result.items() if k != "mutant"} for result in results]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    RESULTS.with_suffix(".new").write_text(text, encoding="utf-8")
    RESULTS.with_suffix(".new").replace(RESULTS)


def tables() -> str:
    """Returns the counts by package, and the survivors with what is known of them."""
    results = [r for r in read_lines(RESULTS) if r["result"] not in ("not tried", "gone")]
    columns = (*KILLED, "survived", "unfinished")
    heads = ("mutants", "killed", "by a time limit", "survived", "unfinished", "equivalent")
    lines = [f"| package | {' | '.join(heads)} | noticed |", "|---|" + "---:|" * 7]
    for package in (*CORE, ""):
        of = [r for r in results if r["file"].startswith(package)]
        equivalent = sum("equivalent" in r for r in of)
        counts = [sum(r["result"] == c and "equivalent" not in r for r in of) for c in columns]
        if not of:
            continue
        share = sum(counts[:2]) / max(len(of) - equivalent, 1)
        cells = " | ".join(map(str, (len(of), *counts, equivalent)))
        lines.append(f"| {package or 'all'} | {cells} | {100 * share:.0f} % |")
    lines += ["", "| survivor | becomes | |", "|---|---|---|"]
    for r in results:
        if r["result"] not in KILLED:
            why = f"equivalent: {r['equivalent']}" if "equivalent" in r else r.get("left", "")
            lines.append(f"| `{r['file']}:{r['line']}` | `{r['text']}` | {why} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=pathlib.Path, help="where the tree is copied and recorded")
    parser.add_argument("--again", action="store_true", help="try the survivors again")
    parser.add_argument("--only", nargs="+", metavar="FILE:LINE", help="with --again: these")
    parser.add_argument("--tests", nargs="+", help="these tests, not those that ran the lines")
    parser.add_argument("--recorded", action="store_true", help="do not look for unrecorded tests")
    parser.add_argument("--budget", type=float, default=60, help="CPU seconds of tests a mutant")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.work:
        trials(args)
    print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
