# SPDX-License-Identifier: Apache-2.0
"""Training: setup, loop, step, optimizers, losses, metrics, tasks, evaluation, reporting.

>>> run = lg.config.validation.check(lg.load_config("configs/coatnet_digits.py"))
>>> schedule = lg.training.optim.make_schedule(run.optim, steps=100)
>>> float(schedule(0))
0.0
"""

from typing import TYPE_CHECKING

from localglobal_jax.config import renamed

if TYPE_CHECKING:
    from localglobal_jax.training import (
        evaluation,
        freezing,
        loop,
        losses,
        metrics,
        optim,
        reporting,
        setup,
        step,
        tasks,
    )

__all__ = [
    "evaluation",
    "freezing",
    "loop",
    "losses",
    "metrics",
    "optim",
    "reporting",
    "setup",
    "step",
    "tasks",
]

if not TYPE_CHECKING:  # submodules, imported when first used, and names that moved from here
    __getattr__ = renamed.attributes(__name__)
