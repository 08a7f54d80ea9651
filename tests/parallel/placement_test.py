# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from localglobal_jax.config import schema
from localglobal_jax.parallel import context, placement


def test_mesh_takes_all_devices():
    assert dict(placement.make_mesh().shape) == {"data": 2}
    assert dict(placement.make_mesh({"data": -1, "model": 2}).shape) == {"data": 1, "model": 2}


@pytest.mark.parametrize(
    "shape",
    [
        *({"data": 3}, {"data": 1}, {"model": 2}, {"data": 0}),
        *({"data": -1, "x": -1}, {"data": -2, "fsdp": -2}),
    ],
)
def test_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"parallel\.mesh"):
        placement.make_mesh(shape)


def test_fsdp_splits_what_is_large_but_no_depthwise_kernel():
    options = schema.Parallel(strategy="fsdp", mesh={"data": 1, "fsdp": 2})
    partitioner = placement.Partitioner(options)

    def spec(path, shape):
        return tuple(partitioner.spec(path, shape))

    assert spec("variables/params/stage1/block1/expand/kernel", (64, 2048)) == (None, "fsdp")
    assert spec("variables/params/stage1/block1/expand/bias", (2048,)) == (None,)
    path = "variables/params/stage1/block1/depthwise/kernel"
    assert spec(path, (3, 3, 1, 2048)) == spec(f"optimizer/1/mu/{path}", (3, 3, 1, 2048))
    assert spec(path, (3, 3, 1, 2048)) == (None,) * 4


def test_batch_must_divide():
    partitioner = placement.Partitioner()
    partitioner.check_batch(4)
    with pytest.raises(ValueError, match=r"batch_size=5.*4.*6"):
        partitioner.check_batch(5)
    with pytest.raises(ValueError, match=r"batch_size=1.*2"):
        partitioner.check_batch(1)


def test_global_batch_is_split_over_devices():
    batch = {"x": np.arange(8).reshape(4, 2)}
    x = placement.Partitioner().global_batch(batch)["x"]
    np.testing.assert_array_equal(x, batch["x"])
    assert {s.data.shape for s in x.addressable_shards} == {(2, 2)}


def test_the_compilation_cache_is_off_on_cpu_unless_it_is_named(tmp_path):
    try:
        placement.use_compilation_cache("auto")
        assert jax.config.jax_compilation_cache_dir is None
        placement.use_compilation_cache(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        placement.use_compilation_cache("auto")  # that was of another run
        assert jax.config.jax_compilation_cache_dir is None
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
        placement.use_compilation_cache("auto")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "users")
    finally:
        placement.use_compilation_cache(None)


def test_a_step_for_this_machine_traces_the_form_of_its_platform_alone():
    def function(variables, batch):
        return context.per_platform(batch, cpu=jax.numpy.sin, default=jax.numpy.cos)

    def traced(devices):
        step = placement.Partitioner(devices=devices).compile_eval(function)
        return str(step.trace({}, jax.numpy.ones(4)).jaxpr)

    assert " sin " in traced(None)
    assert " cos " not in traced(None)
    assert " cos " in traced(jax.devices())  # might be another machine's


def test_hosts_that_share_rows_read_the_same_ones():
    """Four hosts of two devices each, as their process indices say."""

    class Device:
        def __init__(self, number):
            self.process_index = number // 2

    def shards(sizes, axes):
        partitioner = placement.Partitioner()
        devices = np.array([Device(i) for i in range(np.prod(sizes))]).reshape(sizes)
        partitioner.mesh = SimpleNamespace(
            devices=devices, shape=dict(zip(axes, sizes, strict=True))
        )
        partitioner._batch = tuple(axis for axis in axes if axis != "model")
        return partitioner.shard

    assert shards((8,), ("data",)) == (0, 4)
    assert shards((2, 4), ("data", "fsdp")) == (0, 4)
    assert shards((4, 2), ("data", "model")) == (0, 4)
    assert shards((2, 4), ("data", "model")) == (0, 2)  # two hosts hold halves of the same rows
    assert shards((4, 2), ("model", "data")) == (0, 1)  # each host holds a part of every row
    with pytest.raises(ValueError, match=r"parallel\.mesh"):
        shards((8 // 3, 3), ("data", "model"))
