# SPDX-License-Identifier: Apache-2.0
"""Measures the kernels of the content-adaptive convolutions of trained CCAA runs.

    python -m experiments.beyond.measure_kernels runs/beyond/final

Writes kernels.csv (a row for each run and block, over 1,000 test images), and of the first run, for
an image of each of some classes, pictures.csv (its pixels) and picture_kernels.csv (the kernel of
every position, mean over the heads).
"""

import csv
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import localglobal_jax as lg
from localglobal_jax.data import loader
from localglobal_jax.data.images import device_ops, pipeline
from localglobal_jax.inference import load
from localglobal_jax.launch import status
from localglobal_jax.operators import adaptive

HERE = pathlib.Path(__file__).parent
LAYOUT = "CCAA"
IMAGES = 1000
CLASSES = (1, 3, 5, 8, 9)  # trousers, dress, sandal, bag, ankle boot
DIGITS = 4


def kernels(module: Any, variables: Any, image: jax.Array) -> dict[str, jax.Array]:
    """Returns the kernels of every content-adaptive convolution: {block: [b, h, w, heads, k]}."""

    def is_projection(part: Any, _: str) -> bool:
        return part.name == "qkv" and isinstance(part.parent, adaptive.AdaptiveConv)

    _, kept = module.apply(
        variables, image, train=False, capture_intermediates=is_projection, mutable="intermediates"
    )
    found = {}
    for path, (qkv,) in _leaves(kept["intermediates"]):
        block = path[: path.index("attention")]
        bias = variables["params"]
        for name in (*block, "attention", "bias"):
            bias = bias[name]
        query, key = qkv[..., 0, :, :], qkv[..., 1, :, :]
        found["/".join(block)] = adaptive.adaptive_kernel(query, key, bias)
    return found


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Any:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def described(kernel: np.ndarray) -> dict[str, float]:
    """Returns means over images, positions and heads of kernels [b, h, w, heads, k].

    centre: the weight of the position itself.
    effective: exp of the entropy, the number of equally weighted positions.
    moved: total variation distance, 0 to 1, from the mean kernel over the images at the same
      position and head. It is 0 if the kernel does not depend on the image.
    """
    logs = np.log(np.maximum(kernel, 1e-30))
    distance = np.abs(kernel - kernel.mean(0)).sum(-1) / 2
    return {
        "centre": float(kernel[..., kernel.shape[-1] // 2].mean()),
        "effective": float(np.exp(-(kernel * logs).sum(-1)).mean()),
        "moved": float(distance.mean()),
    }


def first_of_each(label: np.ndarray, classes: Sequence[int]) -> list[int]:
    """Returns the index of the first image of each class."""
    return [int(np.flatnonzero(label == wanted)[0]) for wanted in classes]


def main(root: str, out: pathlib.Path = HERE) -> None:
    """Measures every finished run of the layout below `root`."""
    rows: list[dict[str, Any]] = []
    for file in sorted(pathlib.Path(root).glob("*/config.json")):
        run = load.read_run(file.parent)
        if run.model["layout"] != LAYOUT or status.latest_step(file.parent) != run.steps:
            continue
        module, variables = lg.load(file.parent)
        source = pipeline.open_split(run.data, run.data.eval_splits[0], train=False)
        batch = next(iter(loader.eval_batches(source, batch_size=IMAGES)))
        image = device_ops.normalize(jnp.asarray(batch["image"]), run.data)
        with lg.implementation("fused"):  # as in training
            found = jax.tree.map(np.asarray, kernels(module, variables, image))
        for block, kernel in found.items():
            numbers = {name: f"{x:.{DIGITS}f}" for name, x in described(kernel).items()}
            about = {"name": file.parent.name, "seed": run.seed, "block": block}
            rows.append({**about, "images": len(kernel), **numbers})
        if len(rows) == len(found):
            chosen = first_of_each(batch["label"], CLASSES)
            write(out / "pictures.csv", pictures(batch, chosen))
            write(out / "picture_kernels.csv", positions(found, chosen))
        print(f"{file.parent.name}: {len(found)} blocks", flush=True)
    write(out / "kernels.csv", rows)


def pictures(batch: Mapping[str, np.ndarray], chosen: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the rows of the pixels of images; a row of the CSV file is an image, in hex."""
    return [
        {
            "image": number,
            "label": int(batch["label"][number]),
            "height": batch["image"].shape[1],
            "pixels": batch["image"][number, ..., 0].tobytes().hex(),
        }
        for number in chosen
    ]


def positions(found: Mapping[str, np.ndarray], chosen: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the rows of the kernels at every position of some images, mean over the heads."""
    return [
        {
            "image": number,
            "block": block,
            "row": y,
            "column": x,
            "kernel": " ".join(f"{weight:.3f}" for weight in kernel[number, y, x].mean(0)),
        }
        for block, kernel in found.items()
        for number in chosen
        for y in range(kernel.shape[1])
        for x in range(kernel.shape[2])
    ]


def write(file: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows and file.exists():
        return  # measured before; its runs are not here
    if not rows:
        raise ValueError(f"{file.name}: no finished run of {LAYOUT}: train it first")
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
