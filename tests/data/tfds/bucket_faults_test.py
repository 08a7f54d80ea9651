# SPDX-License-Identifier: Apache-2.0
"""Faults of a bucket in the reads of array_record and of indexed TFRecord files."""

import io
import pathlib
import subprocess
import sys
import time

import gcs_server
import numpy as np
import pytest
import small
from etils import epath

from localglobal_jax.checkpoints import store
from localglobal_jax.cli.main import main
from localglobal_jax.data.images import label_maps, scan
from localglobal_jax.data.tfds import answers, records, tfrecord_index

ROOT = pathlib.Path(__file__).parents[3]
SHARD = "digits-train.array_record-00000-of-00001"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Limits of seconds, instead of minutes."""
    monkeypatch.setattr(store.LIMITS, "patience", 2.0)
    monkeypatch.setattr(store.LIMITS, "told", 0.0)
    monkeypatch.setattr(store, "STALL", 1)
    monkeypatch.setattr(answers, "TELL", 0.5)
    monkeypatch.setattr(answers, "POLL", 0.05)
    for name, value in {"max_retries": 3, "initial_delay": "50ms", "max_delay": "100ms"}.items():
        monkeypatch.setitem(store.TENSORSTORE, name, value)


def put(folder, target):
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            (epath.Path(target) / path.relative_to(folder)).write_bytes(path.read_bytes())


@pytest.fixture
def digits(data_dir, bucket):
    """A data directory in a bucket with the digits."""
    put(f"{data_dir}/digits", f"{bucket}/digits")
    return bucket


@pytest.fixture(
    params=[("array_record", "open"), ("array_record", "read"), ("tfrecord", "read")], ids="-".join
)
def case(request, data_dir, bucket, tmp_path, make_tfrecord):
    """A data directory, the pattern of its shard, and when that is to fail: ("open" or "read")."""
    kind, when = request.param
    source = pathlib.Path(data_dir, "digits", "1.0.0")
    if kind == "tfrecord":
        source = make_tfrecord(source, tmp_path / "digits" / "1.0.0")
    put(source, f"{bucket}/digits/1.0.0")
    if kind == "tfrecord":
        tfrecord_index.prepare(f"{bucket}/digits/1.0.0")
    return bucket, rf"digits-train\.{kind}.*alt=media", when


def opened(root):
    return records.Records(records.find_builder("digits", root), "train")


PASSING = {
    "429": {"fault": "status", "status": 429, "retry_after": 1, "times": 1},
    "503": {"fault": "status", "status": 503, "times": 1},
    "reset": {"fault": "reset", "times": 1},
    "cut": {"fault": "cut", "times": 1},
    "stall": {"fault": "stall", "seconds": 30.0, "times": 1},
    "401": {"fault": "status", "status": 401, "times": 1},
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_changes_no_record(case, data_dir, faults, name):
    root, shard, when = case
    if name == "401" and "tfrecord" in shard:
        pytest.skip("tensorstore does not repeat what was denied")
    here = opened(data_dir)
    source = opened(root) if when == "read" else None
    rule = faults.add(path=shard, **PASSING[name])
    source = source or opened(root)
    assert source.block([3, 700, 5]) == here.block([3, 700, 5])
    assert rule.hits


LASTING = {
    "429": {"fault": "status", "status": 429},
    "503": {"fault": "status", "status": 503},
    "reset": {"fault": "reset"},
    "cut": {"fault": "cut"},
    "stall": {"fault": "stall", "seconds": 8.0},
    "401": {"fault": "status", "status": 401},
    "403": {"fault": "status", "status": 403},
}
LONG = ("429", "cut")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x in LONG else ()) for x in LASTING]
)
def test_a_fault_that_lasts_is_no_bad_record_and_names_the_shard(case, faults, name):
    root, shard, when = case
    source = opened(root) if when == "read" else None
    rule = faults.add(path=shard, **LASTING[name])
    begin = time.monotonic()
    kind = ValueError if name == "403" else store.StoreFailed
    with pytest.raises(kind, match=f"{root}/digits/1.0.0/digits-train") as error:
        (source or opened(root)).block([3, 700, 5])
    assert time.monotonic() - begin < 60  # without a limit: minutes
    assert rule.hits
    assert not isinstance(error.value, records.BadRecord)
    assert LASTING[name].get("status", 0) == getattr(error.value, "status", 403)


def test_a_missing_object_and_a_missing_bucket_in_the_middle_of_a_run(digits, faults):
    source = opened(digits)
    (epath.Path(digits) / "digits/1.0.0" / SHARD).unlink()
    with pytest.raises(ValueError, match=f"{digits}/digits/1.0.0/{SHARD} was deleted"):
        source.block([3])
    faults.add("status", status=404)
    with pytest.raises(ValueError, match="gs://") as error:
        source.block([3])
    assert not isinstance(error.value, records.BadRecord)


def test_a_store_that_fails_is_no_missing_label_map(bucket, faults):
    folder = epath.Path(bucket) / "maps"
    content = io.BytesIO()
    np.save(content, np.zeros((2, 1, 3, 3), np.float16))
    (folder / "cat" / "1.npy").write_bytes(content.getvalue())
    maps = label_maps.LabelMaps(str(folder), 4, "cat/1")
    with pytest.raises(ValueError, match="cat/2"):
        maps.read("cat/2")
    faults.add("status", status=503)
    with pytest.raises(store.StoreFailed, match=f"{folder}/cat/1.npy"):
        maps.read("cat/1")


def test_a_store_that_fails_makes_no_folder_of_a_workdir(bucket, faults):
    for name in ("run/config.json", "run/curve.png", "cat/1.png"):
        (epath.Path(bucket) / name).write_bytes(b'{"task": 0, "model": 0, "data": 0}')
    assert scan.scan(epath.Path(bucket)).pictures == ["cat/1.png"]
    faults.add("status", status=503, path="config")
    with pytest.raises(store.StoreFailed, match=f"{bucket}/run/config.json"):
        scan.scan(epath.Path(bucket))


# ------------------------------------------------------------------------------ another server


TRAIN = ["train", f"--config={ROOT / 'configs' / 'coatnet_digits.py'}:size=tiny"]
SHORT = {"steps": 1, "optim.warmup_steps": 1, "eval.every": 1, "data.in_memory": "false"}
SHORT |= small.IMAGES


def overrides(root):
    return [f"--config.{key}={value}" for key, value in {**SHORT, "data.dir": root}.items()]


def test_array_record_sent_elsewhere_ends_every_command_in_a_line(
    digits, monkeypatch, tmp_path, capsys
):
    assert main([*TRAIN, f"--workdir={tmp_path}/done", *overrides(digits)]) == 0
    capsys.readouterr()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", NOWHERE)
    commands = [
        [*TRAIN, f"--workdir={tmp_path}/new", *overrides(digits)],
        ["evaluate", f"--workdir={tmp_path}/done"],
        ["bench", "--input", "--steps=2", *TRAIN[1:], *overrides(digits)],
        ["prepare", "digits", f"--dir={digits}"],
    ]
    for command in commands:
        monkeypatch.setattr(store.LIMITS, "told", 0.0)
        begin = time.monotonic()
        assert main(command) == 1
        assert time.monotonic() - begin < 60  # without a limit: minutes
        *_, told, last = capsys.readouterr().err.strip().splitlines()
        for line in (told, last):
            assert f"{digits}/digits/1.0.0/digits-" in line
            assert f"{NOWHERE} (CLOUD_STORAGE_EMULATOR_ENDPOINT)" in line
        assert last.startswith(f"localglobal {command[0]}: ")
    assert not (tmp_path / "new").exists()


def test_different_servers_are_said_once(gcs, monkeypatch, caplog):
    store._check_servers.cache_clear()
    store.prepare()
    assert not caplog.records
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", NOWHERE)
    monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL")
    for _ in range(2):
        store.prepare()
    (said,) = caplog.messages
    assert f"gcsfs: {gcs} (STORAGE_EMULATOR_HOST)" in said
    assert f"array_record: {NOWHERE} (CLOUD_STORAGE_EMULATOR_ENDPOINT)" in said
    assert f"tensorstore: {store.GOOGLE}" in said


def test_a_client_that_is_refused_where_the_other_one_is_not(digits, faults, monkeypatch):
    """As with credentials that only gcsfs finds: array_record alone passes the proxy's rule."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url())
    faults.add("status", SHARD, status=403)
    with pytest.raises(store.StoreFailed, match=f"{SHARD}.*array_record.*gcsfs"):
        opened(digits)


# ------------------------------------------------------------------------------ whole processes


STALLED = """
import sys
from localglobal_jax.config.schema import Images
from localglobal_jax.data import loader, workers
from localglobal_jax.data.images import pipeline
SHORT = "from localglobal_jax.checkpoints import store;"
SHORT += "from localglobal_jax.data.tfds import answers;"
SHORT += "store.LIMITS.patience, store.STALL, answers.TELL = 2.0, 1, 0.5"
exec(SHORT)
workers.PROGRAM = workers.PROGRAM.replace("workers.serve(", f"{SHORT}\\nworkers.serve(")
source = pipeline.open_split(Images(dir=sys.argv[1], in_memory=False), "train", train=True)
given = dict(batch_size=8, seed=0, start=0, stop=10**6, workers=int(sys.argv[2]))
for batch in loader.train_batches(source, **given):
    pass
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stall_in_the_middle_of_a_run_ends_the_process(digits, faults, workers):
    """Threads that wait in native code do not keep it."""
    rule = faults.add("stall", f"{SHARD}.*alt=media", skip=100, seconds=300.0)
    ended = subprocess.run(
        [sys.executable, "-c", STALLED, digits, str(workers)],
        check=False,
        capture_output=True,
        text=True,
        timeout=150,  # less than the stall
    )
    assert rule.hits, ended.stderr
    assert ended.returncode == 1, ended.stderr
    assert f"waiting for {digits}/digits/1.0.0/{SHARD} (no answer for " in ended.stderr
    assert f"StoreFailed: {digits}/digits/1.0.0/{SHARD}: no answer for " in ended.stderr
