# SPDX-License-Identifier: Apache-2.0
"""The CSV files here -> table.md, figure.png and the README's tables.

    python -m experiments.beyond_large.make

grid.csv, warmup.csv, final.csv and final_shifts.csv are of the protocol; speed.csv is of
`measure_costs.py`.
"""

import pathlib

from experiments import costs, protocol, study
from experiments.beyond import make as beyond
from localglobal_jax.config import loading

HERE = pathlib.Path(__file__).parent
MODELS = loading.import_file(HERE / "sweep.py").models_of(None)
LAYOUTS = tuple(MODELS)
PAIRS = [(layout, beyond.BASELINE) for layout in LAYOUTS if layout != beyond.BASELINE]
PAIRS += [("CCAA", "CCCC"), ("CCEE", "CCCC")]


def tables(_):
    rows, moved = protocol.reported(HERE), beyond.reported_shifts(HERE)
    accuracy, best = beyond.robustness(moved, "accuracy", LAYOUTS)
    agreement, _ = beyond.robustness(moved, "agreement", LAYOUTS)
    return {
        "accuracy": beyond.results(rows, LAYOUTS),
        "costs": costs.table(study.read(HERE / "speed.csv"), LAYOUTS, beyond.BASELINE),
        "shifts": [*accuracy, *(["", *best[1:]] if best else [])],
        "agreement": agreement,
        "verdict": study.sentences(beyond.compared(rows, moved, LAYOUTS, PAIRS)),
        "grid": study.grid(HERE, MODELS, protocol.IMAGES, scale=100, digits=2),
    }


def draw(_):
    return beyond.draw_shifts(beyond.reported_shifts(HERE), LAYOUTS)


if __name__ == "__main__":
    study.main(__file__, tables, draw)
