# SPDX-License-Identifier: Apache-2.0
"""Transformer on IWSLT14 German to English (arXiv 1911.09483, table 5: BLEU 35.3).

`muse_iwslt14.py`, which says where the data come from, with another model and learning rate.
"""

import pathlib

from localglobal_jax.config.loading import import_file

muse_iwslt14 = import_file(pathlib.Path(__file__).with_name("muse_iwslt14.py"))


def get_config(arg=None):
    config = muse_iwslt14.get_config(arg)
    config.model.name = "transformer_iwslt"
    config.optim.learning_rate = 5e-4
    return config
