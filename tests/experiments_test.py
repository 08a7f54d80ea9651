# SPDX-License-Identifier: Apache-2.0
"""Studies: what is committed is what make.py draws from results.csv; their sweeps are right."""

import importlib
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import study
from experiments.attention_dispersion import measure as dispersion
from experiments.bleu_by_length import measure as joined
from localglobal_jax.launch import expand
from localglobal_jax.models import create_model

FOLDER = pathlib.Path(study.__file__).parent
STUDIES = sorted(
    file.parent.name for file in FOLDER.glob("*/make.py") if "study.main" in file.read_text()
)
SWEEPS = sorted(str(file.relative_to(FOLDER)) for file in FOLDER.glob("*/sweep*.py"))


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_committed_is_what_make_draws(name, tmp_path):
    made = importlib.import_module(f"experiments.{name}.make")
    study.main(made.__file__, made.tables, made.draw, tmp_path)
    for file in ("table.md", "README.md"):
        assert (tmp_path / file).read_text() == (FOLDER / name / file).read_text(), file
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("size", ["laptop", "paper", "tiny"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_every_sweep_is_right(name, size, tmp_path):
    runs = expand.expand(f"{FOLDER / name}:size={size}", str(tmp_path), "sweep", {})
    assert len({run.name for run in runs.runs}) == len(runs.runs) > 1


def test_interval_is_students():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert study.shown([]) == "not run"
    assert study.shown([1.5]) == "1.50"


def test_document_needs_its_marks():
    text = "a\n<!-- t -->\nold\n<!-- end -->\nb"
    assert study.document(text, {"t": ["new"]}) == "a\n<!-- t -->\nnew\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="no <!-- u -->"):
        study.document(text, {"u": []})


@pytest.mark.parametrize(
    ("name", "apart"),
    [("muse_results/sweep", 1e-3), ("muse_kernels/sweep", 0.021), ("beyond/sweep_text", 1e-3)],
)
def test_models_of_translation_are_of_equal_size(name, apart, tmp_path):
    sizes = set()
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    models = {}
    for run in expand.expand(f"{FOLDER / name}.py", str(tmp_path), "sweep", {}).runs:
        models[str(run.run.model)] = run.run
    for run in models.values():
        vocab = {"source_vocab": run.data.vocab, "target_vocab": run.data.vocab}
        module = create_model(**run.model, **vocab)
        shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)
        sizes.add(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
    assert max(sizes) / min(sizes) - 1 < apart, sizes


def test_sharpness_of_an_even_and_of_a_single_look():
    real = jnp.asarray([[1, 1, 1, 1, 0]], bool)
    even, single = jnp.where(real, 0.25, 0), jnp.eye(5)[:1]
    for row, (entropy, normalised, largest, effective) in (
        (even, (math.log(4), 1, 0.25, 4)),
        (single, (0, 0, 1, 1)),
    ):
        weights = jnp.broadcast_to(row[:, None, None], (1, 2, 5, 5))
        found = dispersion.sharpness(weights, real, causal=False)
        for values, wanted in zip(found, (entropy, normalised, largest, effective), strict=True):
            assert values == pytest.approx(wanted, abs=1e-6)


def test_causal_sharpness_leaves_out_the_position_that_has_no_choice():
    real = jnp.ones((1, 3), bool)
    weights = jnp.asarray([[1, 0, 0], [0.5, 0.5, 0], [1, 0, 0]])[None, None]
    _, normalised, largest, _ = dispersion.sharpness(weights, real, causal=True)
    assert normalised == pytest.approx(0.5)
    assert largest == pytest.approx(0.75)


def test_sentences_put_together_keep_their_order():
    pairs = [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
    assert joined.grouped(pairs, 2) == [["a b", "A B"], ["c d", "C D"]]
