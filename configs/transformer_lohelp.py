# SPDX-License-Identifier: Apache-2.0
"""The Transformer on LibreOffice Help: `muse_lohelp.py`, but for the layers.

    localglobal train --config configs/transformer_lohelp.py --workdir runs/transformer

Attention, then a pointwise net, wide enough for as many parameters as MUSE has.
"""

import pathlib

from localglobal_jax.config import loading

MUSE = pathlib.Path(__file__).with_name("muse_lohelp.py")


def get_config(arg=None):
    config = loading.load(f"{MUSE}:{arg or ''}")
    hidden = {384: 514, 32: 64}[config.model.hidden[0]]
    config.model.update(layout="SS", hidden=(hidden, hidden))
    del config.model["blocks"]
    return config
