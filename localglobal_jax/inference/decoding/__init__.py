# SPDX-License-Identifier: Apache-2.0
"""Decoding of models that predict the next token: beam search, greedy search, sampling.

Works with every module that has the methods of `hypotheses.Decodable`. Everything runs in one
``lax.while_loop`` on the device, which ends with the last sentence. It is compiled once per module,
shape of `source` and ``max_length``: choose both from a few buckets.

>>> module = lg.create_model(
...     "muse", layout="SS", depths=(1, 1), widths=(16, 16), heads=(2, 2), hidden=(16, 16)
... )
>>> source = np.ones((2, 6), np.int32)  # token ids
>>> variables = jax.eval_shape(module.init, jax.random.key(0), source, source)
>>> def translate(variables):
...     return lg.decoding.beam_search(module, variables, source, beam=4, max_length=8)
>>> found = jax.eval_shape(translate, variables)  # `translate(variables)` computes
>>> found.tokens.shape  # [b, beam, max_length + 1]
(2, 4, 9)
"""

from localglobal_jax.inference.decoding.beam import beam_search
from localglobal_jax.inference.decoding.ensemble import Ensemble
from localglobal_jax.inference.decoding.hypotheses import Decodable, Hypotheses, max_length
from localglobal_jax.inference.decoding.sampling import greedy, sample

__all__ = ["Decodable", "Ensemble", "Hypotheses", "beam_search", "greedy", "max_length", "sample"]
