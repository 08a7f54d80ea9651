# SPDX-License-Identifier: Apache-2.0
"""Converters of published weights, and adaptation to other image sizes and numbers of classes.

A converter takes a state dict (any mapping name -> array; `weights.read_safetensors` reads one
without torch) and returns ``(module, variables)``. It is strict: a name that is missing
or left over, or a shape that does not fit, is a ValueError that lists all of them.
"""

from localglobal_jax.convert import adapt, fairseq, focal, timm, weights

__all__ = ["adapt", "fairseq", "focal", "timm", "weights"]
