# SPDX-License-Identifier: Apache-2.0
"""Injects faults of a bucket's server into whole runs; writes one line per case.

A case is a place (a kind of request of a command) and a fault. Afterwards the same command runs
without the fault, and the workdir must be that of an undisturbed run: every array bit for bit,
every line of metrics. Exits with 1 if a guarantee was broken. Limits are seconds, not minutes.
"""

import argparse
import contextlib
import faulthandler
import functools
import io
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "tests"))

import compare
import fsspec
import gcs_faults
import gcs_server

from localglobal_jax.checkpoints import store
from localglobal_jax.cli.main import _without_stragglers, main
from localglobal_jax.data.tfds import answers, array_records
from localglobal_jax.data.tfds.prepare import prepare

ROOT = pathlib.Path(__file__).parents[3]
STEPS = {"steps": "4", "checkpoint.every": "2", "eval.every": "4", "log.every": "2"}
ARRAYS = r"/o/.*checkpoints/2/state/.*tensorstore="
OPENED = 2  # requests by which array_record opens a shard
PLACES = {  # name: (phase, method, path), the requests that fail
    "start, list": ("train", "GET", r"prefix=[^&]*/run/&"),
    "start, lock": ("train", "POST", r"name=.*/\.lock"),
    "start, config.json": ("train", "POST", r"name=.*/config\.json"),
    "save, metadata": ("train", "POST", r"name=.*checkpoints/2/metadata"),
    "save, arrays": ("train", "POST", r"uploadType=media&name=.*checkpoints/2/"),
    "save, files.json": ("train", "POST", r"name=.*checkpoints/2/files\.json"),
    "end, metrics": ("train", "POST", r"name=.*/model_card\.md"),
    "resume, small files": ("resume", "GET", r"/download/.*/run/[a-z]+\.json"),
    "resume, arrays": ("resume", "GET", ARRAYS),
    "evaluate, arrays": ("evaluate", "GET", ARRAYS),
    "data, list": ("train", "GET", r"prefix=[^&]*/digits/1\.0\.0/"),
    "data, description": ("train", "GET", r"/download/.*/digits/1\.0\.0/dataset_info\.json"),
    "data, shard opened": ("train", "GET", r"digits-train.*alt=media"),
    "data, records": ("train", "GET", r"digits-train.*alt=media"),
    "evaluate, records": ("evaluate", "GET", r"digits-test.*alt=media"),
}
WRONG = ("start, list", "start, lock", "start, config.json", "resume, small files")  # exit 2
READS = ("data, list", "data, description", "data, shard opened", "data, records")
READS += ("evaluate, records",)
STALL = 7.0
FAULTS = {  # name: (options of a `gcs_faults.Rule`, whether a retry succeeds)
    "503 twice": ({"fault": "status", "status": 503, "times": 2}, True),
    "429 with Retry-After, once": (
        {"fault": "status", "status": 429, "times": 1, "retry_after": 1},
        True,
    ),
    "reset, once": ({"fault": "reset", "times": 1}, True),
    "cut off, once": ({"fault": "cut", "times": 1}, True),
    "stall, once": ({"fault": "stall", "seconds": STALL, "times": 1}, True),
    "503 for good": ({"fault": "status", "status": 503}, False),
    "429 for good": ({"fault": "status", "status": 429}, False),
    "resets for good": ({"fault": "reset"}, False),
    "cut off for good": ({"fault": "cut"}, False),
    "stalls for good": ({"fault": "stall", "seconds": STALL}, False),
    "401": ({"fault": "status", "status": 401}, False),
    "403": ({"fault": "status", "status": 403}, False),
    "404": ({"fault": "status", "status": 404}, False),
}


def threads_left(patience=10.0):
    """Returns orbax's threads that still run after `patience` seconds: a process waits for them."""
    deadline = time.monotonic() + patience
    while True:
        found = [t.name for t in threading.enumerate() if "_target_setting" in t.name]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def reads_left(patience=30.0):
    """Waits for reads that were given up, lest they meet the faults of the next case."""
    deadline = time.monotonic() + patience
    while array_records.THREADS.running() and time.monotonic() < deadline:
        time.sleep(0.1)


def shorten_limits():
    """Sets limits of seconds, in this process, before tensorstore's first request."""
    os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "2"
    store.LIMITS.patience = 4.0
    store.STALL = 2
    answers.TELL = 1.0
    store.TENSORSTORE.update(max_retries=3, initial_delay="50ms", max_delay="200ms")


class Bucket:
    """A bucket with an undisturbed run, and runs that are disturbed."""

    def __init__(self, proxy, work, data_dir):
        self.proxy, self.work = proxy, pathlib.Path(work)
        self.root = f"gs://{gcs_server.new_bucket(proxy.url)}"
        self.data_dir = f"{self.root}/data"
        for path in pathlib.Path(data_dir, "digits", "1.0.0").iterdir():
            self.files().put_file(str(path), f"{self.data_dir}/digits/1.0.0/{path.name}")
        self.count = 0
        code, _, said = self.command("train", f"{self.root}/undisturbed/run")
        assert code == 0, said
        self.reference = self.fetch(f"{self.root}/undisturbed/run")

    @functools.cached_property
    def half(self):
        """A run whose second checkpoint failed, to be resumed."""
        self.proxy.add("status", r"checkpoints/4/", status=403)
        assert self.command("train", f"{self.root}/half/run")[0] == 1
        self.proxy.clear()
        return f"{self.root}/half/run"

    def files(self):
        """The file system of the bucket."""
        return fsspec.filesystem("gs", use_listings_cache=False)

    def fetch(self, workdir):
        """Returns a local copy of a workdir."""
        self.count += 1
        local = self.work / f"copy{self.count}"
        self.files().get(workdir, str(local), recursive=True)
        return local

    def differences(self, workdir):
        """Returns the differences of a workdir from the undisturbed one."""
        try:
            local = self.fetch(workdir)
            wanted = {"steps": 4, "wanted_steps": [2, 4], "seen": False}
            return compare.differences(self.reference, local, **wanted)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]

    def command(self, phase, workdir):
        """Runs a command; returns its exit code, its seconds and what it wrote to stderr."""
        if phase == "evaluate":
            arguments = ["evaluate", f"--workdir={workdir}"]
        else:
            options = STEPS | {"log.tensorboard": "false", "data.flip": "true", "optim.ema": "0.9"}
            options |= {"optim.warmup_steps": "1", "data.in_memory": "false"}
            options["parallel.compilation_cache"] = str(self.work / "compiled")
            arguments = ["train", f"--config={ROOT / 'configs/coatnet_digits.py'}:size=tiny"]
            arguments += [f"--workdir={workdir}", f"--config.data.dir={self.data_dir}"]
            arguments += [f"--config.{name}={value}" for name, value in options.items()]
        said, begin = io.StringIO(), time.monotonic()
        faulthandler.dump_traceback_later(300, exit=True)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments)
        faulthandler.cancel_dump_traceback_later()
        return int(code), time.monotonic() - begin, said.getvalue()

    def case(self, place, fault):
        """Runs one case; returns its line, whose ``problems`` are empty if all was as promised."""
        phase, method, path = PLACES[place]
        options, passes = FAULTS[fault]
        self.count += 1
        workdir = f"{self.root}/case{self.count}/run"
        if phase == "resume":
            self.files().cp(f"{self.half}/", f"{workdir}/", recursive=True)
        elif phase == "evaluate":
            self.files().cp(f"{self.root}/undisturbed/run/", f"{workdir}/", recursive=True)
        path = path.replace("checkpoints/2", "checkpoints/4") if phase == "evaluate" else path
        skip = OPENED if place == "data, records" else 0
        rule = self.proxy.add(path=path, method=method, skip=skip, **options)
        code, seconds, said = self.command(phase, workdir)
        hits, waiting = rule.hits, threads_left()
        self.proxy.clear()
        reads_left()
        last = said.strip().splitlines()[-1] if code else ""
        wrong = options.get("status") == 403 and place in WRONG
        wrong |= options.get("status") == 404 and place in WRONG[:-1]  # there, an object is gone
        wrong |= options.get("status") in (403, 404) and place in READS
        # the older step is used
        gone = options.get("status") == 404 and place == "evaluate, arrays"
        late = fault == "stalls for good" and code == 0  # the server has done it after all
        wanted = 0 if passes or gone or late else 2 if wrong else 1
        problems = [] if hits else ["no request matched"]
        problems += [f"exit {code}, expected {wanted}"] * (code != wanted)
        problems += [said[said.find("Traceback") :]] * ("Traceback" in said)
        problems += [f"the line names no path: {last}"] * (bool(code) and self.root not in last)
        problems += [f"the process cannot end: {waiting}"] * bool(waiting)
        again, _, _ = self.command("train" if phase != "evaluate" else phase, workdir)
        problems += [f"without the fault: exit {again}"] * (again != 0)
        problems += self.differences(workdir)
        line = re.sub(r"gs://bucket-\w+/case\d+", "gs://BUCKET", last)
        return {"place": place, "fault": fault, "hits": hits, "exit": code,
                "seconds": round(seconds, 1), "line": line.replace(self.root, "gs://BUCKET"),
                "problems": problems}  # fmt: skip


@contextlib.contextmanager
def prepared(work, proxy, data_dir=None):
    """Context manager that yields a `Bucket` with short limits."""
    saved = store.LIMITS.patience, store.STALL, dict(store.TENSORSTORE), answers.TELL
    hook = sys.unraisablehook  # replaced as `console` does
    sys.unraisablehook = functools.partial(_without_stragglers, hook)
    shorten_limits()
    store.prepare()  # before the first use of the file system
    try:
        if data_dir is None:
            data_dir = pathlib.Path(work) / "data"
            prepare("digits", str(data_dir))
        yield Bucket(proxy, work, data_dir)
    finally:
        sys.unraisablehook = hook
        store.LIMITS.patience, store.STALL = saved[:2]
        store.TENSORSTORE.update(saved[2])
        answers.TELL = saved[3]


def run():
    """Runs all cases, or those whose place or fault contains a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only places and faults with all of these words")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(line["place"], line["fault"]) for line in lines}
    cases = [case for case in itertools.product(PLACES, FAULTS) if case not in done]
    with (
        tempfile.TemporaryDirectory() as work,
        gcs_server.serve() as server,
        gcs_faults.serve(server) as proxy,
        prepared(work, proxy) as bucket,
        out.open("a", encoding="utf-8") as file,
    ):
        for place, fault in cases:
            if all(word in f"{place} {fault}" for word in args.words):
                lines.append(bucket.case(place, fault))
                print(json.dumps(lines[-1]), flush=True)
                print(json.dumps(lines[-1]), file=file, flush=True)
    print(table(lines))
    return int(any(line["problems"] for line in lines))


def table(lines):
    """Returns the Markdown table: how every fault ended, over the places."""
    rows = ["| fault | cases | hits | exit 0 | exit 1 | exit 2 | identical afterwards |"]
    rows.append("|---|---|---|---|---|---|---|")
    for fault in FAULTS:
        these = [line for line in lines if line["fault"] == fault]
        codes = [sum(line["exit"] == code for line in these) for code in (0, 1, 2)]
        good = sum(not line["problems"] for line in these)
        hits = sum(line["hits"] for line in these)
        rows.append(
            f"| {fault} | {len(these)} | {hits} | {codes[0]} | {codes[1]} | {codes[2]} | "
            f"{good} of {len(these)} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(run())
