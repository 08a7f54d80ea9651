# SPDX-License-Identifier: Apache-2.0
"""Operators. Each maps ``[b, *space, d] -> [b, *space, d]`` and declares its reach.

Over grids ``[b, h, w, d]``; "weights": static, or dependent on the input:

| operator                        | class                   | letter | reach  | weights |
|---------------------------------|-------------------------|--------|--------|---------|
| depthwise convolution           | `DepthwiseConv`         | C, N   | LOCAL  | static  |
| content-adaptive convolution    | `AdaptiveConv`          | A      | LOCAL  | input   |
| outlook attention               | `Outlook`               | O      | LOCAL  | input   |
| attention, relative bias        | `RelativeAttention`     | T      | GLOBAL | input   |
| attention, ``bias="none"``      | `RelativeAttention`     | S      | GLOBAL | input   |
| translation-equivariant         | `EquivariantAttention`  | E      | GLOBAL | input   |
| attention + convolution + FFN   | `Muse`                  | M      | GLOBAL | input   |
| focal attention                 | `FocalAttention`        | F      | BOTH   | input   |
| focal attention, nearest keys   | `NearestFocalAttention` | F      | BOTH   | input   |

Over sequences ``[b, l, d]``, with masks, causal or not, and one step at a time with a cache
(`operators.cache`):

| operator                        | class                 | letter | reach  |
|---------------------------------|-----------------------|--------|--------|
| attention + convolution + FFN   | `MuseSequence`        | M      | GLOBAL |
| attention, relative bias or not | `SelfAttention`       | T, S   | GLOBAL |
| attention to another sequence   | `CrossAttention`      |        | GLOBAL |
| gated dynamic convolution       | `DynamicConv`         | D      | LOCAL  |
| content-adaptive convolution    | `AdaptiveConv`        | A      | LOCAL  |
| translation-equivariant         | `EquivariantSequence` | E      | GLOBAL |

Each file has pure functions first (the equations), then modules (the parameters). Names are
exported flat, as in ``operators.Outlook``; the submodules hold the rest, such as
``operators.outlook.outlook``. `operators.kernels` holds the fused implementations, see
`parallel.context.implementation`.

>>> x = jnp.ones((2, 8, 8, 16))
>>> module = lg.operators.Outlook(features=32, heads=4)
>>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
>>> y.shape, sorted(variables["params"])
((2, 8, 8, 32), ['output', 'value', 'weights'])
>>> module = lg.operators.Muse(features=32, heads=4)
>>> module.reach == lg.operators.GLOBAL
True
>>> sorted(lg.operators.ACTIVATIONS)
['gelu', 'gelu_tanh', 'none', 'relu', 'silu', 'tanh']

`Dense` and `DenseGeneral` are flax's, with products that suit the device:

>>> sum_of_heads = lg.operators.DenseGeneral(32, axis=(-2, -1))
>>> jax.eval_shape(sum_of_heads.init_with_output, jax.random.key(0), jnp.ones((2, 4, 8)))[0].shape
(2, 32)
>>> lg.operators.Dense(32).features
32
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
    kernels,
    muse,
    outlook,
    reach,
)
from localglobal_jax.operators.activations import ACTIVATIONS, gelu
from localglobal_jax.operators.adaptive import (
    AdaptiveConv,
    EquivariantAttention,
    EquivariantSequence,
    adaptive_convolution,
    adaptive_kernel,
    cyclic_bias,
    ring_displacements,
)
from localglobal_jax.operators.attention import (
    CrossAttention,
    DistanceBias,
    RelativeAttention,
    RelativeBiasMLP,
    RelativeBiasTable,
    SelfAttention,
    attend,
    attention_weights,
    relative_bias,
    relative_positions,
)
from localglobal_jax.operators.convolution import (
    DepthwiseConv,
    DynamicConv,
    SharedValueConv,
    depthwise,
    dynamic,
)
from localglobal_jax.operators.dense import Dense, DenseGeneral
from localglobal_jax.operators.focal import FocalAttention, WindowPool, attend_windows
from localglobal_jax.operators.focal_nearest import NearestFocalAttention, nearest
from localglobal_jax.operators.grids import (
    grid_to_sequence,
    pad_to_multiple,
    sequence_to_grid,
    window_merge,
    window_partition,
)
from localglobal_jax.operators.muse import Muse, MuseSequence
from localglobal_jax.operators.outlook import Outlook, fold, unfold
from localglobal_jax.operators.reach import GLOBAL, Reach, local

__all__ = [
    "ACTIVATIONS",
    "GLOBAL",
    "AdaptiveConv",
    "CrossAttention",
    "Dense",
    "DenseGeneral",
    "DepthwiseConv",
    "DistanceBias",
    "DynamicConv",
    "EquivariantAttention",
    "EquivariantSequence",
    "FocalAttention",
    "Muse",
    "MuseSequence",
    "NearestFocalAttention",
    "Outlook",
    "Reach",
    "RelativeAttention",
    "RelativeBiasMLP",
    "RelativeBiasTable",
    "SelfAttention",
    "SharedValueConv",
    "WindowPool",
    "activations",
    "adaptive",
    "adaptive_convolution",
    "adaptive_kernel",
    "attend",
    "attend_windows",
    "attention",
    "attention_weights",
    "cache",
    "convolution",
    "cyclic_bias",
    "dense",
    "depthwise",
    "dynamic",
    "focal",
    "focal_nearest",
    "fold",
    "gelu",
    "grid_to_sequence",
    "grids",
    "kernels",
    "local",
    "muse",
    "nearest",
    "outlook",
    "pad_to_multiple",
    "reach",
    "relative_bias",
    "relative_positions",
    "ring_displacements",
    "sequence_to_grid",
    "unfold",
    "window_merge",
    "window_partition",
]
