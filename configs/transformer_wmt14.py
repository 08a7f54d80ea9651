# SPDX-License-Identifier: Apache-2.0
"""Transformer on WMT14 (arXiv 1706.03762; the big one: BLEU 28.4 En-De and 41.0 En-Fr).

    localglobal train --config configs/transformer_wmt14.py:pair=en-de --workdir runs/base

`muse_wmt14.py` with another model, learning rate and schedule. For the big one, add
``--config.model.name=transformer_big --config.optim.learning_rate=5e-4``.
"""

import pathlib

from localglobal_jax.config.loading import import_file

muse_wmt14 = import_file(pathlib.Path(__file__).with_name("muse_wmt14.py"))


def get_config(arg=None):
    config = muse_wmt14.get_config(arg)
    config.model.name = "transformer_base"
    config.optim.update(schedule="rsqrt", learning_rate=7e-4)
    config.optim.warmup_steps = min(config.optim.warmup_steps, 4000)
    return config
