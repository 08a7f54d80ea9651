# SPDX-License-Identifier: Apache-2.0
"""Compares each formulation that is chosen for GPUs with and without it: gpu_forms.csv.

    python experiments/benchmarks/gpu_forms.py       # compiles what is not there yet

A module with its gradient, at the size that it has in a model, compiled for one H100: by the
reference implementation, by the fused one without the formulation, and with it. The last rows try
the forms for CPU on the GPU, which are not chosen. Needs the extra [cuda], no GPU and no driver; a
quarter of a minute of a core each. The numbers are of the compiled program, without autotuning; no
GPU was measured.
"""

import dataclasses
import functools
import os
import pathlib

import plans

from localglobal_jax.profiling import compiler_process, gpu_kernels, hlo, topologies

os.environ["XLA_FLAGS"] = compiler_process.GPU_FLAGS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import modules

from localglobal_jax.blocks.convolution import MBConvBlock
from localglobal_jax.blocks.transformer import FocalAttentionBlock, RelativeAttentionBlock
from localglobal_jax.operators.convolution import DynamicConv
from localglobal_jax.operators.dense import wide_product
from localglobal_jax.operators.muse import MuseSequence

TABLE = pathlib.Path(__file__).parent / "gpu_forms.csv"
H100 = topologies.parse("h100-1")
HALF = "bfloat16"
SIDES = ("plain", "without", "with")


class Logits(nn.Module):
    """The logits of a vocabulary, and a loss."""

    @nn.compact
    def __call__(self, x, *, train):
        table = self.param("table", nn.initializers.normal(), (32_768, x.shape[-1]))
        return jax.nn.logsumexp(wide_product(x, table.astype(x.dtype)), -1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A formulation by the names of its functions, and a module that contains it.

    `of_cpu`: the formulation is that for CPU, and "without" is as chosen for GPUs.
    """

    name: str
    functions: tuple[str, ...]
    module: nn.Module
    shape: tuple[int, ...]
    mask: bool = False
    of_cpu: bool = False

    @property
    def forms(self):
        return {side: side for side in SIDES}


MUSE = MuseSequence(
    768, 16, 3072, attention_dropout=0.1, dropout=0.3, input_dropout=0.1, dtype=HALF
)
DYNAMIC = DynamicConv(768, 16, 15, dtype=HALF)
HALVING = MBConvBlock(features=96, stride=2, dtype=HALF)
ROWS = (
    Row(
        "attention with a bias by cuDNN",
        ("attend_cudnn",),
        RelativeAttentionBlock(384, dtype=HALF),
        (64, 14, 14, 384),
    ),
    Row(
        "attention in windows by cuDNN",
        ("attend_cudnn",),
        FocalAttentionBlock(96, dtype=HALF),
        (64, 56, 56, 96),
    ),
    Row(
        "weights signed by dropout",
        ("_weights_forward", "_weights_backward"),
        MUSE,
        (32, 256, 768),
        mask=True,
    ),
    Row("ReLU's gradient by its output", ("_relu",), MUSE, (32, 256, 768), mask=True),
    Row("gradient of logits in bfloat16", ("wide_product",), Logits(), (8192, 768)),
    Row("expanded product in bfloat16", ("activate_product",), HALVING, (64, 112, 112, 64)),
    Row(
        "norm and activation: gradient stored once",
        ("activate",),
        MBConvBlock(features=96, dtype=HALF),
        (64, 56, 56, 96),
    ),
    Row(
        "strided depthwise: gradient by slices",
        ("depthwise",),
        HALVING,
        (64, 112, 112, 64),
    ),
    Row(
        "not chosen: dynamic convolution as band matrices",
        ("dynamic",),
        DYNAMIC,
        (32, 256, 768),
        mask=True,
        of_cpu=True,
    ),
    Row(
        "not chosen: depthwise convolution as shifts",
        ("depthwise",),
        MBConvBlock(features=96, dtype=HALF),
        (64, 56, 56, 96),
        of_cpu=True,
    ),
)


def chosen(row, side, select):
    """Returns `lax.platform_dependent` with the forms for CUDA of a side of a row."""

    def dependent(*args, default, **forms):
        kind = "cpu" if row.of_cpu else "cuda"
        form = forms.get(kind)
        while isinstance(form, functools.partial):
            form = form.func
        if form is not None and form.__qualname__.split(".")[0] in row.functions:
            if row.of_cpu and side == "with":
                forms["cuda"] = forms["cpu"]
            elif not row.of_cpu and side == "without":
                del forms["cuda"]
        return select(*args, default=default, **forms)

    return dependent


def measure(row, side):
    """Returns the numbers of one line."""
    select = jax.lax.platform_dependent
    jax.lax.platform_dependent = chosen(row, side, select)
    implementation = "reference" if side == "plain" else "fused"
    try:
        compiled = modules.compiled(row.module, row.shape, H100, implementation, mask=row.mask)
    finally:
        jax.lax.platform_dependent = select
    kernels = gpu_kernels.kernels(hlo.Program(compiled.as_text()), H100.chip)
    rows = gpu_kernels.rows(kernels)
    return {
        "module": f"{type(row.module).__name__} {list(row.shape)}",
        "roofline_ms": round(sum(kind["roofline_ms"] for kind in rows), 4),
        "estimated_ms": round(sum(kind["estimated_ms"] for kind in rows), 4),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": sum(kind["count"] for kind in rows),
    }


if __name__ == "__main__":
    plans.make(TABLE, ROWS, measure, ("jax", "flax"), __doc__.splitlines()[0])
