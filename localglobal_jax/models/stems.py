# SPDX-License-Identifier: Apache-2.0
"""Stems: image to feature grid."""

import flax.linen as nn
from jaxtyping import Array, Float

from localglobal_jax.blocks.layers import Activation, Norm, make_norm, norm_activation


class ConvStem(nn.Module):
    """Two 3x3 convolutions, the first with the stride; norm and activation only between them.

    CoAtNet's S0 (table 3). Padding is 1 on both sides, as in the references.
    """

    widths: tuple[int, ...]
    stride: int = 2
    activation: Activation = "gelu"
    use_bias: bool = False
    norm: Norm = "batch"
    norm_eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b i j d"]:
        for i, (width, stride) in enumerate(zip(self.widths, (self.stride, 1), strict=True)):
            if i:
                x = norm_activation(
                    x,
                    kind=self.norm,
                    activation=self.activation,
                    eps=self.norm_eps,
                    train=train,
                    dtype=self.dtype,
                    name="norm",
                )
            x = nn.Conv(
                width,
                (3, 3),
                (stride, stride),
                padding=((1, 1), (1, 1)),
                use_bias=self.use_bias,
                dtype=self.dtype,
                name=f"conv{i + 1}",
            )(x)
        return x


class PatchStem(nn.Module):
    """Non-overlapping patches, projected (arXiv 2010.11929): ViT's stem."""

    width: int
    patch: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b i j d"]:
        size = (self.patch, self.patch)
        conv = nn.Conv(self.width, size, size, padding="VALID", dtype=self.dtype, name="project")
        return conv(x)


class ConvPatchStem(nn.Module):
    """Three convolutions at half resolution, then non-overlapping patches (VOLO, section 3.4).

    7x7 with stride 2 and two 3x3, each with BatchNorm and ReLU and padded on both sides as the
    authors pad; then a convolution that makes one token of `patch` x `patch` pixels. What does
    not fill a patch is dropped.
    """

    hidden: int
    width: int
    patch: int = 8
    norm_eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b i j d"]:
        for i, (window, stride) in enumerate(((7, 2), (3, 1), (3, 1)), start=1):
            x = nn.Conv(
                self.hidden,
                (window, window),
                (stride, stride),
                padding=window // 2,
                use_bias=False,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = norm_activation(
                x,
                kind="batch",
                activation="relu",
                eps=self.norm_eps,
                train=train,
                dtype=self.dtype,
                name=f"norm{i}",
            )
        patch = (self.patch // 2, self.patch // 2)
        return nn.Conv(self.width, patch, patch, padding="VALID", dtype=self.dtype, name="project")(
            x
        )


def patch_grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Returns the grid of `ConvPatchStem` for images of `size` (height, width)."""
    if patch < 2 or patch % 2:
        raise ValueError(f"patch={patch}: give an even number; the stem's stride is 2")
    height, width = ((n + 1) // 2 // (patch // 2) for n in size)
    return height, width


class PatchEmbed(nn.Module):
    """A strided convolution with bias, and a LayerNorm of its output: Swin's and Focal's embedding.

    Attributes:
      kernel, stride, padding: of the convolution, the same in both directions.
      norm: whether the output is normed. `pre_norm`: whether the input is, over all of an example
        (GroupNorm of one group).
    """

    features: int
    kernel: int
    stride: int
    padding: int = 0
    norm: bool = True
    pre_norm: bool = False
    norm_eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b i j d"]:
        if self.pre_norm:
            x = nn.GroupNorm(1, epsilon=self.norm_eps, dtype=self.dtype, name="pre_norm")(x)
        x = nn.Conv(
            self.features,
            (self.kernel,) * 2,
            (self.stride,) * 2,
            padding=((self.padding, self.padding),) * 2,
            dtype=self.dtype,
            name="conv",
        )(x)
        if self.norm:
            x = make_norm("layer", eps=self.norm_eps, train=train, dtype=self.dtype, name="norm")(x)
        return x
