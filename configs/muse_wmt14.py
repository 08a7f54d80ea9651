# SPDX-License-Identifier: Apache-2.0
"""MUSE on WMT14, as the paper has it (arXiv 1911.09483, table 2: BLEU 29.9 En-De, 43.5 En-Fr).

    localglobal prepare --config configs/muse_wmt14.py:pair=en-de     (needs the extra [tf])
    localglobal train --config configs/muse_wmt14.py:pair=en-de --workdir runs/en-de

Half a million tokens per step, meant for 8 to 32 accelerators. The paper's figures are of a
vocabulary of subwords of tokenised text; here SentencePiece reads the text as it is.
"""

from ml_collections import ConfigDict

from localglobal_jax.config.loading import parse_arg

PAIRS = {  # TFDS name, steps, peak of the learning rate, length penalty, beam, vocabulary
    "en-de": ("de-en", 30_000, 1e-3, 0.6, 4, 32_768),
    "en-fr": ("fr-en", 80_000, 7e-4, 0.8, 5, 44_512),
}


def get_config(arg=None):
    arg = parse_arg(arg, pair=tuple(PAIRS), size=("paper", "tiny"), data=("real", "mock"))
    name, steps, rate, penalty, beam, vocab = PAIRS[arg.pair]
    config = ConfigDict()
    config.seed = 0
    config.steps = steps
    config.batch_size = 458_752  # tokens: 3,584 x 32 x 4 in the paper
    config.dtype = "bfloat16"
    config.model = ConfigDict(dict(name=f"muse_wmt_{arg.pair.replace('-', '_')}"))
    config.task = ConfigDict(
        dict(name="translation", label_smoothing=0.1, beam=beam, length_penalty=penalty)
    )
    config.data = ConfigDict(
        dict(
            name=f"wmt14_translate/{name}",
            mock=arg.data == "mock",
            source="en",
            target=arg.pair[-2:],
            vocab=vocab,
            max_length=256,
            buckets=8,
            rows_multiple=256,  # 8 parts for each of 32 devices
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=rate,
            schedule="cosine",
            warmup_steps=10_000,
            init_learning_rate=1e-7,
            b2=0.98,
            clip_norm=0.0,
            accumulate=8,
        )
    )
    config.eval = ConfigDict(dict(every=2000))
    config.checkpoint = ConfigDict(dict(every=1000, keep=10, best="-validation/loss"))
    if arg.size == "tiny":
        small = dict(depths=(1, 1), widths=(32, 32), heads=(2, 2), hidden=(32, 32))
        config.steps, config.batch_size = 20, 2048
        config.model.update(small)
        config.data.update(vocab=300, max_length=48, buckets=2, rows_multiple=16)
        config.optim.warmup_steps = 5
        config.eval.every = config.checkpoint.every = 10
    return config
