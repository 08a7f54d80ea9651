# SPDX-License-Identifier: Apache-2.0
import jax
import pytest

from localglobal_jax.config import loading, validation
from localglobal_jax.data.text import tokenizers
from localglobal_jax.profiling import abstract_task, compiler_process, topologies
from localglobal_jax.training import tasks


@pytest.mark.parametrize(
    "spec", ["configs/coatnet_digits.py:size=tiny", "configs/muse_lohelp.py:size=tiny"]
)
def test_batches_are_those_of_training(spec):
    """All but the length of the longest sentences, which only the data knows."""
    run = validation.check(loading.load(spec, {"data.mock": "true"}))
    batch, described = abstract_task.batch(run, abstract_task.create(run), train=True)
    real = next(tasks.create_task(run).train_batches(0, 1))
    assert batch.keys() == real.keys()
    for name, array in real.items():
        assert batch[name].dtype == array.dtype
        assert len(batch[name].shape) == array.ndim
        if "image" in real:
            assert batch[name].shape == array.shape
    assert str(batch["mask"].shape[0]) in described
    assert abstract_task.items(batch) >= batch["mask"].shape[0]


def test_label_maps_are_planned_in_training():
    given = {"data.label_maps": "/not/there", "data.mock": "true"}
    run = validation.check(loading.load("configs/volo_imagenet.py:size=tiny", given))
    task = abstract_task.create(run)
    batch, _ = abstract_task.batch(run, task, train=True)
    assert batch["label_map"].shape == (run.batch_size, 2, 5, 18, 18)
    variables = jax.eval_shape(task.model.init, jax.random.key(0), *task.inputs)
    jax.eval_shape(task.loss, variables, batch, jax.random.key(0))
    assert "label_map" not in abstract_task.batch(run, task, train=False)[0]


def test_real_classes_without_data():
    run = validation.check(loading.load("configs/coatnet_imagenet.py:variant=0"))
    assert abstract_task.create(run).model.classes == 1000


def test_vocabulary_of_the_config_and_of_dictionaries(tmp_path):
    spec = "configs/muse_wmt14.py:pair=en-de,size=tiny"
    run = validation.check(loading.load(spec))
    assert abstract_task.create(run).model.target_vocab == run.data.vocab == 300
    files = []
    for name, words in (("a", 50), ("b", 70)):
        (tmp_path / name).write_text("".join(f"word{i} 1\n" for i in range(words)))
        files.append(str(tmp_path / name))
    given = {"data.tokenizer": "dict", "data.dicts": str(tuple(files)), "data.joint": "false"}
    run = validation.check(loading.load(spec, given | {"model.embeddings": "separate"}))
    task = abstract_task.create(run)
    known = tokenizers.of_dictionaries(files)
    assert task.model.source_vocab == known.source.size != known.target.size
    assert task.model.target_vocab == known.target.size
    variables = jax.eval_shape(
        lambda: task.model.init(
            jax.random.key(0), *[jax.numpy.zeros(x.shape, x.dtype) for x in task.inputs]
        )
    )
    assert variables["params"]

    where = topologies.parse("cpu:8")
    kept = compiler_process.key(run, where, "train")
    assert compiler_process.key(run, where, "train") == kept
    (tmp_path / "a").write_text("another 1\n")
    assert compiler_process.key(run, where, "train") != kept
