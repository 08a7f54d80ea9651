# SPDX-License-Identifier: Apache-2.0
"""Reads the learned gates of the runs that have them. Continues where it was stopped.

    python -m experiments.muse_kernels.measure runs/kernels runs/results [final]

gates.csv has the runs at one setting; with "final", final_gates.csv has the protocol's final ones.
"""

import pathlib
import sys

import jax

from experiments import text_runs

HERE = pathlib.Path(__file__).parent


def gates(trained):
    """Returns the share of the smaller kernel, a row for each layer that mixes two."""
    leaves = jax.tree_util.tree_leaves_with_path(trained.translator.variables["params"])
    muse = trained.run.model.get("blocks", {}).get("M", {})
    for path, leaf in leaves:
        names = [key.key for key in path]
        if names[-1] == "gate":
            part, layer = names[0], names[1].removeprefix("layer")
            share = float(jax.nn.softmax(leaf)[0])
            yield {
                "steps": trained.run.steps,
                "seed": trained.seed,
                "ffn": muse.get("ffn", "own"),
                "part": part,
                "layer": layer,
                "share": f"{share:.5f}",
            }


if __name__ == "__main__":
    roots = [root for root in sys.argv[1:] if root != "final"]
    file = "final_gates.csv" if "final" in sys.argv[1:] else "gates.csv"
    runs = [run for root in roots for run in text_runs.finished(root)]
    columns = ("steps", "seed", "ffn", "part", "layer", "share")
    text_runs.measured(runs, HERE / file, columns, gates)
