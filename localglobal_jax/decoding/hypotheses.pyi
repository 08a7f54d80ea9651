# SPDX-License-Identifier: Apache-2.0
from localglobal_jax.inference.decoding.hypotheses import *  # noqa: F403
