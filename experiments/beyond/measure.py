# SPDX-License-Identifier: Apache-2.0
"""Measures trained models of this study on shifted test images. Continues if stopped.

    python -m experiments.beyond.measure runs/beyond             # sweep: shifts.csv
    python -m experiments.beyond.measure runs/beyond/final final # sweep_final: final_shifts.csv

Every image is moved by 0 to 4 pixels up, down, left or right (its number decides, for all models
alike), and zeros fill the gap. Accuracy, and agreement: the share of images whose answer is the one
that the same model gave before the shift.
"""

import csv
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import localglobal_jax as lg
from experiments import study
from localglobal_jax.data import loader
from localglobal_jax.data.images import device_ops, pipeline
from localglobal_jax.launch import expand, status

HERE = pathlib.Path(__file__).parent
SHIFTS = range(5)  # pixels
COLUMNS = ("layout", "seed", "shift", "accuracy", "agreement", "images")


def shifted(image: np.ndarray, pixels: int) -> np.ndarray:
    """Moves image i of [b, h, w, c] in direction i % 4; zeros fill the gap."""
    if not pixels:
        return image
    moved = np.zeros_like(image)
    moved[0::4, pixels:] = image[0::4, :-pixels]
    moved[1::4, :-pixels] = image[1::4, pixels:]
    moved[2::4, :, pixels:] = image[2::4, :, :-pixels]
    moved[3::4, :, :-pixels] = image[3::4, :, pixels:]
    return moved


def measure(run: expand.Description) -> list[dict[str, object]]:
    """Returns the rows of one trained run."""
    module, variables = lg.load(run.workdir)
    options = run.run.data

    @jax.jit
    def predict(variables, image):
        with lg.implementation("fused"):  # as in training
            logits, _ = module.apply(variables, device_ops.normalize(image, options), train=False)
        return jnp.argmax(logits, -1)

    source = pipeline.open_split(options, options.eval_splits[0], train=False)
    labels, answers = [], {pixels: [] for pixels in SHIFTS}
    for batch in loader.eval_batches(source, batch_size=run.run.eval.batch_size):
        real = batch["mask"] > 0  # the last batch is filled up
        labels.append(batch["label"][real])
        for pixels in SHIFTS:
            found = predict(variables, shifted(batch["image"], pixels))
            answers[pixels].append(np.asarray(found)[real])
    label = np.concatenate(labels)
    joined = {pixels: np.concatenate(found) for pixels, found in answers.items()}
    return [
        {
            "layout": run.run.model["layout"],
            "seed": run.run.seed,
            "shift": pixels,
            "accuracy": f"{np.mean(found == label):.5f}",
            "agreement": f"{np.mean(found == joined[0]):.5f}",
            "images": len(label),
        }
        for pixels, found in joined.items()
    ]


def main(root: str, sweep: str = "", folder: pathlib.Path = HERE) -> None:
    """Measures every run that is done and not yet in the CSV file.

    Args:
      sweep: "" or "final".
      folder: that of the sweep.py and of the CSV file.
    """
    name = f"sweep_{sweep}" if sweep else "sweep"
    file = folder / (f"{sweep}_shifts.csv" if sweep else "shifts.csv")
    rows = study.read(file)
    known = {(row["layout"], str(row["seed"])) for row in rows}
    for run in expand.expand(str(folder / "sweep.py"), root, name).runs:
        if (run.run.model["layout"], str(run.run.seed)) in known:
            continue
        if (status.latest_step(run.workdir) or 0) < run.run.steps:
            print(f"{run.name} is not done")
            continue
        rows += measure(run)
        with open(file, "w", newline="") as opened:
            writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"{run.name}: measured", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
