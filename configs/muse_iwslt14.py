# SPDX-License-Identifier: Apache-2.0
"""MUSE on IWSLT14 German to English, as in the paper (arXiv 1911.09483, table 4: BLEU 36.3).

A user of the published code got 35.07 with the best checkpoint and 35.78 with the average.

The data are not in TFDS. fairseq's ``prepare-iwslt14.sh`` and ``fairseq-preprocess`` make
``iwslt14.tokenized.de-en/{train,valid,test}.{de,en}`` and the two dictionaries; put them below the
folder you start from, or name others in ``data.files`` and ``data.dicts``. Then

    localglobal train --config configs/muse_iwslt14.py --workdir runs/iwslt14
    localglobal evaluate --workdir runs/iwslt14 --average 10 --config.data.eval_splits=test
"""

from ml_collections import ConfigDict

from localglobal_jax.config import recipes
from localglobal_jax.config.loading import parse_arg

TEXT = "iwslt14.tokenized.de-en"


def get_config(arg=None):
    arg = parse_arg(
        arg, model=("muse", "muse_simple"), size=("paper", "tiny"), data=("real", "mock")
    )
    config = ConfigDict()
    config.steps = 20_000  # 71 epochs
    config.batch_size = 16_000  # tokens: 4,000, four times accumulated
    config.dtype = "bfloat16"  # activations; parameters stay float32
    config.model = dict(name=f"{arg.model}_iwslt")
    config.task = dict(name="translation", beam=5)
    config.data = dict(
        files=(f"{TEXT}/{{split}}.de", f"{TEXT}/{{split}}.en"),
        tokenizer="dict",
        dicts=(f"data-bin/{TEXT}/dict.de.txt", f"data-bin/{TEXT}/dict.en.txt"),
        joint=False,
        eval_splits=("valid",),
        max_length=176,  # tokens
        buckets=8,  # lengths
        rows_multiple=32,  # pairs: 8 in each of the four micro-batches
    )
    config.optim = dict(
        learning_rate=1e-3,
        schedule="rsqrt",
        warmup_steps=4000,
        init_learning_rate=1e-7,
        b2=0.98,
        weight_decay=1e-4,
        clip_norm=0.0,  # off
        accumulate=4,
    )
    config.eval = dict(every=2800)  # steps: 10 epochs
    config.checkpoint = dict(every=280, keep=10)  # the last ten epochs
    if arg.data == "mock":
        config.data.update(name="iwslt14", mock=True, files=(), dicts=())
    if arg.size == "tiny":
        recipes.shrink_text(config, batch_size=2048)
    return config
