# SPDX-License-Identifier: Apache-2.0
"""However the examples are split, padded or sharded, the metrics are those of the whole set."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.training import metrics


def example(n, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, classes)).astype(np.float32), rng.integers(0, classes, n)


def padded(logits, labels, to):
    extra = to - len(labels)
    return (
        jnp.asarray(np.pad(logits, ((0, extra), (0, 0)), constant_values=np.nan)),
        jnp.asarray(np.pad(labels, (0, extra), constant_values=-1)),
        jnp.arange(to) < len(labels),
    )


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 8), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_padded_batches_merge_to_the_whole(sizes, seed):
    logits, labels = example(sum(sizes), seed=seed)
    merged, start = None, 0
    for size in sizes:
        part = slice(start, start := start + size)
        sums = metrics.classification(*padded(logits[part], labels[part], to=8))
        merged = sums if merged is None else metrics.merge(merged, sums)
    result = metrics.compute(merged)
    assert result["count"] == sum(sizes)
    order = np.argsort(-logits, axis=-1)
    if sizes := sum(sizes):
        assert result["accuracy"] == (order[:, 0] == labels).sum() / sizes
        assert result["top5"] == (order[:, :5] == labels[:, None]).sum() / sizes
        p = np.exp(logits.astype(np.float64))
        loss = -np.log(p[np.arange(sizes), labels] / p.sum(-1)).mean()
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
    else:
        assert np.isnan(result["accuracy"])


def test_top5_needs_more_than_five_classes():
    logits, labels = example(4, classes=5)
    sums = metrics.classification(*padded(logits, labels, to=4))
    assert set(sums) == {"loss", "accuracy"}


def test_ties_go_to_the_smaller_class_and_do_not_count_twice():
    labels = jnp.array([0, 1, 6])
    sums = metrics.classification(jnp.zeros((3, 7)), labels, jnp.ones(3))
    result = metrics.compute(sums)
    assert (result["accuracy"], result["top5"]) == (1 / 3, 2 / 3)


def test_a_mean_by_weights_below_and_beside_whole_numbers():
    sums = {"x": (13.8, 6.9), "y": (0.6, 0.2), "z": (0.0, 0.0)}
    result = metrics.compute(sums)
    assert (result["x"], result["y"]) == (pytest.approx(2), pytest.approx(3))
    assert np.isnan(result["z"])


def test_results_are_plain_python():
    result = metrics.compute(metrics.classification(*padded(*example(3), to=4)))
    assert {type(v) for v in result.values()} == {float, int}


def test_merging_different_metrics_is_refused():
    sums = metrics.classification(*padded(*example(3), to=4))
    with pytest.raises(ValueError, match="top5"):
        metrics.merge(sums, {"loss": sums["loss"]})


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from localglobal_jax.parallel import placement
from localglobal_jax.training import metrics
rng = np.random.default_rng(0)
args = rng.normal(size=(64, 10)).astype(np.float32), rng.integers(0, 10, 64), np.arange(64) < 61
one = metrics.compute(metrics.classification(*map(jax.numpy.asarray, args)))
mesh = placement.make_mesh({"data": -1})
assert mesh.size == 8
batch = jax.device_put(args, NamedSharding(mesh, PartitionSpec("data")))
many = metrics.compute(jax.jit(metrics.classification)(*batch))
assert one["count"] == many["count"] == 61
assert one["accuracy"] == many["accuracy"] and one["top5"] == many["top5"]
assert abs(one["loss"] - many["loss"]) < 1e-6 * one["loss"]
"""


def test_eight_devices_count_what_one_counts():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", SHARDED], env=env, check=True, timeout=600)
