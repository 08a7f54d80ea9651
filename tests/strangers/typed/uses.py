"""Another project's file: every name of `lg.__all__`, for `mypy --strict` and pyright.

Lines that end with an ignored error are wrong uses. Both checkers must report them: an ignored
error that is not there is an error too (`tests/typing_test.py`).
"""

from collections.abc import Mapping
from typing import Any, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import localglobal_jax as lg
from localglobal_jax.blocks import RelativeAttentionBlock
from localglobal_jax.decoding import Hypotheses
from localglobal_jax.inference.classifier import Classifier
from localglobal_jax.inference.translator import Translator
from localglobal_jax.models import VOLO, CoAtNet, EncoderDecoder, FocalTransformer

Variables = Mapping[str, Any]


class Mine(nn.Module):
    """A model with operators and blocks of the library."""

    letters: str = "CT"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        outlook = lg.operators.Outlook(features=64, heads=2, window=3, name="outlook")
        assert_type(outlook.reach, lg.operators.Reach)
        x = assert_type(outlook(x), jax.Array)
        x = lg.operators.AdaptiveConv(64, heads=2, window=5)(x, train=train)
        block = lg.blocks.BLOCKS["T"](features=64, head_width=32, bias="mlp", name="block")
        assert_type(block, RelativeAttentionBlock)
        x = assert_type(block(x, train=train), jax.Array)
        x = lg.blocks.MBConvBlock(64, stride=2, expand_from="input")(x, train=train)
        for letter in self.letters:
            x = lg.blocks.BLOCKS[letter](features=64)(x, train=train)
        query = x.reshape(x.shape[0], -1, 2, 32)
        return assert_type(lg.operators.attend(query, query, query), jax.Array)


def functions(x: jax.Array) -> list[jax.Array]:
    """The equations without parameters."""
    windows = lg.operators.window_partition(x, 2)
    y = lg.operators.depthwise(x, jnp.ones((3, 3, x.shape[-1])), stride=1)
    activated = lg.operators.ACTIVATIONS["gelu"](y)
    with lg.implementation("fused"):
        weights = lg.operators.attention_weights(x, x)
    return [assert_type(lg.operators.window_merge(windows), jax.Array), activated, weights]


def wrong_operators(x: jax.Array) -> None:
    lg.operators.Outlook(widht=64)  # type: ignore[call-arg]
    lg.operators.Outlook(features="64")  # type: ignore[arg-type]
    lg.operators.RelativeAttention(64, bias="tabel")  # type: ignore[arg-type]
    lg.operators.Outlook(64)(x, mask=None)  # type: ignore[call-arg]
    lg.operators.attend(x, x)  # type: ignore[call-arg]
    lg.operators.attend(x, x, "x")  # type: ignore[arg-type]
    lg.operators.ACTIVATIONS["geluu"]  # type: ignore[index]
    lg.operators.Outlok()  # type: ignore[attr-defined]
    lg.blocks.MBConvBlock()  # type: ignore[call-arg]
    lg.blocks.BLOCKS["T"](features=64, head_widht=32)  # type: ignore[call-arg]
    lg.implementation("fast")  # type: ignore[arg-type]


def models(images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    assert_type(lg.list_models(), list[str])
    assert_type(lg.create_model("coatnet_0", classes=10), nn.Module)
    assert_type(lg.create_model("volo", classes=10), VOLO)
    assert_type(lg.create_model("focal"), FocalTransformer)
    assert_type(lg.create_model("muse"), EncoderDecoder)
    module = assert_type(lg.create_model("coatnet", layout="CT", classes=10), CoAtNet)
    variables = module.init(jax.random.key(0), images, train=False)
    logits, stages = module.bind(variables)(images, train=False)
    module = lg.models.CoAtNet(classes=10, depths=(1, 1), widths=(8, 16), layout="CT")
    assert_type(module.classes, int)
    return assert_type(logits, jax.Array), assert_type(stages, dict[str, jax.Array])


def wrong_models(images: jax.Array) -> None:
    lg.create_model(classes=10)  # type: ignore[call-overload]
    lg.create_modle("coatnet")  # type: ignore[attr-defined]
    lg.models.CoAtNet(clases=10)  # type: ignore[call-arg]
    lg.models.CoAtNet(stem_norm="group")  # type: ignore[arg-type]
    lg.models.VOLO().grids(224)  # type: ignore[arg-type]
    lg.create_model("coatnet").bind({})(images, training=True)  # type: ignore[call-arg]


def runs(workdir: str) -> None:
    config = lg.load_config("configs/coatnet_digits.py:size=tiny", steps=100)
    config.update({"steps": 200})
    assert_type(lg.train(config, workdir), dict[str, dict[str, float]])
    step, metrics = lg.evaluate(workdir, step="best")
    print(assert_type(step, int), metrics["test"]["accuracy"])
    module, variables = lg.load(workdir, only="stage1", dtype=jnp.bfloat16)
    assert_type(module, nn.Module)
    small, restored = lg.convert.adapt.reclassify(module, variables, classes=3)
    lg.load(workdir, sharding=lambda path, x: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    classifier = assert_type(lg.load_classifier(workdir), Classifier)
    for found in classifier.classify(["a.jpg"], top=1):
        print(found.best[0].name, assert_type(found.best[0].probability, float))
    small.apply(restored, jnp.zeros((1, 8, 8, 1)))


def wrong_runs(workdir: str) -> None:
    lg.load_config(7)  # type: ignore[arg-type]
    lg.train(workdir)  # type: ignore[call-arg]
    lg.evaluate(workdir, steps=3)  # type: ignore[call-arg]
    lg.load(workdir, onyl="stage1")  # type: ignore[call-arg]
    lg.load_classifier(workdir).clasify([])  # type: ignore[attr-defined]
    lg.load_translator(workdir).translate("one line", beam="4")  # type: ignore[arg-type]


def text(workdir: str, source: np.ndarray[Any, np.dtype[np.int32]]) -> Hypotheses:
    translator = assert_type(lg.load_translator([workdir, workdir]), Translator)
    print([line.text for line in translator.translate(["Click the button."], beam=4)])
    module, variables = lg.load(workdir)
    assert isinstance(module, EncoderDecoder)
    lg.decoding.greedy(module, variables, source, max_length=20)
    lg.decoding.sample(module, variables, source, jax.random.key(0), top_p=0.9, max_length=20)
    both = lg.decoding.Ensemble((module, module))
    found = lg.decoding.beam_search(
        both, (variables, variables), source, beam=4, max_length=lg.decoding.max_length(10)
    )
    assert_type(found.scores, jax.Array)
    return found


def wrong_text(module: nn.Module, variables: Variables, source: jax.Array) -> None:
    lg.decoding.greedy(variables, module, source, max_length=20)  # type: ignore[arg-type]
    lg.decoding.beam_search(EncoderDecoder(), variables, source, beam=4)  # type: ignore[call-arg]
    lg.decoding.max_length("10")  # type: ignore[arg-type]


def others(name: str, weights: Mapping[str, Any]) -> CoAtNet:
    """Weights of other projects, and the namespaces of a run's parts."""
    module, variables = lg.convert.timm.load(name, weights)
    resized = lg.convert.adapt.resize(module, variables, (384, 384))
    assert_type(lg.convert.focal.load({}, weights)[0], FocalTransformer)
    module.apply(resized, jnp.zeros((1, 384, 384, 3)))
    run = lg.config.validation.check({"task": {"name": "classification"}})
    assert_type(run, lg.config.schema.Run)
    assert_type(run.steps, int)
    assert_type(lg.parallel.context.is_fused(), bool)
    assert_type(lg.training.loop.due(3, 1), bool)
    print(lg.data.loader)
    print(lg.__version__.split("."))
    assert isinstance(module, CoAtNet)
    return module
