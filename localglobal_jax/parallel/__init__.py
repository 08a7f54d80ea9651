# SPDX-License-Identifier: Apache-2.0
"""Devices and hosts: meshes, shardings, compilation, multi-host start-up, the context of a step."""

from typing import TYPE_CHECKING

from localglobal_jax.config import renamed

if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
