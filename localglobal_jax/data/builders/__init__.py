# SPDX-License-Identifier: Apache-2.0
"""TFDS builders of our own: each writes a data set that plain `tfds.data_source` then reads.

`digits` is embedded: its images ship inside scikit-learn, so it can be prepared anywhere, without
asking. `fashion_mnist` keeps its standard TFDS name and version; only where its bytes come from
differs.
"""

import tensorflow_datasets as tfds

from localglobal_jax.data.builders.digits import Digits
from localglobal_jax.data.builders.fashion_mnist import FashionMNIST

BUILDERS: dict[str, type[tfds.core.DatasetBuilder]] = {
    "digits": Digits,
    "fashion_mnist": FashionMNIST,
}
EMBEDDED = ("digits",)  # small, local and free: training may prepare these by itself
