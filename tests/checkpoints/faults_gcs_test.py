# SPDX-License-Identifier: Apache-2.0
"""Faults of a real server's answers, by each client; the lock of a workdir in a bucket."""

import json
import mmap
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import fsspec
import numpy as np
import pytest
import small
import tensorstore
from etils import epath

from localglobal_jax.checkpoints import bucket_lock, gcs, gcs_file_system, manager, reader, store
from localglobal_jax.cli.main import main
from localglobal_jax.config import schema
from localglobal_jax.parallel import multihost

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments" / "stress" / "faults"))

import store_faults

# Reads and writes of orbax that are pending when one of them fails find its event loop closed; the
# console hides these (`cli.main._without_stragglers`).
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PASSING = {name: options for name, (options, passes) in store_faults.FAULTS.items() if passes}
del PASSING["stall, once"]  # waits for the real limit, see below
STATUSES = [429, 503, 401, 403, 404]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Retries of a second, instead of minutes."""
    monkeypatch.setattr(store.LIMITS, "patience", 3.0)
    monkeypatch.setattr(bucket_lock, "FRESH", 0.0)
    for name, value in {"max_retries": 3, "initial_delay": "50ms", "max_delay": "100ms"}.items():
        monkeypatch.setitem(store.TENSORSTORE, name, value)


def files():
    store.prepare()
    return fsspec.filesystem("gs", use_listings_cache=False)


def checkpoints(bucket):
    return manager.Checkpoints(f"{bucket}/checkpoints", schema.Checkpoints(keep=3))


def state(value):
    return {"a": np.full((300, 7), value, np.float32), "b": {"c": np.arange(5, dtype=np.int32)}}


def same(restored, value):
    assert np.array_equal(restored.state["a"], state(value)["a"])
    assert np.array_equal(restored.state["b"]["c"], np.arange(5))


# ---------------------------------------------------------------------------- small files: gcsfs


@pytest.mark.parametrize("name", PASSING)
def test_small_files_pass_a_fault(faults, bucket, name):
    rules = [
        faults.add(path="one.txt", method=method, **PASSING[name]) for method in ("GET", "POST")
    ]
    files().pipe_file(f"{bucket}/one.txt", b"1" * 100_000)
    assert files().cat_file(f"{bucket}/one.txt") == b"1" * 100_000
    assert all(rule.hits for rule in rules)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(store.LIMITS, "patience", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", STATUSES)
def test_small_files_name_the_object(faults, bucket, status):
    faults.add("status", "one.txt", status=status)
    with pytest.raises(store.StoreFailed, match=f"{bucket}/one.txt: {status}") as error:
        files().pipe_file(f"{bucket}/one.txt", b"1")
    assert error.value.is_final == (status in (403, 404))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", [503, 401, 403])
def test_a_store_that_fails_does_not_lack_a_directory(faults, bucket, status):
    """gcsfs takes 403, a reset and a time-out for "there is no such directory"."""
    files().pipe_file(f"{bucket}/sub/one.txt", b"1")
    path = epath.Path(f"{bucket}/sub")
    assert path.is_dir() and not epath.Path(f"{bucket}/other").is_dir()
    faults.add("status", status=status)
    for question in (path.is_dir, path.exists, files().isfile):
        with pytest.raises(store.StoreFailed, match=f"{bucket}/sub"):
            question(*([str(path)] if question == files().isfile else []))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["reset", "cut"])
def test_connections_that_are_lost_for_good(faults, bucket, fault):
    files().pipe_file(f"{bucket}/one.txt", b"1" * 1000)
    faults.add(fault, "one.txt")
    with pytest.raises(store.StoreFailed, match=f"{bucket}/one.txt") as error:
        files().cat_file(f"{bucket}/one.txt")
    assert error.value.status == 0  # there was no answer


def test_an_answer_that_stalls_is_asked_again(faults, bucket, monkeypatch):
    monkeypatch.setattr(store, "STALL", 1)
    quick = gcs_file_system.FileSystem(skip_instance_cache=True)
    quick.pipe_file(f"{bucket}/one.txt", b"1")
    rule = faults.add("stall", "alt=media", seconds=100.0, times=1)
    begin = time.monotonic()
    assert quick.cat_file(f"{bucket}/one.txt") == b"1"
    assert rule.hits == 1 and time.monotonic() - begin < 90
    monkeypatch.setattr(store.LIMITS, "patience", 1.0)
    faults.add("stall", "alt=media", seconds=100.0)
    with pytest.raises(store.StoreFailed, match=f"{bucket}/one.txt"):
        quick.cat_file(f"{bucket}/one.txt")


def test_a_request_without_an_answer_is_told_once(faults, gcs, bucket, monkeypatch, caplog):
    for name, value in {"STALL": 10, "TELL_AFTER": 0.5}.items():
        monkeypatch.setattr(store, name, value)
    monkeypatch.setattr(store.LIMITS, "told", 0.0)
    quick = gcs_file_system.FileSystem(skip_instance_cache=True)
    names = [f"{bucket}/{name}.txt" for name in "abcd"]
    quick.pipe({name: b"1" for name in names})
    assert not caplog.messages
    rule = faults.add("stall", "alt=media", seconds=1.0)
    assert set(quick.cat(names).values()) == {b"1"}  # in parallel
    assert rule.hits == 4
    (said,) = caplog.messages
    assert any(name in said for name in names) and f"{gcs} (STORAGE_EMULATOR_HOST)" in said


@pytest.mark.slow
def test_a_minute_without_an_answer_passes(faults, bucket, monkeypatch):
    """With the limits of a real run, in both clients."""
    monkeypatch.setattr(store.LIMITS, "patience", 240.0)
    files().pipe_file(f"{bucket}/one.txt", b"1")
    rule = faults.add("stall", "alt=media", seconds=180.0, times=1)
    assert files().cat_file(f"{bucket}/one.txt") == b"1"
    assert rule.hits == 1
    faults.clear()
    rule = faults.add("stall", "alt=media", seconds=180.0, times=1)
    name, _, path = bucket.removeprefix("gs://").partition("/")
    spec = {"driver": "gcs", "bucket": name, "path": f"{path}/"}
    begin = time.monotonic()
    assert tensorstore.KvStore.open(spec).result().read("one.txt").result().value == b"1"
    assert rule.hits == 1 and time.monotonic() - begin < 120


# ---------------------------------------------------------------------------- checkpoints: orbax


@pytest.mark.parametrize("name", PASSING)
def test_a_checkpoint_passes_a_fault(faults, bucket, name):
    """Every write, and every read of the arrays, once."""
    writes = faults.add(path="checkpoints/1/", method="POST", **PASSING[name])
    saved = checkpoints(bucket)
    saved.save(1, state(1), metadata={})
    saved.close()
    reads = faults.add(path="checkpoints/1/state/.*tensorstore", method="GET", **PASSING[name])
    same(checkpoints(bucket).restore(state(0)), 1)
    assert writes.hits and reads.hits


def test_arrays_that_take_long_are_told(faults, bucket, monkeypatch, caplog):
    """tensorstore retries without a word."""
    monkeypatch.setattr(store, "TELL_EVERY", 0.2)
    faults.add("stall", "checkpoints/1/state/.*", method="POST", times=1, seconds=1.0)
    saved = checkpoints(bucket)
    saved.save(1, state(1), metadata={})
    saved.close()
    assert f"writing to {bucket}/checkpoints: 0 s so far, at http://127.0.0.1:" in caplog.text
    faults.add("stall", "checkpoints/1/state/.*tensorstore", times=1, seconds=1.0)
    same(checkpoints(bucket).restore(state(0)), 1)
    assert f"reading {bucket}/checkpoints/1: 0 s so far, at http://127.0.0.1:" in caplog.text


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("UNAVAILABLE: Error reading gs://b/x: reset [curl_code='56']", 0),  # there was no answer
        ("DEADLINE_EXCEEDED: Error reading gs://b/x", 0),
        ("UNAVAILABLE: Error reading gs://b/x: busy [http_response_code='503']", 503),
        ("FAILED_PRECONDITION: gs://b/x: other [http_response_code='412']", None),
        ("DATA_LOSS: Error reading gs://b/x: bad checksum", None),  # the store is not at fault
    ],
)
def test_an_error_of_tensorstore_has_the_status_of_the_answer(text, status):
    found = store.of_tensorstore(ValueError(text), "gs://b/x")
    assert (found.status if found else None) == status


@pytest.mark.parametrize(("path", "threads"), [("gs://bucket/one", 1), ("/one", 0)])
def test_no_process_waits_for_the_thread_that_tells(path, threads):
    with store.told(path, "reading"):
        found = [thread for thread in threading.enumerate() if thread.name == "long transfers"]
        assert len(found) == threads and all(thread.daemon for thread in found)
    for thread in found:
        thread.join(60)
        assert not thread.is_alive()


def test_orbax_writes_nothing_after_the_list_of_files(faults, bucket):
    """Its thread writes the names of the handlers: were it slow, the step would be damaged."""
    rule = faults.add("stall", "1/_CHECKPOINT_METADATA", method="POST", seconds=1.0)
    saved = checkpoints(bucket)
    saved.save(1, state(1), metadata={})
    saved.close()
    assert rule.hits
    same(checkpoints(bucket).restore(state(0)), 1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", [503, 401, 403])
@pytest.mark.parametrize("what", ["state/ocdbt", "metadata", "files.json"])
def test_a_save_that_fails_leaves_the_earlier_steps(faults, bucket, status, what):
    saved = checkpoints(bucket)
    saved.save(1, state(1), metadata={})
    saved.wait()
    rule = faults.add("status", f"checkpoints/2/.*{what}", method="POST", status=status)
    with pytest.raises(manager.SaveFailed, match=rf"{bucket}/checkpoints.* {status}.*\[1\]"):
        saved.save(2, state(2), metadata={})
        saved.wait()
    assert rule.hits
    faults.clear()
    assert checkpoints(bucket).steps() == [1]
    same(checkpoints(bucket).restore(state(0)), 1)
    again = checkpoints(bucket)
    assert again.save(2, state(2), metadata={})
    again.close()
    same(again.restore(state(0)), 2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["status", "reset"])
@pytest.mark.parametrize("what", ["state/ocdbt", "files.json"])
def test_a_first_save_that_fails_has_one_remedy_and_no_earlier_steps(faults, bucket, fault, what):
    faults.add(fault, f"checkpoints/1/.*{what}", method="POST")
    saved = checkpoints(bucket)
    with pytest.raises(manager.SaveFailed, match=f"{bucket}/checkpoints/1/") as error:
        saved.save(1, state(1), metadata={})
        saved.wait()
    assert "steps" not in str(error.value)
    assert str(error.value).count("same command") == 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [{"fault": "status", "status": 503}, {"fault": "reset"}])
@pytest.mark.parametrize("what", ["state/.*tensorstore", "files.json", "prefix=.*checkpoints"])
def test_a_store_that_fails_damages_no_step(faults, bucket, fault, what):
    """Else the run would go back to an older step, and move the newest one aside."""
    saved = checkpoints(bucket)
    for step in (1, 2):
        saved.save(step, state(step), metadata={}, metrics={"x": step})
    saved.close()
    rule = faults.add(path=what, method="GET", **fault)
    later = checkpoints(bucket)
    with pytest.raises(store.StoreFailed, match=f"{bucket}/checkpoints"):
        later.restore(state(0))
    with pytest.raises(store.StoreFailed, match=f"{bucket}/checkpoints"):
        reader.inspect(bucket, verify=True)
    assert rule.hits
    faults.clear()
    same(later.restore(state(0)), 2)
    later.save(3, state(3), metadata={})
    later.close()
    assert later.steps() == [1, 2, 3]


# ---------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(gcs_proxy, tmp_path_factory, data_dir):
    """A bucket with an undisturbed run, and the cases of `store_faults`, with a smaller model."""
    gcs_proxy.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_faults, "STEPS", store_faults.STEPS | small.IMAGES)
        with store_faults.prepared(tmp_path_factory.mktemp("whole"), gcs_proxy, data_dir) as bucket:
            yield bucket


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("start, list", "404"),
        ("start, lock", "403"),
        ("save, arrays", "503 for good"),
        ("resume, arrays", "resets for good"),
        ("evaluate, arrays", "cut off, once"),
    ],
)
def test_a_run_ends_in_a_line_and_goes_on(whole, faults, place, fault):
    assert whole.case(place, fault)["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", store_faults.PLACES)
@pytest.mark.parametrize("fault", [f for f in store_faults.FAULTS if not f.startswith("stall")])
def test_every_fault_in_every_place(whole, faults, place, fault):
    assert whole.case(place, fault)["problems"] == []


def test_a_real_process_prints_one_line(faults, bucket, data_dir):
    faults.add("status", "checkpoints/2/", method="POST", status=403)
    options = {**store_faults.STEPS, "optim.warmup_steps": "1", "data.dir": data_dir}
    options |= small.IMAGES
    command = [sys.executable, "-m", "localglobal_jax", "train", f"--workdir={bucket}"]
    command += [f"--config={ROOT / 'configs' / 'coatnet_digits.py'}:size=tiny"]
    command += [f"--config.{name}={value}" for name, value in options.items()]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"{bucket}/checkpoints" in ended.stderr.splitlines()[-1]
    assert not epath.Path(f"{bucket}/.lock").exists()


# ---------------------------------------------------------------------------- bad input


TRAIN = ["train", f"--config={ROOT / 'configs' / 'coatnet_digits.py'}:size=tiny"]


@pytest.mark.usefixtures("gcs")
@pytest.mark.parametrize("path", ["gs:/bucket/x", "gs://bucket", "s3://bucket/x", "gs://no-such/x"])
def test_a_wrong_place_is_exit_2(tmp_path, monkeypatch, capsys, data_dir, path):
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, f"--workdir={path}", f"--config.data.dir={data_dir}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert path in said[-1] and "Traceback" not in "".join(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", [names[0] for names in store.SERVERS.values()])
@pytest.mark.parametrize("server", ["http://127.0.0.1:99999", "[::1", "ftp://host", "http://:1"])
def test_an_impossible_server_is_exit_2(monkeypatch, capsys, variable, server):
    monkeypatch.setenv(variable, server)
    for command in (["inspect", "gs://bucket/x"], [*TRAIN, "--workdir=gs://bucket/x"]):
        assert main(command) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert f"{variable}={server!r}" in said


def test_a_reason_with_a_url_is_whole(monkeypatch):
    """Of both clients, where nothing listens at the port."""
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", nowhere)
    options = {"skip_instance_cache": True, "endpoint_url": nowhere, "token": "anon"}
    with pytest.raises(store.StoreFailed, match=r"gs://bucket/x: .* 127\.0\.0\.1:9\. ") as error:
        gcs_file_system.FileSystem(patience=0.1, **options).cat_file("gs://bucket/x")
    assert "127.0.0.1:9" in error.value.reason and "gs://" not in error.value.reason
    said = f"cannot reach {nowhere}/b/bucket: no route. Nothing was sent"
    assert store.failure("gs://bucket/x", 503, said).reason == f"503 {said}"


SWEEP = ["sweep", f"--config={ROOT / 'experiments/coatnet_layouts/sweep.py'}:size=tiny"]


@pytest.fixture(params=["404", "403"])
def wrong_root(request, faults, bucket, tmp_path, monkeypatch):
    """A path in a bucket that does not exist or may not be read, and the status."""
    monkeypatch.chdir(tmp_path)
    if request.param == "404":
        return "gs://no-such/runs", "404"
    faults.add("status", method="GET", status=403)
    return bucket, "403"


@pytest.mark.parametrize(
    "options",
    [[], ["--status"], ["--summary"], ["--prune"], ["--collect=all.csv"], ["report"]],
    ids=" ".join,
)
def test_a_sweep_in_a_wrong_place_is_exit_2(wrong_root, tmp_path, capsys, options):
    root, status = wrong_root
    command = ["report", root] if options == ["report"] else [*SWEEP, f"--workdir={root}", *options]
    assert main(command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert root in last and status in last
    assert list(tmp_path.iterdir()) == []


def test_without_permission_it_is_exit_2(faults, bucket, capsys, data_dir):
    faults.add("status", method="GET", status=403)
    assert main([*TRAIN, f"--workdir={bucket}", f"--config.data.dir={data_dir}"]) == 2
    assert bucket in capsys.readouterr().err.strip().splitlines()[-1]
    tried = [method for method, path, _ in faults.requests if "runs/one" in path]
    assert set(tried) == {"GET"}


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "gs://bucket/run"],
        ["sweep", "--config=experiments/coatnet_layouts/sweep.py:size=tiny", "--workdir=gs://b/x",
         "--status"],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_without_the_extra_it_is_exit_2(command):
    code = "import sys; sys.modules['gcsfs'] = None\nfrom localglobal_jax.cli.main import main\n"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main({command}))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "localglobal_jax[gcs]" in ended.stderr.splitlines()[-1]
    assert len(ended.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------- the lock


HOLD = """
import sys
from localglobal_jax.checkpoints import bucket_lock, workdir
bucket_lock.BEAT, bucket_lock.LEASE, bucket_lock.FRESH = 0.5, 3.0, 0.0
if sys.argv[2:]:
    bucket_lock._machine = lambda: sys.argv[2]  # a process of another machine
try:
    with workdir.Lock() as lock:
        lock.take(sys.argv[1], run="a run")
        print("held", flush=True)
        for line in sys.stdin:
            lock.confirm()
            print("confirmed", flush=True)
except workdir.Locked as error:
    print(error, flush=True)
    sys.exit(1)
"""


class Starter:
    """A process that takes the lock, confirms it for every line, and releases it at the end."""

    def __init__(self, lock, machine=None):
        command = [sys.executable, "-c", HOLD, lock, *([machine] if machine else [])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def said(self):
        return self.process.stdout.readline().strip()

    def confirm(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.said()

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self):
        self.process.communicate()
        return self.process.returncode


@pytest.fixture
def start(bucket):
    """Starts processes that lock one workdir; ends them after the test."""
    started = []

    def new(machine=None):
        started.append(Starter(f"{bucket}/.lock", machine))
        return started[-1]

    yield new
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("machine", [None, "another"])
def test_the_second_run_names_the_first(start, bucket, machine):
    first = start()
    assert first.said() == "held"
    second = start(machine)
    assert f"{bucket}/.lock is locked by pid {first.process.pid} on " in second.said()
    assert second.end() == 1
    assert first.confirm() == "confirmed"
    assert first.end() == 0
    assert not epath.Path(f"{bucket}/.lock").exists()


def test_of_several_at_once_one_wins(start):
    several = [start(f"machine {i}") for i in range(3)]
    said = [one.said() for one in several]
    assert said.count("held") == 1
    winner = several[said.index("held")]
    assert winner.confirm() == "confirmed"


@pytest.mark.parametrize("machine", [None, "another"])
def test_a_killed_run_is_followed_in_bounded_time(start, machine):
    first = start()
    assert first.said() == "held"
    first.kill()
    second = start(machine)
    assert second.said() == "held"
    assert second.confirm() == "confirmed"


def test_a_run_that_was_taken_over_ends_before_it_writes(start, bucket):
    first = start()
    assert first.said() == "held"
    first.kill(signal.SIGSTOP)
    second = start("another")
    assert second.said() == "held"
    first.kill(signal.SIGCONT)
    assert f"by pid {second.process.pid} on " in first.confirm()
    assert first.end() == 1
    assert second.confirm() == "confirmed"  # the first has not deleted it
    assert second.end() == 0


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_the_owner_of_a_lock_is_known_by_the_time_its_process_started():
    """Ticks since the machine started; not another field of /proc, which grows with the memory."""
    own = bucket_lock._started(os.getpid())
    more_memory = mmap.mmap(-1, 2**26)
    assert bucket_lock._started(os.getpid()) == own
    more_memory.close()
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert 0 < int(own) / os.sysconf("SC_CLK_TCK") < now
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert int(bucket_lock._started(child.pid)) >= now * os.sysconf("SC_CLK_TCK") - 1
    finally:
        child.kill()
        child.wait()
    assert bucket_lock._started(child.pid) == ""


def test_a_mirror_of_a_lost_workdir_uploads_nothing(bucket):
    mirror = gcs.LocalMirror(bucket)
    lock = bucket_lock.BucketLock(mirror.lock)
    lock.take()
    mirror.confirm = lock.confirm
    (mirror.local / "config.json").write_text("{}")
    mirror.push()
    files().pipe_file(f"{bucket}/.lock", json.dumps({}).encode())  # another generation
    (mirror.local / "metrics.jsonl").write_text("1\n")
    with pytest.raises(bucket_lock.Locked, match=f"{bucket}/.lock"):
        mirror.push()
    lock.release()
    assert files().exists(f"{bucket}/.lock")
    assert not files().exists(f"{bucket}/metrics.jsonl")


def test_after_a_stop_request_all_waits_have_one_end(faults, bucket, monkeypatch):
    """A beat under way, the upload, the last upload and the deletion of the lock."""
    monkeypatch.setattr(store, "LEAST", 0.5)
    monkeypatch.setattr(bucket_lock, "BEAT", 0.2)
    monkeypatch.setattr(bucket_lock, "LAST_PATIENCE", 0.5)
    mirror = gcs.LocalMirror(bucket)
    lock = bucket_lock.BucketLock(mirror.lock)
    lock.take()
    mirror.confirm = lock.confirm
    rule = faults.add("stall", seconds=100.0)
    while not rule.hits:
        time.sleep(0.05)
    begin = time.monotonic()
    with store.one_end() as end_soon:
        end_soon()
        with pytest.raises(store.StoreFailed, match=f"{bucket}/.lock"), mirror.kept(True):
            mirror.push()
        lock.release()
    assert time.monotonic() - begin < store.LIMITS.patience + 5
    assert store.LIMITS.end == float("inf")


def test_a_signal_is_told_at_once(caplog):
    """The loop need not reach its next step; the first signal is told, once."""
    ended = []
    for number in (signal.SIGTERM, signal.SIGINT):
        caplog.clear()
        ended.clear()
        with multihost.stop_requests(lambda: ended.append(1)) as stopping:
            assert not stopping(0)
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            for _ in range(100):
                if caplog.messages:
                    break
                time.sleep(0.05)
            assert stopping(0)
        assert (len(ended), len(caplog.messages)) == (1, 1)
        assert ("SIGTERM" in caplog.messages[0]) == (number == signal.SIGTERM)


def test_an_answer_that_is_lost_does_not_lose_the_lock(faults, bucket, monkeypatch):
    """The server has done it, the client asks again: the precondition fails by its own doing."""
    path = epath.Path(f"{bucket}/.lock")
    files()
    lock = bucket_lock.BucketLock(path)
    rule = faults.add("cut", r"\.lock", method="POST", times=1)
    lock.take()
    assert rule.hits == 1
    rule = faults.add("cut", r"\.lock", method="POST", times=1)
    lock.confirm()
    assert rule.hits == 1
    lock.confirm()
    lock.release()
    assert not path.exists()
    monkeypatch.setattr(store.LIMITS, "patience", 0.5)
    faults.add("cut", r"\.lock", method="POST")
    second = bucket_lock.BucketLock(path)
    with pytest.raises(store.StoreFailed, match=str(path)):
        second.take()
    faults.clear()
    second.release()
    assert not path.exists()
