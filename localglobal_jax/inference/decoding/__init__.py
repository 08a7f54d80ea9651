# SPDX-License-Identifier: Apache-2.0
"""From a model that predicts the next token to whole sentences: beam search, greedy, sampling.

Blind to models: `hypotheses.Decodable` says what a module needs. Everything runs in one
``lax.while_loop`` on the device, which ends when the last sentence has ended. It is compiled once
per module, shape of `source` and ``max_length``: give both from a few buckets.
"""

from localglobal_jax.inference.decoding.beam import beam_search
from localglobal_jax.inference.decoding.hypotheses import Decodable, Hypotheses, max_length
from localglobal_jax.inference.decoding.sampling import greedy, sample

__all__ = ["Decodable", "Hypotheses", "beam_search", "greedy", "max_length", "sample"]
