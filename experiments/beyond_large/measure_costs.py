# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and work of this study's models, untrained (`experiments/costs.py`) -> speed.csv.

python -m experiments.beyond_large.measure_costs
"""

import pathlib

from experiments import costs
from localglobal_jax.launch import expand

HERE = pathlib.Path(__file__).parent


def main(out: pathlib.Path = HERE / "speed.csv") -> None:
    """Writes a row for each layout, CCTT first."""
    runs = [each.run for each in expand.expand(str(HERE / "sweep.py"), "unused").runs]
    costs.measure({run.model["layout"]: run for run in runs if run.seed == 0}, out)


if __name__ == "__main__":
    main()
