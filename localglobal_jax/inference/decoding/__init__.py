# SPDX-License-Identifier: Apache-2.0
"""Decoding of models that predict the next token: beam search, greedy search, sampling.

Works with every module that has the methods of `hypotheses.Decodable`. Everything runs in one
``lax.while_loop`` on the device, which ends with the last sentence. It is compiled once per module,
shape of `source` and ``max_length``: choose both from a few buckets.
"""

from localglobal_jax.inference.decoding.beam import beam_search
from localglobal_jax.inference.decoding.ensemble import Ensemble
from localglobal_jax.inference.decoding.hypotheses import Decodable, Hypotheses, max_length
from localglobal_jax.inference.decoding.sampling import greedy, sample

__all__ = ["Decodable", "Ensemble", "Hypotheses", "beam_search", "greedy", "max_length", "sample"]
