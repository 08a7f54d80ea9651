# SPDX-License-Identifier: Apache-2.0
"""Consecutive blocks in one of three forms, which `placement.Partitioner` selects.

Unrolled; with `remat` (a block's activations are computed again in the backward pass, so that only
its input is kept, arXiv 1604.06174); with `scan` (equal blocks in a row are compiled once). The
parameter tree is the same in all of them, so checkpoints are, too.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from localglobal_jax.parallel import context

Call = Callable[[nn.Module, Array, Any], Array]
MAY_DIFFER = ("parent", "name", "drop_path")  # may differ between equal blocks


def apply_blocks(
    parent: nn.Module, blocks: Sequence[nn.Module], x: Array, call: Call, inputs: Sequence[Any]
) -> list[Array]:
    """Returns the output of every block: ``call(block, x, inputs[i])``.

    `blocks` are submodules of `parent`.
    """
    outputs: list[Array] = []
    options = context.stack_options()
    if not options.scan or parent.is_initializing():
        runs = [[i] for i in range(len(blocks))]
    else:
        keys = [_kind(parent, block) for block in blocks]
        runs = [list(run) for _, run in groupby(range(len(blocks)), key=keys.__getitem__)]
    for run in runs:
        extras = [inputs[i] for i in run]
        if len(run) == 1:
            step = _edged(call)
            step = _gathered(step, options.gather) if options.gather else step
            step = nn.remat(step) if options.remat else step
            outputs.append(step(blocks[run[0]], x, extras[0]))
        else:
            outputs += _scan(parent, [blocks[i] for i in run], x, call, extras, options=options)
        x = outputs[-1]
    return outputs


def _edged(call: Call) -> Call:
    def edged(block: nn.Module, x: Array, extra: Any) -> Array:
        return context.constrain(call(block, context.constrain(x), extra))

    return edged


def _gathered(call: Call, gather: Callable[[PyTree], PyTree]) -> Call:
    return nn.map_variables(call, "params", gather)


def _kind(parent: nn.Module, block: nn.Module) -> tuple[Any, ...]:
    """Returns a key that is equal for blocks that differ only in weights and drop rates."""
    fields = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
    shapes = jax.tree.map(jnp.shape, _variables(parent, block))
    return type(block), {k: v for k, v in fields.items() if k not in MAY_DIFFER}, shapes


def _variables(parent: nn.Module, block: nn.Module) -> dict[str, PyTree]:
    name = _name(block)
    return {kind: tree[name] for kind, tree in parent.variables.items() if name in tree}


def _name(block: nn.Module) -> str:
    assert block.name is not None, "blocks in sequence are named submodules"
    return block.name


def _scan(
    parent: nn.Module,
    blocks: Sequence[nn.Module],
    x: Array,
    call: Call,
    inputs: Sequence[Any],
    *,
    options: context.StackOptions,
) -> list[Array]:
    """Applies equal blocks as one loop over their stacked variables."""

    def stack(trees: Sequence[PyTree]) -> PyTree:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    first, count = blocks[0], len(blocks)
    shown = re.sub(r"\d+$", "*", _name(first))  # the name of the loop in profiles: block*
    variables = stack([_variables(parent, block) for block in blocks])
    changing = [kind for kind in variables if parent.is_mutable_collection(kind)]
    rates = [getattr(block, "drop_path", 0.0) for block in blocks]
    keys = (
        jax.random.split(parent.make_rng("dropout"), count) if parent.has_rng("dropout") else None
    )

    def body(x: Array, each: tuple[PyTree, Array, Any, Any]) -> tuple[Array, Any]:
        variables, rate, extra, key = each
        if options.gather:
            variables = {**variables, **options.gather({"params": variables["params"]})}
        changes: dict[str, Any] = {"drop_path": rate} if any(rates) else {}
        block = first.clone(parent=None, name=shown, **changes)
        rngs = {} if key is None else {"dropout": key}
        y, new = block.apply(variables, x, extra, method=_edged(call), mutable=changing, rngs=rngs)
        return y, (y, new)

    step = jax.checkpoint(body, prevent_cse=False) if options.remat else body
    xs = (variables, jnp.asarray(rates, jnp.float32), stack(inputs), keys)
    _, (outputs, changed) = jax.lax.scan(step, x, xs)
    for i, block in enumerate(blocks):
        for kind, tree in jax.tree.map(operator.itemgetter(i), changed).items():
            parent.put_variable(kind, _name(block), tree)
    return [outputs[i] for i in range(count)]
