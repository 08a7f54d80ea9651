# SPDX-License-Identifier: Apache-2.0
"""TFDS builders of our own: each writes a data set that plain `tfds.data_source` then reads.

`digits` is embedded: its images ship inside scikit-learn, so it can be prepared anywhere, without
asking. `fashion_mnist` keeps its standard TFDS name and version; only where its bytes come from
differs. `lohelp_translate` is parallel text out of Debian's packages.
"""

import tensorflow_datasets as tfds

from localglobal_jax.data.tfds.builders import debian, fashion_mnist, lohelp
from localglobal_jax.data.tfds.builders.digits import Digits
from localglobal_jax.data.tfds.builders.fashion_mnist import FashionMNIST
from localglobal_jax.data.tfds.builders.lohelp import LohelpTranslate

BUILDERS: dict[str, type[tfds.core.DatasetBuilder]] = {
    "digits": Digits,
    "fashion_mnist": FashionMNIST,
    "lohelp_translate": LohelpTranslate,
}
EMBEDDED = ("digits",)  # small, local and free: training may prepare these by itself

# Those that take ``source=``, a directory of raw files, which Debian's packages hold
RAW_FILES = {
    "fashion_mnist": debian.Files(
        fashion_mnist.packages, fashion_mnist.INSTALLED, fashion_mnist.locate
    ),
    "lohelp_translate": debian.Files(lohelp.packages, lohelp.INSTALLED, lohelp.locate),
}
