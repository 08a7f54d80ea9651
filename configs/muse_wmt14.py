# SPDX-License-Identifier: Apache-2.0
"""MUSE on WMT14, as in the paper (arXiv 1911.09483, table 2: BLEU 29.9 En-De, 43.5 En-Fr).

    localglobal prepare --config configs/muse_wmt14.py:pair=en-de     (needs the extra [tf])
    localglobal train --config configs/muse_wmt14.py:pair=en-de --workdir runs/en-de

Half a million tokens per step, meant for 8 to 32 accelerators. The paper's BLEU is for subwords of
tokenised text; here SentencePiece is trained on the raw text.
"""

from ml_collections import ConfigDict

from localglobal_jax.config import recipes
from localglobal_jax.config.loading import parse_arg

# Batches: 3,584 tokens x 32 x 4 GPUs, and 5,120 x 32 x 4 (section 3.1.4; the log of the published
# En-Fr checkpoint has 1,280 x 76 x 8)
PAIRS = {
    "en-de": dict(
        tfds="de-en",
        batch=458_752,
        steps=30_000,
        learning_rate=1e-3,
        length_penalty=0.6,
        beam=4,
        vocab=32_768,
    ),
    "en-fr": dict(
        tfds="fr-en",
        batch=655_360,
        steps=80_000,
        learning_rate=7e-4,
        length_penalty=0.8,
        beam=5,
        vocab=44_512,
    ),
}


def get_config(arg=None):
    arg = parse_arg(arg, pair=tuple(PAIRS), size=("paper", "tiny"), data=("real", "mock"))
    pair = ConfigDict(PAIRS[arg.pair])
    config = ConfigDict()
    config.steps = pair.steps
    config.batch_size = pair.batch  # tokens
    config.dtype = "bfloat16"  # activations; parameters stay float32
    config.model = dict(name=f"muse_wmt_{arg.pair.replace('-', '_')}")
    config.task = dict(name="translation", beam=pair.beam, length_penalty=pair.length_penalty)
    config.data = dict(name=f"wmt14_translate/{pair.tfds}", mock=arg.data == "mock")
    config.data.update(source="en", target=arg.pair[-2:])
    config.data.update(vocab=pair.vocab, max_length=256, buckets=8)  # ids, tokens, lengths
    config.data.rows_multiple = 256  # pairs: 8 micro-batches for each of 32 devices
    config.optim = dict(
        learning_rate=pair.learning_rate,
        warmup_steps=10_000,
        init_learning_rate=1e-7,
        b2=0.98,
        clip_norm=0.0,  # off
        accumulate=8,
    )
    config.eval = dict(every=2000)  # steps
    config.checkpoint = dict(every=1000, keep=10, best="-validation/loss")
    if arg.size == "tiny":
        recipes.shrink_text(config, batch_size=2048, vocab=300, rows_multiple=16)
    return config
