# SPDX-License-Identifier: Apache-2.0
"""Compares formulations of CoAtNet-0's MBConv blocks by the TPU compiler's account: tpu_forms.csv.

    python experiments/benchmarks/tpu_forms.py       # compiles what is not there yet

A block with its gradient, 64 images, bfloat16, compiled for one chip of a v5e. Needs the extra
[tpu], no TPU; about a minute of a core a line. It continues where it was stopped; delete a line to
make it again. The formulations are in tpu_forms_mbconv.py.
"""

import dataclasses
import os
import pathlib
from typing import Any

import plans

from localglobal_jax.profiling import compiler_process, hlo, topologies

os.environ.update(compiler_process.LIBTPU)
os.environ["JAX_PLATFORMS"] = "cpu"

import modules
from tpu_forms_mbconv import Form, Rows, Tiles, keeping

from localglobal_jax.blocks.convolution import MBConvBlock

TABLE = pathlib.Path(__file__).parent / "tpu_forms.csv"
V5E = topologies.parse("v5e:1x1")
KEEPING = {  # formulation -> the arrays that it keeps
    "kept: e, y": ("e", "y"),
    "kept: y, a": ("y", "a"),
    "kept: z, y": ("z", "y"),
    "kept: y": ("y",),
    "kept: z, y, a": ("z", "y", "a"),
    "kept: e": ("e",),
    "kept: none": (),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A block, the shape of its input, and its formulations."""

    name: str
    block: MBConvBlock
    shape: tuple[int, ...]
    tiles: dict[str, Any]
    kept: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def forms(self) -> dict[str, Any]:
        """The module and the implementation of each formulation."""
        tiles = {
            name: (Form(self.block, tile, apart=isinstance(tile, Rows)), "fused")
            for name, tile in self.tiles.items()
        }
        kept = {name: (Form(self.block, keeping(*k)), "fused") for name, k in self.kept.items()}
        return {
            "tuned": (self.block, "fused"),
            "plain": (self.block, "reference"),
            **tiles,
            **kept,
        }


ROWS = (
    Row(
        "first block of stage 1",
        MBConvBlock(features=96, stride=2, dtype="bfloat16"),
        (64, 112, 112, 64),
        {
            "tiles of 7 rows: e": Rows(7, 128),
            "tiles of 8 examples: e": Tiles(8, 128),
            "tiles of 8 examples: e and a": Tiles(8, 128, second=True),
        },
        KEEPING,
    ),
    Row(
        "second block of stage 1",
        MBConvBlock(features=96, dtype="bfloat16"),
        (64, 56, 56, 96),
        {
            "tiles of 28 rows: e": Rows(28, 128),
            "tiles of 8 examples: e": Tiles(8, 384),
            "tiles of 8 examples: e and a": Tiles(8, 384, second=True),
        },
    ),
    Row(
        "first block of stage 2",
        MBConvBlock(features=192, stride=2, dtype="bfloat16"),
        (64, 56, 56, 96),
        {
            "tiles of 14 rows: e": Rows(14, 128),
            "tiles of 8 examples: e": Tiles(8, 384),
            "tiles of 8 examples: e and a": Tiles(8, 384, second=True),
        },
    ),
)


def measure(row, form):
    """Returns the numbers of one line."""
    module, implementation = form
    compiled = modules.compiled(module, row.shape, V5E, implementation)
    traffic = list(hlo.Program(compiled.as_text()).traffic())
    return {
        "module": f"{type(row.block).__name__} {list(row.shape)}",
        "cycles": sum(i.cycles * runs for i, _, runs in traffic),
        "bytes": sum(size * runs for _, size, runs in traffic),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    plans.make(TABLE, ROWS, measure, ("jax", "libtpu", "flax"), __doc__.splitlines()[0])
