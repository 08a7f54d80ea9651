# SPDX-License-Identifier: Apache-2.0
"""Devices and hosts: meshes, shardings, compilation, multi-host start-up, the context of a step.

>>> mesh = lg.parallel.placement.make_mesh({"data": -1}, jax.devices()[:1])
>>> dict(mesh.shape)
{'data': 1}
"""

from typing import TYPE_CHECKING

from localglobal_jax.config import renamed

if TYPE_CHECKING:
    from localglobal_jax.parallel import context, multihost, placement, rendezvous, sharding

__all__ = ["context", "multihost", "placement", "rendezvous", "sharding"]

if not TYPE_CHECKING:  # submodules, imported when first used, and names that moved from here
    __getattr__ = renamed.attributes(__name__)
