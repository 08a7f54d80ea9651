# SPDX-License-Identifier: Apache-2.0
"""Focal self-attention: near keys one by one, far keys as pooled summaries (arXiv 2107.00641).

A query attends to its own window, to the neighbours of that window, and per further level to a
region of pooled windows around it; everything is one softmax. It computes what the authors'
published code does, not an idealisation of it:

- Neighbours come in four groups, each the map rolled towards a corner by `expand`. The groups
  overlap, so some neighbours are keys twice, each time with a bias of its own, and count twice.
- Rolling wraps around: a window at the edge has neighbours from the opposite edge.
- A grid that is no multiple of the window is padded with zeros, whose keys are not masked.
- Pooled windows outside the map have zero keys and values and a bias of -100.

Legend: b batch, h w grid, i j windows, l queries of a window, m keys, n heads, c head width.
"""

from typing import Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from localglobal_jax.operators import focal_windows as windows
from localglobal_jax.operators import grids
from localglobal_jax.operators.attention import attend
from localglobal_jax.operators.dense import Dense, DenseGeneral
from localglobal_jax.operators.reach import Reach

PoolMethod = Literal["fc", "conv", "mean", "max"]

# ---------------------------------------------------------------------------- functions


def attend_windows(
    query: Float[Array, "b i j l n c"],
    key: Float[Array, "b i j m n c"],
    value: Float[Array, "b i j m n c"],
    bias: Float[Array, "#i #j n l m"],
    mask: Float[np.ndarray, "i j 1 #l m"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "b i j l n c"]:
    """Softmax attention inside each window, in float32 at least.

    `bias` and `mask` are added to the logits after `scale`, by default 1 / sqrt(c).
    """
    if scale:
        query = query * (scale * query.shape[-1] ** 0.5)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    bias = bias.astype(wide) + (0.0 if mask is None else mask)
    return attend(query, key, value, bias=bias)


# ---------------------------------------------------------------------------- modules


class WindowPool(nn.Module):
    """Pools each window to one vector: "fc" weighs its positions, alike for all channels.

    "conv" weighs per channel; "mean" and "max" have no parameters.
    """

    method: PoolMethod = "fc"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b i j y x d"]) -> Float[Array, "b i j d"]:
        if self.method == "mean":
            return x.mean((3, 4))
        if self.method == "max":
            return x.max((3, 4))
        if self.method not in get_args(PoolMethod):
            raise ValueError(f"focal pool {self.method!r}: allowed are {get_args(PoolMethod)}")
        per_channel = (x.shape[-1],) if self.method == "conv" else ()
        kernel = self.param("kernel", nn.initializers.normal(0.02), (*x.shape[3:5], *per_channel))
        bias = self.param("bias", nn.initializers.zeros, per_channel)
        weights = "yxd" if per_channel else "yx"
        y = jnp.einsum(f"bijyxd,{weights}->bijd", x, kernel.astype(self.dtype))
        return y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)


class FocalAttention(nn.Module):
    """Focal self-attention over a grid of any size, padded to multiples of the window.

    Attributes:
      features: output width; None: that of the input.
      heads: number of heads. `width`: inner width of all together; None: `features`.
      window: side of a window. `expand`: how far its neighbours reach; 0: no neighbours.
      levels: 1 is the fine level alone; each further one pools windows of half the size.
      focal_window: pooled windows seen at level 1, per side; odd.
      shift: cyclic shift of the windows (Swin); 0: none.
      pool: "fc" (the paper), "conv", "mean" or "max".
      qkv_bias: of the query, key and value projection.
      scale: of the logits; None: 1 / sqrt(head width).
      dtype: of the computation; parameters are float32.
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    window: int = 7
    expand: int = 3
    levels: int = 2
    focal_window: int = 3
    shift: int = 0
    pool: PoolMethod = "fc"
    qkv_bias: bool = True
    scale: float | None = None
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return Reach(
            windows.radius(self.window, self.expand, self.levels, self.focal_window), windows=True
        )

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h w e"]:
        windows.check(self.window, self.expand, self.levels, self.focal_window, self.shift)
        features = self.features or x.shape[-1]
        width = self.width or features
        if width % self.heads:
            raise ValueError(f"focal: width {width} is not divisible by {self.heads} heads")
        head, area = (self.heads, width // self.heads), self.window**2
        space = x.shape[1:3]
        qkv = DenseGeneral(
            (3, *head),
            use_bias=self.qkv_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name="qkv",
        )

        x = jnp.roll(grids.pad_to_multiple(x, self.window), (-self.shift,) * 2, (1, 2))
        fine = qkv(x).reshape(*x.shape[:3], 3 * width)
        own = grids.window_partition(fine, self.window)
        own = own.reshape(*own.shape[:3], area, 3 * width)
        keys = [own[..., width:]]
        if self.expand:
            keys.append(windows.neighbours(fine[..., width:], self.window, self.expand))
        for level in range(1, self.levels):
            pool = WindowPool(self.pool, self.dtype, name=f"pool{level}")
            cells = pool(windows.coarse_windows(x, self.window, level))
            # The same projection as the fine level's; its queries are not needed.
            cells = qkv(cells).reshape(*cells.shape[:3], 3 * width)[..., width:]
            keys.append(windows.surroundings(cells, self.focal_window, level))

        joined = jnp.concatenate(keys, 3)
        y = attend_windows(
            own[..., :width].reshape(*own.shape[:4], *head),
            joined[..., :width].reshape(*joined.shape[:4], *head),
            joined[..., width:].reshape(*joined.shape[:4], *head),
            self._bias()[None, None],
            windows.key_mask(
                (own.shape[1], own.shape[2]),
                self.window,
                self.expand,
                self.levels,
                focal_window=self.focal_window,
                shift=self.shift,
            ),
            scale=self.scale,
        )
        y = y.reshape(*y.shape[:3], self.window, self.window, width)
        y = jnp.roll(grids.window_merge(y), (self.shift,) * 2, (1, 2))
        return Dense(
            features,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name="output",
        )(y[:, : space[0], : space[1]])

    def _bias(self) -> Float[Array, "n l m"]:
        """Of the keys in their order: own window, neighbours, then every pooled level."""
        window, heads, normal = self.window, self.heads, nn.initializers.normal(0.02)
        side = 2 * window - 1
        table = self.param("window_bias", nn.initializers.zeros, (side, side, heads))
        biases = [windows.displacement_bias(table, window, window)]
        if self.expand:
            count = 4 * window**2 - 4 * (window - self.expand) ** 2
            biases.append(self.param("neighbour_bias", normal, (heads, window**2, count)))
        for level in range(1, self.levels):
            size = self.focal_window + (1 << (level - 1)) - 1
            side = window + size - 1
            table = self.param(f"pooled{level}_bias", normal, (side, side, heads))
            biases.append(windows.displacement_bias(table, window, size))
        return jnp.concatenate(biases, -1)
