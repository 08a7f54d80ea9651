# SPDX-License-Identifier: Apache-2.0
"""Ensembles: several models that decode as one, by the mean of their log probabilities."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from localglobal_jax.inference.decoding.hypotheses import prepared


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A `Decodable` of several: the score of a token is the mean of its log probabilities.

    So the score of a sentence is the mean of the members' scores (the logarithm of a geometric
    mean of probabilities; fairseq takes the arithmetic mean at every step). The members may differ
    in everything but their vocabularies. The variables of an ensemble are a tuple of the members'.

    Raises ValueError for no members, or members of other vocabularies or special tokens.

    >>> module = lg.create_model(
    ...     "muse", layout="SS", depths=(1, 1), widths=(16, 16), heads=(2, 2), hidden=(16, 16)
    ... )
    >>> source = np.ones((2, 6), np.int32)  # token ids
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), source, source)
    >>> both = lg.decoding.Ensemble((module, module))
    >>> def search(variables):
    ...     return lg.decoding.greedy(both, (variables, variables), source, max_length=8)
    >>> jax.eval_shape(search, variables).scores.shape
    (2, 1)
    """

    members: Sequence[Any]  # modules, see `Decodable`
    log_probabilities: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))  # hashable, from a list too
        fields = ("source_vocab", "target_vocab", "pad", "start", "end")
        kinds = [tuple(getattr(member, name, None) for name in fields) for member in self.members]
        if len(set(kinds)) != 1:
            shown = "; ".join(
                ", ".join(f"{name}={value}" for name, value in zip(fields, kind, strict=True))
                for kind in kinds
            )
            raise ValueError(
                f"an ensemble of {len(kinds)} models with {shown or 'nothing'}: give models of the "
                "same vocabularies and special tokens"
            )

    @property
    def source_vocab(self) -> int:
        return self.members[0].source_vocab

    @property
    def target_vocab(self) -> int:
        return self.members[0].target_vocab

    @property
    def pad(self) -> int:
        return self.members[0].pad

    @property
    def start(self) -> int:
        return self.members[0].start

    @property
    def end(self) -> int:
        return self.members[0].end

    def narrowed(self, variables: Any) -> Any:
        """Returns the variables for ``step``, see `Decodable`."""
        return tuple(prepared(*pair) for pair in self._pairs(variables))

    def apply(self, variables: Any, *args: Any, method: str) -> Any:
        """Calls ``init_cache`` or ``step`` of every member, see `Decodable`."""
        pairs = self._pairs(variables)
        if method == "init_cache":
            return _transposed(member.apply(own, *args, method=method) for member, own in pairs)
        token, memory, cache = args
        logits, caches = _transposed(
            member.apply(own, token, *theirs, method=method)
            for (member, own), *theirs in zip(pairs, memory, cache, strict=True)
        )
        return _mean(self.members, logits), caches

    def _pairs(self, variables: Any) -> list[tuple[Any, Any]]:
        if len(variables) != len(self.members):
            raise ValueError(
                f"variables of {len(variables)} models for an ensemble of {len(self.members)}: "
                "give one for each, in their order"
            )
        return list(zip(self.members, variables, strict=True))


def _transposed(pairs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    first, second = zip(*pairs, strict=True)
    return first, second


def _mean(members: Sequence[Any], logits: tuple[Float[Array, "r v"], ...]) -> Float[Array, "r v"]:
    log_p = [
        x if getattr(member, "log_probabilities", False) else jax.nn.log_softmax(x)
        for member, x in zip(members, (x.astype(jnp.float32) for x in logits), strict=True)
    ]
    return sum(log_p[1:], log_p[0]) / len(log_p)
