# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and work of this study's models, untrained (`experiments/costs.py`) -> speed.csv.

python -m experiments.vision_comparison.measure [laptop]
"""

import pathlib
import sys

from experiments import costs
from localglobal_jax.config import loading
from localglobal_jax.launch import expand

HERE = pathlib.Path(__file__).parent
BASELINE = "CoAtNet"


def main(size: str = "laptop", steps: int = 20, out: pathlib.Path = HERE / "speed.csv") -> None:
    """Writes a row for each model, CoAtNet first."""
    spec = f"{HERE / 'sweep.py'}:size={size}"
    module, _ = loading.load_module(spec)
    described = expand.expand(spec, "unused").runs
    names = list(module.models(size))
    runs = {name: run.run for name, run in zip(names, described[-len(names) :], strict=True)}
    costs.measure({BASELINE: runs.pop(BASELINE), **runs}, out, steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
