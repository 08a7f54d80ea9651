# SPDX-License-Identifier: Apache-2.0
"""Names of models: every one can be made, and a bare name has the sizes of a paper."""

import functools

import jax
import jax.numpy as jnp
import pytest

from localglobal_jax.data.text import tokenizers
from localglobal_jax.models import CoAtNet
from localglobal_jax.models.registry import FIGURES, MODELS, create_model, describe, example
from localglobal_jax.operators import Outlook


def test_the_fields_of_every_name_are_allowed():
    for name, (_, fields) in MODELS.items():
        assert create_model(name, **fields) == create_model(name)  # fields given are checked


def test_every_figure_of_a_paper_belongs_to_a_name():
    assert set(FIGURES) <= set(MODELS)


def test_a_bare_name_has_sizes_of_its_paper():
    assert create_model("coatnet", head_hidden=768) == create_model("coatnet_0")
    assert create_model("volo") == create_model("volo_d1")
    assert create_model("focal") == create_model("focal_tiny")
    base = create_model("transformer_base")  # arXiv 1706.03762
    muse = create_model("muse")
    assert (muse.depths, muse.widths, muse.heads) == (base.depths, base.widths, base.heads)


def test_special_tokens_are_those_of_the_tokenizers():
    muse = create_model("muse")
    assert (muse.pad, muse.start, muse.end) == (tokenizers.PAD, tokenizers.EOS, tokenizers.EOS)


def test_sizes_of_focal_transformers_are_those_of_table_1():
    for family, fields in (("focal_{}", {}), ("focal_{}_useconv", {"conv_embed": True})):
        names = [family.format(size) for size in ("tiny", "small", "base")]
        tiny, small, base = (create_model(name) for name in names)
        assert tiny.depths == (2, 2, 6, 2)
        assert small == create_model(names[0], depths=(2, 2, 18, 2))
        wider = {"widths": (128, 256, 512, 1024), "heads": (4, 8, 16, 32)}
        assert base == create_model(names[1], **wider)
        assert small == create_model("focal", depths=small.depths, **fields)


LISTS = {
    "coatnet": {"layout": "CO", "depths": (1, 1), "widths": (16, 32)},
    "volo": {
        "layout": "O",
        "depths": (1,),
        "widths": (32,),
        "strides": (1,),
        "heads": (2,),
        "position": 0,
    },
    "focal": {"depths": (1, 1, 1, 1), "widths": (32, 32, 32, 32), "heads": (1, 1, 1, 1)},
    "muse": {"layout": "MM", "depths": (1, 1), "widths": (16, 16), "heads": (2, 2)},
}


@pytest.mark.parametrize("name", LISTS)
def test_a_model_with_options_of_blocks_may_be_a_static_argument(name):
    """Also if they come from JSON, with lists for tuples."""
    options = {"M": {"windows": [3]}}
    first, second = (create_model(name, **LISTS[name], blocks=options) for _ in range(2))
    assert hash(first) == hash(second)
    x = jnp.ones((1, 32, 32, 3)) if name != "muse" else jnp.ones((1, 5), jnp.int32)
    inputs = (x, x) if name == "muse" else (x,)
    init = jax.jit(lambda m, *x: m.init(jax.random.key(0), *x), static_argnums=0)
    assert jax.eval_shape(functools.partial(init, first), *inputs)["params"]


def test_what_is_no_model_of_a_name_is_refused():
    class Mine(CoAtNet):
        pass

    for module in (Mine(), Outlook()):
        with pytest.raises(ValueError, match=f"{type(module).__name__} .*CoAtNet"):
            describe(module)
    with pytest.raises(ValueError, match='"coatnet_0"'):
        example("coatnet_00")
