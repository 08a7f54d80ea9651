# SPDX-License-Identifier: Apache-2.0
"""Transformer on LibreOffice Help: `muse_lohelp.py` with other layers.

    localglobal train --config configs/transformer_lohelp.py --workdir runs/transformer

Attention, then a pointwise network wide enough for as many parameters as MUSE has.
"""

import pathlib

from localglobal_jax.config.loading import import_file

muse_lohelp = import_file(pathlib.Path(__file__).with_name("muse_lohelp.py"))


def get_config(arg=None):
    config = muse_lohelp.get_config(arg)
    hidden = {384: 514, 32: 64}[config.model.hidden[0]]
    config.model.update(layout="SS", hidden=(hidden, hidden))
    del config.model["blocks"]
    return config
