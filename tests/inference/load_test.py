# SPDX-License-Identifier: Apache-2.0
"""`lg.load` of a part, in another dtype, with a sharding: every family, from an earlier workdir."""

import pathlib
import shutil
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import localglobal_jax as lg
from localglobal_jax.checkpoints import manager, reader
from localglobal_jax.config import schema
from localglobal_jax.inference import load
from localglobal_jax.parallel import placement

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "workdirs" / "4f09b88"
PARTS = {
    "coatnet": "stage1/block1",
    "volo": "stage1",
    "focal": "stage1",
    "muse": "encoder",
}


@pytest.fixture(params=PARTS)
def workdir(request, tmp_path):
    with tarfile.open(GOLDEN / f"{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param


def leaves_of(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_a_part_has_its_variables_at_their_places(workdir):
    part = PARTS[workdir.name]
    _, variables = lg.load(workdir)
    _, some = lg.load(workdir, only=part)
    expected = {
        path: leaf
        for path, leaf in leaves_of(variables).items()
        if path.partition("/")[2].startswith(f"{part}/")
    }
    found = leaves_of(some)
    assert found.keys() == expected.keys() and len(found) < len(leaves_of(variables))
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path])


@pytest.mark.parametrize("wrong", ["stage9", "encoder/layer77", "stag", "params"])
def test_a_part_that_is_absent_names_those_that_are_there(workdir, wrong):
    with pytest.raises(ValueError, match="only="):
        lg.load(workdir, only=wrong)


def test_dtype_casts_what_is_floating(workdir):
    _, variables = lg.load(workdir)
    _, half = lg.load(workdir, dtype=jnp.bfloat16)
    for (path, whole), leaf in zip(
        leaves_of(variables).items(), jax.tree.leaves(half), strict=True
    ):
        assert leaf.dtype == jnp.bfloat16, path
        np.testing.assert_array_equal(leaf, whole.astype(jnp.bfloat16))


def test_sharding_of_all_or_by_path(workdir):
    mesh = placement.make_mesh({"data": 2})  # conftest gives two devices
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    _, variables = lg.load(workdir)
    _, replicated = lg.load(workdir, sharding=everywhere)

    def rule(path, leaf):
        return split if path.endswith("kernel") and leaf.shape[0] % 2 == 0 else everywhere

    _, mixed = lg.load(workdir, sharding=rule)
    for path, leaf in leaves_of(variables).items():
        assert leaves_of(replicated)[path].sharding == everywhere
        assert leaves_of(mixed)[path].sharding == rule(path, leaf)
        np.testing.assert_array_equal(leaves_of(mixed)[path], leaf)
    assert split in {leaf.sharding for leaf in jax.tree.leaves(mixed)}


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """A run that saves a step, and deletes the oldest of two, as soon as some arrays were read."""
    source, directory = tmp_path / "all", tmp_path / "run" / "checkpoints"
    checkpoints = manager.Checkpoints(source, schema.Checkpoints(keep=10))
    for step in range(1, 7):
        state = {
            "step": np.full((), step, np.int32),
            "variables": {"params": {"x": np.full(3, step, np.float32)}},
        }
        checkpoints.save(step, state, metadata={})
    checkpoints.close()
    directory.mkdir(parents=True)
    for step in ("1", "2"):
        shutil.move(source / step, directory)
    read, coming = reader.read_arrays, [3, 4]

    def reading(place, step, wanted, **options):
        if coming and len(list(directory.iterdir())) == 2:
            new = coming.pop(0)
            shutil.move(source / str(new), directory)
            shutil.move(directory / str(new - 2), tmp_path / f"deleted{new - 2}")
        return read(place, step, wanted, **options)

    monkeypatch.setattr(reader, "read_arrays", reading)
    return tmp_path / "run"


@pytest.mark.parametrize("average", [1, 2])
def test_a_step_that_retention_deletes_meanwhile_is_not_damaged(growing, average, caplog):
    last, variables, _ = load.read_variables(growing, None, average)
    assert last > 2 or average == 1
    assert variables["params"]["x"][0] == last - (average - 1) / 2
    assert "damaged" not in caplog.text


def test_a_folder_of_a_step_has_no_more_steps_to_average(growing):
    with pytest.raises(ValueError, match=r"average=2: .* 1 checkpoints up to step 2"):
        load.read_variables(growing / "checkpoints" / "2", average=2)


def test_a_given_step_that_retention_deletes_is_said(growing):
    with pytest.raises(reader.Deleted, match="step 1"):
        load.read_variables(growing, 1)
