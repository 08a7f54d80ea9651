# SPDX-License-Identifier: Apache-2.0
"""Configs: the schema of a run, files and overrides, validation, sweeps. Imports no jax.

>>> run = lg.config.validation.check(lg.load_config("configs/coatnet_digits.py", steps=50))
>>> type(run).__name__, run.steps
('ClassificationRun', 50)
>>> lg.config.validation.check(lg.load_config("configs/coatnet_digits.py", steps=0))
Traceback (most recent call last):
ValueError: ...
"""

from typing import TYPE_CHECKING

from localglobal_jax.config import renamed

if TYPE_CHECKING:
    from localglobal_jax.config import loading, schema, sweeps, validation

__all__ = ["loading", "schema", "sweeps", "validation"]

if not TYPE_CHECKING:  # submodules, imported when first used, and names that moved from here
    __getattr__ = renamed.attributes(__name__)
