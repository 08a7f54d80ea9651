# SPDX-License-Identifier: Apache-2.0
import numpy as np
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from localglobal_jax.data.tfds.builders.digits import split_indices


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(0, 9)))
def test_split_is_stratified_and_complete(labels):
    train, test = split_indices(labels)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    assert len(test) == -(-len(labels) // 5)
    for label in range(10):
        share = np.sum(labels == label) / 5
        assert abs(np.sum(labels[test] == label) - share) < 1


def test_the_split_is_pinned():
    """Part of the version of the data set: other numbers here need another version there."""
    from sklearn.datasets import load_digits

    _, test = split_indices(load_digits().target)
    assert len(test) == 360
    assert test[:8].tolist() == [8, 16, 29, 39, 42, 47, 55, 56]


def test_plain_tfds_reads_it(data_dir):
    source = tfds.data_source("digits", split="test", data_dir=data_dir)
    assert len(source) == 360
    assert source[0]["image"].shape == (8, 8, 1) and source[0]["image"].dtype == np.uint8
    assert max(source[i]["image"].max() for i in range(50)) == 255
