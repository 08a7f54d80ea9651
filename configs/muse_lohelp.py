# SPDX-License-Identifier: Apache-2.0
"""MUSE on LibreOffice Help: English to German, real text, on a laptop.

localglobal prepare --config configs/muse_lohelp.py
localglobal train --config configs/muse_lohelp.py --workdir runs/muse
echo "Click the button to open the dialog." | localglobal translate --workdir runs/muse
"""

from ml_collections import ConfigDict

from localglobal_jax.config import recipes
from localglobal_jax.config.loading import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, pair=("en-de", "en-fr"), size=("demo", "tiny"), data=("real", "mock"))
    config = ConfigDict()
    config.steps = 2400  # six epochs
    config.batch_size = 2048  # tokens
    config.model = dict(name="muse", layout="MM", depths=(3, 3), widths=(192, 192), heads=(4, 4))
    config.model.update(hidden=(384, 384), dropout=0.1)
    config.model.blocks = dict(M=dict(kernel_dropout=0.0))
    config.task = dict(name="translation")
    config.data = dict(name=f"lohelp_translate/{arg.pair}", mock=arg.data == "mock")
    config.data.update(vocab=4000, max_length=96, buckets=6)  # ids, tokens, lengths
    config.optim = dict(
        learning_rate=2e-3,
        warmup_steps=300,
        init_learning_rate=1e-7,
        b2=0.98,
        weight_decay=1e-4,
    )
    config.eval = dict(every=800, batch_size=8192)  # steps, tokens
    config.checkpoint = dict(every=400, best="validation/bleu")
    if arg.size == "tiny":
        recipes.shrink_text(config, batch_size=1024, vocab=400)
    return config
