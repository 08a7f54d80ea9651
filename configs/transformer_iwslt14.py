# SPDX-License-Identifier: Apache-2.0
"""The Transformer on IWSLT14 German to English (arXiv 1911.09483, table 5: BLEU 35.3).

`muse_iwslt14.py` with the usual model and learning rate: see there where the data come from.
"""

import pathlib

from localglobal_jax.config import loading

MUSE = pathlib.Path(__file__).with_name("muse_iwslt14.py")


def get_config(arg=None):
    config = loading.load(f"{MUSE}:{arg or ''}")
    config.model.name = "transformer_iwslt"
    config.optim.learning_rate = 5e-4
    return config
