# SPDX-License-Identifier: Apache-2.0
"""Writes the text files of this study: natural pairs, and in training joined short ones beside.

    python -m experiments.length_or_difficulty.prepare runs/length/data [CONFIG]

For each long training pair there is one input of joined short training pairs with about as many
words, so that a model has seen both kinds of long input equally often. Validation and test are
copied as they are. CONFIG names the source of the pairs (default: configs/muse_lohelp.py).
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from localglobal_jax.config import loading, validation
from localglobal_jax.data.text import pairs

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "muse_lohelp.py"
SHORT = 8  # words of a short sentence, at most, on either side
LONG = 16  # words of a long source, at least
Pair = tuple[str, str]


def is_short(pair: Pair) -> bool:
    """Whether both sides are short and end a sentence: what is joined reads as a text."""
    return all(len(side.split()) <= SHORT and side.endswith(".") for side in pair)


def joined(parts: Sequence[Pair]) -> Pair:
    """Returns one pair of several, in their order."""
    source, target = (" ".join(side) for side in zip(*parts, strict=True))
    return source, target


def groups(
    lengths: Sequence[int], sizes: Sequence[int], rng: np.random.Generator
) -> list[list[int]]:
    """Draws short sentences whose sizes add up to each of `lengths`, as nearly as they can.

    Args:
      lengths: sizes of the long inputs to be matched.
      sizes: sizes of the short sentences, which are used in turn, in random orders.

    Returns:
      For each length the numbers of at least two sentences: their sum is at most half of the last
      sentence too long or too short.
    """
    found: list[list[int]] = []
    queue: list[int] = []
    for length in lengths:
        group: list[int] = []
        total = 0
        while True:
            queue = queue or rng.permutation(len(sizes)).tolist()
            if len(group) >= 2 and total + sizes[queue[-1]] / 2 > length:
                break
            group.append(queue.pop())
            total += sizes[group[-1]]
        found.append(group)
    return found


def training(natural: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """Returns the natural pairs and, for each long one, a joined one of about as many words."""
    short = [pair for pair in natural if is_short(pair)]
    if not short:
        raise ValueError(
            f"none of the {len(natural)} training pairs has at most {SHORT} words a side and a "
            "full stop at both ends: give a data set with short sentences"
        )
    lengths = [n for source, _ in natural if (n := len(source.split())) >= LONG]
    sizes = [len(source.split()) for source, _ in short]
    drawn = groups(lengths, sizes, np.random.default_rng(seed))
    return [*natural, *(joined([short[i] for i in group]) for group in drawn)]


def main(out: str, config: str = str(CONFIG)) -> None:
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    data = validation.check(loading.load(config)).data
    for split in ("train", "validation", "test"):
        read = pairs.read(data, split)
        found = list(zip(read.sources, read.targets, strict=True))
        written = training(found) if split == "train" else found
        for side, lines in zip(("source", "target"), zip(*written, strict=True), strict=True):
            (folder / f"{split}.{side}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split}: {len(found)} natural pairs, {len(written) - len(found)} joined")


if __name__ == "__main__":
    main(*sys.argv[1:])
