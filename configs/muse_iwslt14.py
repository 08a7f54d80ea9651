# SPDX-License-Identifier: Apache-2.0
"""MUSE on IWSLT14 German to English, as the paper has it (arXiv 1911.09483, table 4: BLEU 36.3).

The data are not in TFDS. fairseq's ``prepare-iwslt14.sh`` and ``fairseq-preprocess`` make
``iwslt14.tokenized.de-en/{train,valid,test}.{de,en}`` and the two dictionaries; put them below the
folder you start from, or name others in ``data.files`` and ``data.dicts``. Then

    localglobal train --config configs/muse_iwslt14.py --workdir runs/iwslt14
    localglobal evaluate --workdir runs/iwslt14 --average 10 --config.data.eval_splits=test
"""

from ml_collections import ConfigDict

from localglobal_jax.config.loading import parse_arg

TEXT = "iwslt14.tokenized.de-en"


def get_config(arg=None):
    arg = parse_arg(
        arg, model=("muse", "muse_simple"), size=("paper", "tiny"), data=("real", "mock")
    )
    config = ConfigDict()
    config.seed = 0
    config.steps = 20_000  # 71 epochs
    config.batch_size = 16_000  # tokens: 4,000, four times accumulated
    config.dtype = "bfloat16"
    config.model = ConfigDict(dict(name=f"{arg.model}_iwslt"))
    config.task = ConfigDict(
        dict(name="translation", label_smoothing=0.1, beam=5, length_penalty=1.0)
    )
    config.data = ConfigDict(
        dict(
            files=(f"{TEXT}/{{split}}.de", f"{TEXT}/{{split}}.en"),
            tokenizer="dict",
            dicts=(f"data-bin/{TEXT}/dict.de.txt", f"data-bin/{TEXT}/dict.en.txt"),
            joint=False,
            eval_splits=("valid",),
            max_length=176,
            buckets=8,
            rows_multiple=32,  # 8 in each of the four parts
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=1e-3,
            schedule="rsqrt",
            warmup_steps=4000,
            init_learning_rate=1e-7,
            b2=0.98,
            weight_decay=1e-4,
            clip_norm=0.0,
            accumulate=4,
        )
    )
    config.eval = ConfigDict(dict(every=2800))
    config.checkpoint = ConfigDict(dict(every=280, keep=10))  # the last ten epochs
    if arg.data == "mock":
        config.data.update(name="iwslt14", mock=True, files=(), dicts=())
    if arg.size == "tiny":
        small = dict(depths=(1, 1), widths=(32, 32), heads=(2, 2), hidden=(32, 32))
        config.steps, config.batch_size = 20, 2048
        config.model.update(small)
        config.data.update(max_length=48, buckets=2)
        config.optim.warmup_steps = 5
        config.eval.every = config.checkpoint.every = 10
    return config
