# SPDX-License-Identifier: Apache-2.0
from localglobal_jax.inference.decoding.beam import *  # noqa: F403
