# SPDX-License-Identifier: Apache-2.0
"""The study of length and difficulty: inputs, answers, and the whole path at a tiny size."""

import csv
import pathlib

import numpy as np
import pytest

from experiments import study
from experiments.length_or_difficulty import make, measure, prepare
from localglobal_jax.cli.main import main

SWEEP = pathlib.Path(prepare.__file__).with_name("sweep.py")


def test_joined_inputs_are_as_long_as_the_natural_ones():
    lengths, sizes = [20, 33, 64, 90], [3, 5, 8]
    found = prepare.groups(lengths, sizes, np.random.default_rng(0))
    for length, group in zip(lengths, found, strict=True):
        assert len(group) >= 2
        assert abs(sum(sizes[i] for i in group) - length) <= max(sizes) / 2
    assert len({i for group in found for i in group}) == 3  # all are used


def test_training_has_a_joined_input_for_every_natural_long_one():
    short = [(f"Open file {i}.", f"Datei {i} auf.") for i in range(9)]
    long = [(f"{'word ' * 20}{i}", "Wort " * 20) for i in range(4)]
    headings = [("No full stop", "Ohne Punkt")]
    made = prepare.training([*short, *long, *headings])
    assert made[:14] == [*short, *long, *headings]
    assert len(made) == 18
    for source, target in made[14:]:
        assert abs(len(source.split()) - 21) <= 2
        assert source.count(".") == target.count(".") == 7  # the same sentences on both sides
        assert [w for w in source.split() if w[0].isdigit()] != []
    with pytest.raises(ValueError, match="5 training pairs"):
        prepare.training([*long, *headings])


@pytest.mark.parametrize(
    ("length", "growth", "answer"),
    [
        ((0.8, 0.9, 0.85), (1.0, 1.1, 1.05), "length"),
        ((0.1, 0.2, 0.15), (1.0, 1.1, 1.05), "difficulty"),
        ((0.1, 0.9, 0.5), (1.0, 1.1, 1.05), "undecided"),
        ((0.8, 0.9, 0.85), (-0.1, 0.1, 0.0), "no growth"),
        ((0.8,), (1.0,), "no answer (1 seeds)"),
    ],
)
def test_the_answer_follows_from_both_costs(length, growth, answer):
    length, growth = ({str(i): x for i, x in enumerate(each)} for each in (length, growth))
    assert make.answer(length, growth) == answer


def text(rng, words):
    source = [f"w{int(n)}" for n in rng.integers(0, 20, words)]
    return " ".join(source) + ".", " ".join(reversed(source)).upper() + "."


@pytest.mark.slow  # minutes on a busy core
def test_the_whole_path_at_a_tiny_size_and_again(tmp_path):
    rng = np.random.default_rng(0)
    own = tmp_path / "own"
    own.mkdir()
    for split, count in (("train", 300), ("validation", 30), ("test", 60)):
        pairs = [text(rng, int(n)) for n in rng.choice([3, 4, 6, 17, 20], count)]
        for side, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            (own / f"{split}.{side}").write_text("\n".join(lines) + "\n")
    config = tmp_path / "own.py"
    files = tuple(f"{own}/{{split}}.{side}" for side in ("en", "de"))
    config.write_text(
        "from localglobal_jax.config import loading\n"
        "def get_config():\n"
        f"    config = loading.load({str(SWEEP.parents[2] / 'configs' / 'muse_lohelp.py')!r})\n"
        f"    config.data.update(name='text_pairs', files={files!r})\n"
        "    return config\n"
    )
    prepare.main(str(tmp_path / "data"), str(config))
    runs, out = tmp_path / "runs", tmp_path / "results.csv"
    command = ["sweep", "--config", f"{SWEEP}:size=tiny,files={tmp_path / 'data'}"]
    command += ["--workdir", str(runs), "--only", "1", "--config.data.vocab=300"]
    command += ["--config.data.max_length=96", "--config.steps=6"]
    command += ["--config.data.buckets=1", "--config.data.eval_splits=('validation',)"]
    assert main(command) == 0
    measure.main(runs, out)
    first = out.read_bytes()
    rows = list(csv.DictReader(first.decode().splitlines()))
    assert {row["operator"] for row in rows} == {"attention"}
    assert {row["positions"] for row in rows} == {"relative"}
    for row in rows:
        apart = float(row["tokens_joined"]) - float(row["tokens_natural"])
        assert abs(apart) < 4, row
        assert all(float(row[column]) > 0 for column in ("natural", "joined", "alone", "short"))
    tables = make.tables(study.read(out))
    assert "no answer (1 seeds)" in "".join(tables["verdict"])
    (axes,) = make.draw(study.read(out)).axes
    assert len(axes.patches) == 2
    assert main(command) == 0  # goes on: nothing is left to do
    measure.main(runs, out)
    assert out.read_bytes() == first
