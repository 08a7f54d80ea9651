# SPDX-License-Identifier: Apache-2.0
"""The studies of translation: models of equal size, and measures of known inputs."""

import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import study, text_runs
from experiments.attention_dispersion import measure as dispersion
from experiments.bleu_by_length import measure as joined
from experiments.operator_properties import measure as properties
from localglobal_jax.launch import expand
from localglobal_jax.models.registry import create_model
from localglobal_jax.parallel import context

FOLDER = pathlib.Path(study.__file__).parent


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("muse_results/sweep", 1e-3),
        ("lohelp/sweep", 1e-3),
        ("muse_kernels/sweep", 0.021),
        ("beyond_text/sweep", 1e-3),
        ("length_or_difficulty/sweep", 1e-3),
    ],
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


class Recorder:
    """A model that records whether the fused kernels are selected when it is called."""

    def __init__(self):
        self.fused = []

    def init(self, *args):
        return {}

    def apply(self, *args, mutable=None, train=False):
        self.fused.append(context.is_fused())
        output = jnp.zeros((2, 3, 5))
        return (output, {"intermediates": {}}) if mutable or len(args) > 2 else output


def test_studies_measure_with_the_kernels_of_training():
    tokens = jnp.ones((2, 3), jnp.int32)
    batch = {"source": tokens, "target_input": tokens, "target": tokens}
    calls = {
        "losses": lambda model: text_runs._token_losses(model, {}, batch),
        "attention": lambda model: dispersion.attention(model, {}, tokens, tokens),
        "operator": lambda model: properties.ready(model, (4,))(properties.inputs((4,), 0)),
    }
    for name, call in calls.items():
        model = Recorder()
        call(model)
        assert model.fused == [True], name


def test_sentences_put_together_keep_their_order():
    pairs = [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
    assert joined.grouped(pairs, 2) == [["a b", "A B"], ["c d", "C D"]]
