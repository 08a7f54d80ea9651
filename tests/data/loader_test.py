# SPDX-License-Identifier: Apache-2.0
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.data.loader import PositionRng, eval_batches, train_batches

SOME = settings(deadline=None, max_examples=25)


class Numbers:
    """Example i is the number i, and, in training, random numbers of its position."""

    def __init__(self, size, bad=()):
        self.size, self.bad = size, set(bad)

    def __len__(self):
        return self.size

    def admit(self, index):
        assert {*index.tolist()} <= self.bad

    def batch(self, index, draws):
        out = {"mask": np.array([i not in self.bad for i in index.tolist()], np.float32)}
        if draws is not None:
            out["uniform"] = draws.uniforms(len(index), 3)
            out["normal"] = np.array([draws.generator(j).normal() for j in range(len(index))])
        return out


def stream(size, steps, *, batch_size, seed=0, hosts=1, start=0, **kwargs):
    """Steps of training batches, the hosts' parts put side by side."""
    parts = [
        list(
            train_batches(
                Numbers(size),
                batch_size=batch_size,
                seed=seed,
                start=start,
                stop=steps,
                shard=(host, hosts),
                **kwargs,
            )
        )
        for host in range(hosts)
    ]
    return [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]}
        for step in zip(*parts, strict=True)
    ]


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], strict=True)


@SOME
@given(size=st.integers(1, 40), batch_size=st.integers(1, 16), seed=st.integers(0, 2**70))
def test_every_epoch_is_a_permutation(size, batch_size, seed):
    steps = -(-3 * size // batch_size)  # batches straddle the epochs
    batches = stream(size, steps, batch_size=batch_size, seed=seed)
    index = np.concatenate([b["index"] for b in batches])[: 3 * size].reshape(3, size)
    assert index.dtype == np.int32
    for epoch in index:
        assert sorted(epoch.tolist()) == list(range(size))


def test_epochs_and_seeds_differ():
    first, other = (stream(500, 2, batch_size=500, seed=seed) for seed in (0, 1))
    orders = [tuple(b["index"].tolist()) for b in first + other]
    assert len(set(orders)) == 4
    assert not np.array_equal(first[0]["uniform"], other[0]["uniform"])
    assert not np.array_equal(first[0]["uniform"], first[1]["uniform"])


@settings(deadline=None, max_examples=10)
@given(
    size=st.integers(1, 50),
    local=st.integers(1, 6),
    hosts=st.sampled_from([2, 3, 4]),
    start=st.integers(0, 6),
    threads=st.integers(1, 3),
)
def test_hosts_threads_and_resuming_change_nothing(size, local, hosts, start, threads):
    batch_size = local * hosts
    whole = stream(size, 8, batch_size=batch_size, seed=7)
    parts = stream(
        size, 8, batch_size=batch_size, seed=7, hosts=hosts, start=start, threads=threads
    )
    same(whole[start:], parts)


@SOME
@given(size=st.integers(1, 50), local=st.integers(1, 6), hosts=st.integers(1, 4))
def test_evaluation_sees_each_record_once_in_order(size, local, hosts):
    source, batch_size = Numbers(size), local * hosts
    parts = [
        list(eval_batches(source, batch_size=batch_size, shard=(host, hosts)))
        for host in range(hosts)
    ]
    assert {len(part) for part in parts} == {-(-size // batch_size)}
    steps = list(zip(*parts, strict=True))
    index = np.concatenate([b["index"] for step in steps for b in step])
    mask = np.concatenate([b["mask"] for step in steps for b in step])
    assert mask.dtype == np.float32
    assert mask.sum() == size
    assert index[mask > 0].tolist() == list(range(size))
    assert all(len(b["index"]) == local for step in steps for b in step)


def test_bad_records_keep_their_slot():
    clean = stream(10, 5, batch_size=4)
    bad = list(train_batches(Numbers(10, bad={3}), batch_size=4, seed=0, start=0, stop=5))
    for a, b in zip(clean, bad, strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])
        np.testing.assert_array_equal(b["mask"] == 0, b["index"] == 3)
    masks = [b["mask"] for b in eval_batches(Numbers(10, bad={9}), batch_size=4)]
    assert np.concatenate(masks).tolist() == [1] * 9 + [0] * 3


@SOME
@given(first=st.integers(0, 2**40), count=st.integers(1, 20), width=st.integers(1, 9))
def test_draws_hang_on_the_position_alone(first, count, width):
    together = PositionRng(3, first).uniforms(count, width)
    alone = [PositionRng(3, first + i).uniforms(1, width)[0] for i in range(count)]
    np.testing.assert_array_equal(together, alone)
    assert together.min() >= 0 and together.max() < 1
    shifted = PositionRng(3, first).generator(count).integers(2**60)
    assert shifted == PositionRng(3, first + count).generator(0).integers(2**60)
    assert shifted != PositionRng(3, first).generator(count, stream=1).integers(2**60)


def test_draws_are_uniform():
    values = PositionRng(0, 0).uniforms(20_000, 4)
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=10, shard=(0, 3)), "10 cannot be split over 3 hosts"),
        (dict(batch_size=0, shard=(0, 1)), "batch_size 0"),
        (dict(batch_size=4, shard=(2, 2)), r"shard \(2, 2\)"),
    ],
)
def test_refuses_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_batches(Numbers(10), seed=0, start=0, stop=1, **arguments)
    with pytest.raises(ValueError, match=message):
        eval_batches(Numbers(10), **arguments)


def test_refuses_an_empty_source():
    with pytest.raises(ValueError, match="no records"):
        eval_batches(Numbers(0), batch_size=1)


def test_nothing_left_to_do_is_an_empty_stream():
    assert stream(10, 3, batch_size=2, start=3) == []


class Failing(Numbers):
    def batch(self, index, draws):
        if 7 in index:
            raise ValueError("record 7 is corrupt")
        return super().batch(index, draws)


def prefetching_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def test_what_a_thread_raises_reaches_the_consumer_and_the_threads_end():
    seen = []
    with pytest.raises(ValueError, match="record 7"):
        for batch in eval_batches(Failing(100), batch_size=2):
            seen += batch["index"].tolist()
    assert seen == list(range(6))
    for thread in prefetching_threads():
        thread.join(timeout=100)
    assert not prefetching_threads()


def test_an_early_exit_ends_the_threads():
    batches = train_batches(Numbers(10), batch_size=2, seed=0, start=0, stop=10**9)
    assert len(list(itertools.islice(batches, 3))) == 3
    batches.close()
    for thread in prefetching_threads():
        thread.join(timeout=100)
    assert not prefetching_threads()
