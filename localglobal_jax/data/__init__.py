# SPDX-License-Identifier: Apache-2.0
"""Input data: images, text, TFDS data sets, and the loader that orders their batches.

>>> from localglobal_jax.data.text import bucketing
>>> bucketing.round_up(np.array([3, 20])).tolist()  # lengths of sentences
[8, 24]
"""

from typing import TYPE_CHECKING

from localglobal_jax.config import renamed

if TYPE_CHECKING:
    from localglobal_jax.data import images, loader, text, tfds

__all__ = ["images", "loader", "text", "tfds"]

if not TYPE_CHECKING:  # submodules, imported when first used, and names that moved from here
    __getattr__ = renamed.attributes(__name__)
