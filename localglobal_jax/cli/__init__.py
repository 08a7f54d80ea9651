# SPDX-License-Identifier: Apache-2.0
"""The command line: one module per command (`options.Command`); `main` registers them."""

from typing import TYPE_CHECKING

from localglobal_jax.config import renamed

if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
