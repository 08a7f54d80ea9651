# SPDX-License-Identifier: Apache-2.0
"""The vocabulary. Every operator maps ``[b, *space, d] -> [b, *space, d]`` and declares its reach.

| operator                        | file             | letter | reach  | weights          |
|---------------------------------|------------------|--------|--------|------------------|
| depthwise convolution           | convolution.py   | C      | LOCAL  | static           |
| content-adaptive convolution    | adaptive.py      | A      | LOCAL  | from the content |
| outlook attention               | outlook.py       | O      | LOCAL  | from the content |
| attention, relative bias        | attention.py     | T      | GLOBAL | from the content |
| attention, plain                | attention.py     | S      | GLOBAL | from the content |
| translation-equivariant         | adaptive.py      | E      | GLOBAL | from the content |
| attention + convolution + FFN   | muse.py          | M      | GLOBAL | from the content |
| focal attention                 | focal.py         | F      | BOTH   | from the content |
| focal attention, nearest keys   | focal_nearest.py | F      | BOTH   | from the content |

Over sequences, with masks, causal or not, and one step at a time with a cache (`cache.py`):

| operator                        | file           | letter | reach  |
|---------------------------------|----------------|--------|--------|
| attention + convolution + FFN   | muse.py        | M      | GLOBAL |
| attention, relative bias or not | attention.py   | T, S   | GLOBAL |
| attention to another sequence   | attention.py   |        | GLOBAL |
| gated dynamic convolution       | convolution.py | D      | LOCAL  |
| content-adaptive convolution    | adaptive.py    | A      | LOCAL  |
| translation-equivariant         | adaptive.py    | E      | GLOBAL |

Each file has pure functions first (the mathematics), then modules (the parameters).
"""

from localglobal_jax.operators import (
    activations,
    adaptive,
    attention,
    cache,
    convolution,
    dense,
    focal,
    focal_nearest,
    grids,
    muse,
    outlook,
    reach,
)

__all__ = [
    "activations",
    "adaptive",
    "attention",
    "cache",
    "convolution",
    "dense",
    "focal",
    "focal_nearest",
    "grids",
    "muse",
    "outlook",
    "reach",
]
