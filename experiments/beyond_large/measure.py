# SPDX-License-Identifier: Apache-2.0
"""Measures trained models on shifted test images (`beyond.measure`) -> final_shifts.csv.

python -m experiments.beyond_large.measure runs/large/final final
"""

import pathlib
import sys

from experiments.beyond import measure

if __name__ == "__main__":
    measure.main(*sys.argv[1:], folder=pathlib.Path(__file__).parent)
