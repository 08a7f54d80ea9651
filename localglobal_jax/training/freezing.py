# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters: which ones ``optim.freeze`` names, and trees without them.

A frozen parameter has no gradient, no moments in the optimizer, no weight decay, and does not
count in the gradient's norm. A BatchNorm whose scale and bias are frozen normalises by its running
statistics, in training too, and these stay as they are. Dropout and stochastic depth stay active.

A tree "without the frozen leaves" has None in their place: JAX then sees no leaf there.
"""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from localglobal_jax.operators.kernels.batch_norm import FROZEN_NORMS


def path_of(path: Any) -> str:
    """Returns a JAX path as text: ``"stage1/block1/norm/scale"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_frozen(path: str, patterns: Iterable[str]) -> bool:
    """Returns whether `path` is frozen: the last pattern that matches it decides, see `matches`."""
    found = False
    for pattern in patterns:
        if matches(path, pattern.removeprefix("!")):
            found = not pattern.startswith("!")
    return found


def matches(path: str, pattern: str) -> bool:
    """Returns whether `path`, or a part of it from its start, has the form of the glob `pattern`.

    ``"stage1"`` and ``"stage[12]/*norm"`` name modules, thereby all their parameters; ``*`` also
    matches "/". Upper and lower case differ.
    """
    names = path.split("/")
    starts = ("/".join(names[: i + 1]) for i in range(len(names)))
    return any(fnmatch.fnmatchcase(start, pattern.rstrip("/")) for start in starts)


def trained(params: PyTree, patterns: Sequence[str]) -> PyTree:
    """Returns `params` (arrays or shapes) with None in place of the frozen leaves.

    Raises ValueError for a pattern that matches nothing, and if all or no parameters are frozen.
    """
    if not patterns:
        return params
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(matches(path, pattern.removeprefix("!")) for path in paths):
            raise ValueError(
                f'optim.freeze={tuple(patterns)}: "{pattern}" matches no parameter. '
                f"{_near(pattern.removeprefix('!'), paths)} Patterns are globs, such as "
                '"stem", "stage[12]/*" and, after "*", "!head"'
            )
    frozen = [is_frozen(path, patterns) for path in paths]
    if all(frozen) or not any(frozen):
        raise ValueError(
            f"optim.freeze={tuple(patterns)} freezes {'every' if all(frozen) else 'no'} parameter: "
            'exempt some with "!", for instance ("*", "!head"). The parameters are below '
            f"{_modules(paths)}"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if is_frozen(path_of(path), patterns) else leaf, params
    )


def merged(some: PyTree, params: PyTree) -> PyTree:
    """Returns `some`, a tree of `trained`, with the frozen leaves of `params`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, some, params, is_leaf=lambda x: x is None
    )


def norm_marks(variables: Mapping[str, PyTree], patterns: Sequence[str]) -> dict[str, PyTree]:
    """Returns the collection `FROZEN_NORMS`: a scalar beside the statistics of each frozen norm.

    A norm is frozen if all its parameters are; without any, if all those of the module around it.
    {} if there are none.
    """
    if not patterns:
        return {}
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])]
    marks: dict[str, Any] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(variables.get("batch_stats", {})):
        module = path_of(path).split("/")[:-1]
        around = module
        while around and not any(matches(p, "/".join(around)) for p in paths):
            around = around[:-1]
        inside = [p for p in paths if not around or matches(p, "/".join(around))]
        if all(is_frozen(p, patterns) for p in inside):
            here = marks
            for name in module:
                here = here.setdefault(name, {})
            here["mark"] = jnp.zeros(())
    return {FROZEN_NORMS: marks} if marks else {}


def summary(params: PyTree, patterns: Sequence[str]) -> str:
    """Returns e.g. ``"12 of 345 parameters trained (10,250 of 1,234,567 numbers)"``."""
    some, every = jax.tree.leaves(trained(params, patterns)), jax.tree.leaves(params)
    sizes = [sum(leaf.size for leaf in leaves) for leaves in (some, every)]
    return f"{len(some)} of {len(every)} parameters trained ({sizes[0]:,} of {sizes[1]:,} numbers)"


def _near(pattern: str, paths: Sequence[str]) -> str:
    known = sorted({start for path in paths for start in _starts(path)})
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    near = near or [path for path in known if path.endswith(f"/{pattern}")][:3]
    if near:
        return f"Near it: {', '.join(near)}."
    return f"The parameters are below {_modules(paths)}."


def _starts(path: str) -> list[str]:
    names = path.split("/")
    return ["/".join(names[: i + 1]) for i in range(len(names))]


def _modules(paths: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(path.split("/")[0] for path in paths))
