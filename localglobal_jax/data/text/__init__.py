# SPDX-License-Identifier: Apache-2.0
"""Text input: files, sentence pairs, tokenizers, length buckets, batches."""

from typing import TYPE_CHECKING

from localglobal_jax.config import renamed

if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
