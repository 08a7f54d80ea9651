# SPDX-License-Identifier: Apache-2.0
# Shows `localglobal_jax.decoding` to type checkers; the importer of config/renamed.py resolves it.
from localglobal_jax.inference.decoding import *  # noqa: F403
from localglobal_jax.inference.decoding import __all__ as __all__
from localglobal_jax.inference.decoding import beam as beam
from localglobal_jax.inference.decoding import hypotheses as hypotheses
from localglobal_jax.inference.decoding import sampling as sampling
