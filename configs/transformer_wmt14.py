# SPDX-License-Identifier: Apache-2.0
"""The Transformer on WMT14 (arXiv 1706.03762; BLEU 28.4 En-De and 41.0 En-Fr with the big one).

    localglobal train --config configs/transformer_wmt14.py:pair=en-de --workdir runs/base

`muse_wmt14.py` with the usual model, learning rate and schedule. For the big one, add
``--config.model.name=transformer_big --config.optim.learning_rate=5e-4``.
"""

import pathlib

from localglobal_jax.config import loading

MUSE = pathlib.Path(__file__).with_name("muse_wmt14.py")


def get_config(arg=None):
    config = loading.load(f"{MUSE}:{arg or ''}")
    config.model.name = "transformer_base"
    config.optim.update(schedule="rsqrt", learning_rate=7e-4)
    config.optim.warmup_steps = min(config.optim.warmup_steps, 4000)
    return config
