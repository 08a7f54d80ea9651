# SPDX-License-Identifier: Apache-2.0
"""What was saved comes back bit for bit, or somebody is told. Real files, real kills."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from localglobal_jax.checkpoints import digests, manager, orbax_patches, reader
from localglobal_jax.config import schema
from localglobal_jax.parallel import placement


def state_of(step):
    """A state with every kind of leaf, a pure function of the step."""
    rng = np.random.default_rng(step)
    params = {"stem": {"kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)}}
    return {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "half": jnp.asarray(rng.normal(size=9), jnp.bfloat16),
        "bytes": jnp.asarray(rng.integers(0, 256, 11), jnp.uint8),
        "flags": jnp.asarray(rng.integers(0, 2, 5), bool),
        "step": jnp.int32(step),
        "empty": jnp.zeros((0, 3)),
        "nothing": None,
    }


def template():
    return jax.eval_shape(lambda: state_of(0))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def open_at(directory, **options):
    return manager.Checkpoints(directory, schema.Checkpoints(**({"keep": 3} | options)))


def saved(directory, steps=(1, 2), **options):
    checkpoints = open_at(directory, **options)
    for step in steps:
        assert checkpoints.save(step, state_of(step), metadata={"position": step})
    checkpoints.close()
    return checkpoints


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    saved(directory)
    return directory


@pytest.fixture
def copy(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_roundtrip(two_steps):
    checkpoints = open_at(two_steps)
    assert checkpoints.steps() == [1, 2]
    for step, wanted in ((None, 2), (1, 1)):
        found = checkpoints.restore(template(), step)
        assert (found.step, found.metadata) == (wanted, {"position": wanted})
        same(found.state, state_of(wanted))


def test_nothing_there_is_none_and_stays_nothing(tmp_path):
    checkpoints = open_at(tmp_path / "run" / "checkpoints")
    assert checkpoints.restore(template()) is None
    assert (checkpoints.steps(), checkpoints.best()) == ([], None)
    checkpoints.close()
    assert not list(tmp_path.iterdir())


def test_empty_and_temporary_directories_are_no_steps(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints = open_at(tmp_path, keep=1)
    assert checkpoints.restore(template()) is None
    assert checkpoints.save(5, state_of(5), metadata={})
    assert checkpoints.save(6, state_of(6), metadata={})
    checkpoints.close()
    # Orbax alone would have kept 7, the "newest", and deleted 5 and 6.
    assert checkpoints.steps() == [6]
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_the_state_may_be_donated_right_after_save(tmp_path):
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints, state = open_at(tmp_path), {"x": jnp.zeros(1 << 16)}
    for step in range(3):
        checkpoints.save(step, state, metadata={})
        state = bump(state)
    restored = checkpoints.restore(state, 1).state
    assert (np.asarray(restored["x"]) == 1).all()
    again = bump(bump(restored))  # what was restored can be donated as well
    assert (np.asarray(again["x"]) == 3).all()
    assert (np.asarray(checkpoints.restore(again, 2).state["x"]) == 2).all()
    checkpoints.close()


def test_a_complete_step_is_not_written_again(copy):
    checkpoints = open_at(copy)
    assert not checkpoints.save(2, state_of(9), metadata={})
    checkpoints.close()
    same(checkpoints.restore(template()).state, state_of(2))


def test_what_is_kept(tmp_path):
    checkpoints = open_at(tmp_path, keep=2, keep_every=4, best="-test/loss")
    loss = {3: 0.5, 5: 0.1, 6: float("nan"), 7: 0.1, 9: 0.7}
    for step in range(1, 11):
        metrics = {"test/loss": loss[step], "other": 1.0} if step in loss else None
        checkpoints.save(step, {"x": jnp.arange(step)}, metadata={}, metrics=metrics)
        if step == 6:  # what was best is still known after a restart
            checkpoints.close()
            assert checkpoints.steps() == [4, 5, 6]
            checkpoints = open_at(tmp_path, keep=2, keep_every=4, best="-test/loss")
    checkpoints.close()
    assert (checkpoints.steps(), checkpoints.best()) == ([4, 7, 8, 9, 10], 7)
    assert not (tmp_path / "deleted").exists()


def test_larger_is_better_without_a_minus_sign(tmp_path):
    checkpoints = open_at(tmp_path, keep=1, best="accuracy")
    for step, accuracy in enumerate([0.2, 0.9, 0.4, 0.3]):
        metrics = {"accuracy": accuracy}
        checkpoints.save(step, {"x": jnp.arange(3)}, metadata={}, metrics=metrics)
    checkpoints.close()
    assert (checkpoints.steps(), checkpoints.best()) == ([1, 3], 1)


def test_a_misspelt_best_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"test/acuracy.*test/accuracy"):
        open_at(tmp_path, best="test/acuracy").save(
            1, state_of(1), metadata={}, metrics={"test/accuracy": 1.0}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state", "metadata", "error"),
    [
        ({"key": jax.random.key(0)}, {}, ValueError),
        ({"n": np.arange(3, dtype=np.int64)}, {}, ValueError),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {}, ValueError),
        ({"empty": jnp.ones(0)}, {}, ValueError),
        (jnp.ones(3), {}, ValueError),
        ({"x": jnp.ones(3)}, {"f": print}, TypeError),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_disk_is_touched(
    tmp_path, state, metadata, error
):
    with pytest.raises(error):
        open_at(tmp_path / "run").save(1, state, metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_another_state_is_refused_by_path(two_steps, caplog):
    wanted = template()
    wanted["half"] = jax.ShapeDtypeStruct((9,), jnp.float32)
    wanted["params"]["stem"]["kernel"] = jax.ShapeDtypeStruct((8, 5), jnp.float32)
    wanted["bias"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    del wanted["flags"]
    with pytest.raises(ValueError) as error:
        open_at(two_steps).restore(wanted)
    assert "bias: not in the checkpoint" in str(error.value)
    assert "flags: only in the checkpoint" in str(error.value)
    assert "half: bfloat16 (9,) in the checkpoint, float32 (9,) wanted" in str(error.value)
    assert "params/stem/kernel: float32 (8, 6) in the checkpoint" in str(error.value)
    assert "optimizer" not in str(error.value)
    assert not caplog.records  # the user's mistake is no damage


def test_a_step_that_is_not_there_is_named(two_steps):
    with pytest.raises(ValueError, match=r"7.*\[1, 2\]"):
        open_at(two_steps).restore(template(), 7)


def flip(path, seed=0):
    raw, rng = bytearray(path.read_bytes()), random.Random(seed)
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(raw))


DAMAGE = {
    "flip0": flip,
    "flip1": lambda path: flip(path, 1),
    "flip2": lambda path: flip(path, 2),
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found_named_and_gone_around(copy, caplog, damage):
    checkpoints = open_at(copy)
    for path in files(copy / "2"):
        before = path.read_bytes()
        caplog.clear()
        DAMAGE[damage](path)
        found = checkpoints.restore(template())
        assert found.step == 1, path
        same(found.state, state_of(1))
        assert caplog.records[0].levelno == logging.ERROR
        assert str(path.relative_to(copy / "2")) in caplog.text
        assert reader.inspect(copy, verify=True)["steps"][1]["verified"] is False
        path.write_bytes(before)
    assert len(files(copy / "2")) > 10
    assert checkpoints.restore(template()).step == 2


@pytest.mark.parametrize("small", [0, reader.SMALL])
def test_flipped_arrays_are_found_by_their_own_digests(tmp_path, caplog, monkeypatch, small):
    """As if the checksums had been computed after the flip: only the leaves can tell."""
    monkeypatch.setattr(reader, "SMALL", small)  # 0: every digest is computed on the device
    checkpoints, named = open_at(tmp_path), 0
    state = {"x": jax.random.normal(jax.random.key(0), (64, 64))}
    for step in (1, 2):
        checkpoints.save(step, state, metadata={})
    checkpoints.close()
    for path in files(tmp_path / "2" / "state" / "ocdbt.process_0" / "d"):
        before = path.read_bytes()
        for seed in range(10):
            caplog.clear()
            flip(path, seed)
            digests.write_manifest(epath.Path(tmp_path / "2"))
            found = checkpoints.restore(state)
            same(found.state, state)  # a dead byte changes nothing
            assert found.step == 2 or "checkpoint" in caplog.text
            named += "the digest does not match in 1 leaves: x" in caplog.text
            path.write_bytes(before)
    assert named > 3  # orbax alone would have handed these out


def test_a_damaged_explicit_step_raises(copy):
    flip(copy / "2" / "state" / "_METADATA")
    with pytest.raises(reader.CorruptCheckpoint, match="state/_METADATA"):
        open_at(copy).restore(template(), 2)
    with pytest.raises(reader.CorruptCheckpoint, match="state/_METADATA"):
        reader.read(copy, 2)


@contextlib.contextmanager
def as_nobody():
    """Without the rights of root, which may read every file."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_may_not_be_read_is_no_damage(two_steps, caplog):
    """The step may be whole: no other one is used, and none is moved aside."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder).chmod(0o755)  # those of pytest are for their owner alone
        copy = shutil.copytree(two_steps, pathlib.Path(folder) / "checkpoints")
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)
        for path in (copy / "2" / "metadata" / "metadata", copy / "2" / "state" / "_METADATA"):
            path.chmod(0)
            with as_nobody():
                for read in (lambda: open_at(copy).restore(template()), lambda: reader.read(copy)):
                    with pytest.raises(PermissionError, match=path.name):
                        read()
            with as_nobody(), pytest.raises(PermissionError):
                reader.inspect(copy, verify=True)
            path.chmod(0o755)
        assert open_at(copy).restore(template()).step == 2
    assert not caplog.records


def test_an_error_of_tensorstore_has_the_errno_of_the_system(two_steps):
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(two_steps, pathlib.Path(folder) / "checkpoints")
        pathlib.Path(folder).chmod(0o755)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0)
        leaves = {"half": jax.ShapeDtypeStruct((9,), jnp.bfloat16)}
        with as_nobody(), pytest.raises(Exception, match=r"(?i)permission") as caught:
            reader.read_arrays(epath.Path(copy), 2, leaves, part=True)
    assert reader.os_error(caught.value) == errno.EACCES and reader.cannot_read(caught.value)


def test_the_best_of_a_run_of_an_earlier_version_is_kept(tmp_path):
    """Then the metrics of an evaluation of the training set were called "train"."""
    checkpoints = open_at(tmp_path, keep=1)
    checkpoints.save(1, state_of(1), metadata={}, metrics={"train/accuracy": 0.9})
    checkpoints.close()
    today = open_at(tmp_path, keep=1, best="train/accuracy")
    assert today.best() == 1
    for step in (2, 3):
        today.save(step, state_of(step), metadata={}, metrics={"train_eval/accuracy": 0.5})
    today.close()
    assert today.steps() == [1, 3] and today.best() == 1


def test_inspect_leaves_out_a_step_that_is_deleted_meanwhile(copy, monkeypatch):
    document_of = reader.document_of

    def deleted(directory, step, *rest, **options):
        if step == 1:
            shutil.rmtree(copy / "1", ignore_errors=True)
        return document_of(directory, step, *rest, **options)

    monkeypatch.setattr(reader, "document_of", deleted)
    (entry,) = reader.inspect(copy, verify=True)["steps"]
    assert (entry["step"], entry["verified"]) == (2, True)


def test_no_good_step_raises_rather_than_starting_over(copy):
    for step in ("1", "2"):
        flip(copy / step / "metadata" / "metadata")
    for read in (lambda: open_at(copy).restore(template()), lambda: reader.read(copy)):
        with pytest.raises(reader.CorruptCheckpoint, match=r"metadata/metadata.*metadata/metadata"):
            read()
    shutil.rmtree(copy / "1")
    (copy / "2" / digests.MANIFEST).unlink()
    with pytest.raises(reader.CorruptCheckpoint, match=r"files\.json"):
        open_at(copy).restore(template())


def test_training_goes_on_past_a_damaged_step(copy, caplog):
    open_at(copy).restore(template())
    assert not caplog.records
    flip(copy / "2" / "state" / "manifest.ocdbt")
    checkpoints = open_at(copy, keep=2)
    assert checkpoints.restore(template()).step == 1
    damaged, taken = (record.getMessage() for record in caplog.records)
    assert str(copy / "2") in damaged
    assert taken.endswith(" 1")
    assert checkpoints.save(2, state_of(2), metadata={})
    assert checkpoints.save(3, state_of(3), metadata={})
    checkpoints.close()
    assert checkpoints.steps() == [2, 3]
    same(checkpoints.restore(template(), 2).state, state_of(2))
    assert (copy / "2.damaged").is_dir()


def test_a_failed_save_is_raised_and_is_no_step(tmp_path, monkeypatch):
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, state_of(1), metadata={})
    checkpoints.wait()

    def full(directory):
        raise OSError("no space left on device")

    for surfaces in (
        checkpoints.wait,
        checkpoints.close,
        lambda: checkpoints.save(3, state_of(3), metadata={}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(digests, "write_manifest", full)
            assert checkpoints.save(2, state_of(2), metadata={})
            with pytest.raises(OSError, match=str(tmp_path)):
                surfaces()
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(template()).step == 1
    assert checkpoints.save(2, state_of(2), metadata={})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


FULL = """
import resource, sys, jax, jax.numpy as jnp
from localglobal_jax.checkpoints import manager
from localglobal_jax.config import schema
checkpoints = manager.Checkpoints(sys.argv[1], schema.Checkpoints())
checkpoints.save(1, {"x": jnp.ones(1 << 16)}, metadata={})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
noise = jax.random.normal(jax.random.key(0), (1 << 16,))
checkpoints.save(2, {"x": noise}, metadata={})
try:
    checkpoints.wait()
except manager.SaveFailed as error:
    print(error)
checkpoints.close()
"""


def test_a_disk_without_room_is_said_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 1
    assert "File too large" in done.stdout and "[1]" in done.stdout
    assert "Traceback" not in done.stderr
    assert reader.inspect(tmp_path, verify=True)["steps"][0]["verified"]
    assert open_at(tmp_path).steps() == [1]


def test_only_large_arrays_are_cut_among_the_devices_that_hold_them(tmp_path):
    """A cut compiles a program for each shape."""
    everywhere = NamedSharding(placement.make_mesh({"data": 2}), PartitionSpec())
    rows = 2 * orbax_patches.SLICE // 4096  # of 4,096 bytes: two slices
    state = {"small": jnp.ones((4, 6)), "below": jnp.ones((rows - 2, 1024))}
    state = jax.device_put(state | {"large": jnp.ones((rows, 1024))}, everywhere)
    checkpoints = open_at(tmp_path)
    assert checkpoints.save(1, state, metadata={})
    checkpoints.close()
    found = ocp.PyTreeCheckpointHandler().metadata(tmp_path / "1" / "state").tree
    written = {name: leaf.storage.write_shape for name, leaf in found.items()}
    assert written == {"small": (4, 6), "below": (rows - 2, 1024), "large": (rows // 2, 1024)}
    same(checkpoints.restore(jax.eval_shape(lambda: state)).state, state)


def test_a_clock_that_jumps_ahead_ends_no_save(tmp_path, monkeypatch):
    """As on a machine that wakes up; orbax gives a save ten minutes, by that clock."""
    real, began = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() + 1e5 * (time.monotonic() - began))
    saved(tmp_path)
    assert reader.inspect(tmp_path, verify=True)["latest"] == 2


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = open_at(tmp_path / "file" / "checkpoints")
    with pytest.raises(OSError):
        checkpoints.save(1, state_of(1), metadata={})
    checkpoints.close()


def test_read_needs_no_template(two_steps):
    for path in (two_steps, two_steps.parent, str(two_steps / "2")):
        step, arrays, metadata = reader.read(path)
        assert (step, metadata) == (2, {"position": 2})
        expected = state_of(2)
        kernel = arrays["params"]["stem"]["kernel"]
        assert isinstance(kernel, np.ndarray)
        same(kernel, np.asarray(expected["params"]["stem"]["kernel"]))
        same(arrays["half"], np.asarray(expected["half"]))
        assert arrays["empty"].shape == (0, 3)
        assert arrays["optimizer"]["0"]["count"] == 0
    assert reader.read(two_steps, 1)[0] == 1
    assert reader.read(two_steps / "1")[0] == 1


def test_read_of_nothing_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        reader.read(tmp_path)


def test_inspect_is_json(two_steps):
    found = json.loads(json.dumps(reader.inspect(two_steps.parent, verify=True)))
    assert found["latest"] == 2
    step = found["steps"][1]
    assert (step["step"], step["verified"], step["error"]) == (2, True, None)
    half = np.asarray(state_of(2)["half"])
    assert step["leaves"]["half"] == {
        "shape": [9],
        "dtype": "bfloat16",
        "digest": digests.text(digests.on_host(half)),
    }
    assert step["bytes"] == sum(x.nbytes for x in jax.tree.leaves(state_of(2)))
    assert reader.inspect(two_steps / "1")["steps"][0]["verified"] is None


def test_plain_orbax_reads_the_state(two_steps):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(two_steps / "2" / "state")
    same(state["params"], state_of(2)["params"])


def test_restores_into_the_sharding_of_the_template(two_steps):
    """conftest gives two devices; the state was saved from one."""
    mesh = placement.make_mesh({"data": 2})
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    wanted = template()
    kernel = wanted["params"]["stem"]["kernel"]
    wanted["params"]["stem"]["kernel"] = jax.ShapeDtypeStruct(
        kernel.shape, kernel.dtype, sharding=sharding
    )
    found = open_at(two_steps).restore(wanted).state
    assert found["params"]["stem"]["kernel"].sharding == sharding
    same(found, state_of(2))
    wanted["half"] = jax.ShapeDtypeStruct((9,), jnp.bfloat16, sharding=sharding)
    with pytest.raises(ValueError, match=r"\(9,\)"):
        open_at(two_steps).restore(wanted)


RESHARD = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from localglobal_jax.checkpoints import manager, reader
from localglobal_jax.config import schema
from localglobal_jax.parallel import placement
reader.SMALL = 0
mesh = placement.make_mesh({"data": 4, "model": 2})
x = np.arange(64, dtype=np.float32).reshape(8, 8)
checkpoints = manager.Checkpoints(sys.argv[1], schema.Checkpoints())
shardings = [NamedSharding(mesh, spec) for spec in (P("data", "model"), P(None, "data"), P())]
for step, sharding in enumerate(shardings):
    checkpoints.save(step, {"x": jax.device_put(x, sharding)}, metadata={})
    for other in shardings:
        wanted = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other)}
        found = checkpoints.restore(wanted, step).state["x"]
        assert found.sharding == other and (np.asarray(found) == x).all()
checkpoints.close()
"""


def test_eight_devices_to_any_sharding_and_back_to_one(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", RESHARD, str(tmp_path)]
    subprocess.run(command, env=env, check=True, timeout=600)
    step, arrays, _ = reader.read(tmp_path)
    assert step == 2
    np.testing.assert_array_equal(arrays["x"], np.arange(64).reshape(8, 8))


HOSTS = """
import sys, jax, numpy as np, pathlib
directory, port, host = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, host)
from jax.sharding import NamedSharding, PartitionSpec as P
from jax.experimental import multihost_utils
from localglobal_jax.checkpoints import manager
from localglobal_jax.config import schema
from localglobal_jax.parallel import placement
mesh = placement.make_mesh({"data": -1})
assert mesh.size == 4 and jax.process_count() == 2
x = np.arange(64, dtype=np.float32).reshape(8, 8)

def state(step, spec):
    sharding = NamedSharding(mesh, spec)
    make = lambda i: (x + step)[i]
    return {"x": jax.make_array_from_callback(x.shape, sharding, make), "step": np.int32(step)}

checkpoints = manager.Checkpoints(directory, schema.Checkpoints(keep=3))
assert checkpoints.restore(state(0, P())) is None
for step in (1, 2):
    checkpoints.save(step, state(step, P("data")), metadata={"step": step})
checkpoints.wait()
multihost_utils.sync_global_devices("saved")
if host == 1:  # one host alone sees the damage: both must go back
    real = manager.reader.read_arrays
    def unreadable(directory, step, wanted):
        if step == 2:
            raise OSError("stale file handle")
        return real(directory, step, wanted)
    manager.reader.read_arrays = unreadable
found = checkpoints.restore(state(0, P(None, "data")))
assert found.step == 1, found.step
for part in found.state["x"].addressable_shards:
    assert (np.asarray(part.data) == (x + 1)[part.index]).all()
checkpoints.save(2, state(7, P()), metadata={"step": 7})
checkpoints.close()
assert checkpoints.steps() == [1, 2]
"""


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_two_hosts_agree_on_what_is_damaged(place, tmp_path, request):
    directory = epath.Path(tmp_path)
    if place == "bucket":
        directory = epath.Path(request.getfixturevalue("bucket")) / "checkpoints"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTS, str(directory), port, str(host)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    try:
        errors = [host.communicate(timeout=600)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert [host.returncode for host in hosts] == [0, 0], errors
    assert "unreadable on another host" in errors[0] and "stale file handle" in errors[1]
    step, arrays, metadata = reader.read(directory)
    assert (step, metadata) == (2, {"step": 7})
    np.testing.assert_array_equal(arrays["x"], np.arange(64).reshape(8, 8) + 7)
    assert (directory / "2.damaged").is_dir()
    parts = {path.name for path in (directory / "1" / "state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts


def test_a_damaged_step_that_was_given_names_the_others(tmp_path):
    checkpoints = open_at(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.ones(3)}, metadata={})
    checkpoints.close()
    (tmp_path / "2" / "metadata" / "metadata").unlink()
    with pytest.raises(reader.CorruptCheckpoint, match=r"step 2: .*metadata.*\[1\]"):
        reader.read(tmp_path, 2)
    assert reader.read(tmp_path)[0] == 1


CHILD = """
import os, signal, sys, jax, jax.numpy as jnp
from localglobal_jax.checkpoints import digests, manager
from localglobal_jax.config import schema
directory, where = sys.argv[1:]
checkpoints = manager.Checkpoints(directory, schema.Checkpoints(keep=2, keep_every=3))
wanted = {"x": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}
found = checkpoints.restore(wanted)
start = found.step if found else 0
assert found is None or bool((found.state["x"] == start).all()), start
print("resumed", start, flush=True)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
for step in range(start + 1, start + 1000):
    checkpoints.save(step, {"x": jnp.full(1 << 20, step, jnp.float32)}, metadata={"step": step})
    if step == start + 3 and where != "anywhere":
        checkpoints.wait()
        print("complete", max(checkpoints.steps()), flush=True)
        if where == "before":
            digests.write_manifest = lambda directory: die()
        elif where == "listed":
            real = digests.write_manifest
            digests.write_manifest = lambda directory: (real(directory), die())
        else:
            import shutil
            shutil.rmtree = lambda *args, **kwargs: die()
"""


@pytest.mark.parametrize("where", ["before", "listed", "deleting", "anywhere"])
def test_killed_during_a_save(tmp_path, where):
    """Twice in a row; whatever was complete stays, and what is complete is right."""
    at_least = 0
    for attempt in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), where],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if where == "anywhere":
            assert child.stdout.readline().startswith("resumed")
            while max(open_at(tmp_path).steps(), default=0) < at_least + 3:
                assert child.poll() is None, child.communicate()
                time.sleep(0.01)
            time.sleep(0.037 * attempt)
            child.kill()
        output, errors = child.communicate(timeout=600)
        assert child.returncode == -signal.SIGKILL, errors
        for line in output.splitlines():
            kind, step = line.split()
            assert int(step) >= at_least, (kind, output)
            at_least = max(at_least, int(step))
        checkpoints = open_at(tmp_path)
        found = reader.inspect(tmp_path, verify=True)
        assert all(step["verified"] for step in found["steps"]), found
        assert found["latest"] == checkpoints.steps()[-1] >= at_least
        _, arrays, metadata = reader.read(tmp_path)
        assert (arrays["x"] == metadata["step"]).all()
        at_least = checkpoints.steps()[-1]
    assert at_least > 3
    checkpoints.save(at_least + 1, {"x": jnp.ones(3)}, metadata={})
    checkpoints.close()  # what the kills left behind is gone
    assert all(path.name.isdigit() for path in tmp_path.iterdir())


def test_tensorstore_is_asked_for_json_a_few_times_a_save_not_for_every_leaf(tmp_path):
    """It never frees what it hands out (0.1.86), which no run of weeks can afford."""
    asked = orbax_patches._resolved.cache_info()
    state = {f"leaf{i}": jnp.full(3, i) for i in range(30)}
    checkpoints = open_at(tmp_path)
    for step in range(3):
        checkpoints.save(step, state, metadata={})
    checkpoints.close()
    now = orbax_patches._resolved.cache_info()
    assert now.hits - asked.hits >= 3 * 20  # orbax would have asked tensorstore
    assert now.misses - asked.misses <= 3 * 5


def test_runs_in_threads_save_one_after_the_other(tmp_path):
    def run(name):
        checkpoints = open_at(tmp_path / name)
        for step in range(1, 6):
            checkpoints.save(step, state_of(step), metadata={})
        checkpoints.close()
        return open_at(tmp_path / name).restore(template())

    with ThreadPoolExecutor() as threads:
        for restored in threads.map(run, "abcd"):
            assert restored.step == 5
            same(restored.state, state_of(5))


def test_the_best_step_is_kept_also_of_those_before_it_was_asked_for(tmp_path):
    losses = {1: 0.1, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.4, 6: 0.6}

    def save(steps, **options):
        checkpoints = open_at(tmp_path, **options)
        for step in steps:
            numbers = {"test/loss": losses[step]}
            checkpoints.save(step, state_of(step), metadata={}, metrics=numbers)
        checkpoints.close()
        return checkpoints

    save((1, 2, 3), keep=3)
    kept = save((4, 5, 6), keep=1, best="-test/loss")
    assert kept.best() == 1 and kept.steps() == [1, 6]
