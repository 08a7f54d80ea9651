# SPDX-License-Identifier: Apache-2.0
"""The translation task: its loss, its evaluators, and whole little runs on a made-up language."""

import functools
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from localglobal_jax import load, load_translator
from localglobal_jax.config import loading, validation
from localglobal_jax.data.text import pipeline, tokenizers
from localglobal_jax.inference import load as inference_load
from localglobal_jax.parallel import placement
from localglobal_jax.training import evaluation, loop
from localglobal_jax.training.step import accumulated_gradient
from localglobal_jax.training.tasks import create_task, translation

QUIET = {"model.dropout": "0"}
CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "muse_lohelp.py"


def make_run(**overrides):
    """Of the smallest model, with one shape of batches."""
    layout = "MM" if any(name.startswith("model.blocks") for name in overrides) else "TT"
    base = {
        "model.layout": layout,
        "steps": "4",
        "optim.warmup_steps": "1",
        "eval.every": "0",
        "batch_size": "512",
    }
    fields = {**small.TEXT, **base, **overrides}
    return validation.check(loading.load(f"{CONFIG}:size=tiny,data=mock", fields))


def started(run):
    """The task, its variables at step 0, and its first batch."""
    task = create_task(run)
    inputs = [jnp.zeros(x.shape, x.dtype) for x in task.inputs]
    variables = jax.jit(lambda: task.model.init(jax.random.key(0), *inputs, train=False))()
    return task, variables, jax.tree.map(jnp.asarray, next(task.train_batches(0, 1)))


def test_the_loss_is_label_smoothing_per_token_as_fairseq_has_it():
    """(1 - e - e / v) nll + (e / v) sum over all others, in the sum over tokens."""
    task, variables, batch = started(make_run(**QUIET))
    loss = jax.jit(task.loss)(variables, batch, jax.random.key(0))
    logits, _ = jax.jit(task.model.apply)(variables, batch["source"], batch["target_input"])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    mask = np.asarray(batch["mask"], bool)
    gold = np.take_along_axis(log_p, batch["target"][..., None], -1)[..., 0]
    smooth = -(0.9 * gold + 0.1 * log_p.mean(-1))
    assert loss.weight == mask.sum() == np.sum(batch["target"] != tokenizers.PAD)
    assert float(loss.total) == pytest.approx(smooth[mask].sum(), rel=1e-5)
    assert float(loss.metrics["nll"][0]) == pytest.approx(-gold[mask].sum(), rel=1e-5)


def test_without_dropout_the_loss_is_exact():
    task, variables, batch = started(make_run(**QUIET))
    loss = jax.jit(task.loss)(variables, batch, jax.random.key(0))
    means = jax.jit(task.evaluators["validation"].metrics)(variables, batch)
    for name in ("loss", "nll"):
        np.testing.assert_allclose(loss.metrics[name][0], means[name][0], rtol=1e-6)


def test_dropout_of_a_batch_is_a_function_of_the_key():
    task, variables, batch = started(make_run(**{"model.dropout": "0.5"}))
    loss = jax.jit(task.loss)
    first, again, other = (loss(variables, batch, jax.random.key(n)).total for n in (0, 0, 1))
    assert first == again != other


def test_micro_batches_with_other_numbers_of_tokens_give_the_gradient_of_the_whole():
    task, variables, batch = started(make_run(**QUIET))
    gradient = jax.jit(accumulated_gradient, static_argnums=(0, 4))
    whole, _ = gradient(task.loss, variables, batch, jax.random.key(0), 1)
    parts, loss = gradient(task.loss, variables, batch, jax.random.key(0), 4)
    assert loss.weight == batch["mask"].sum()
    shares = np.asarray(batch["mask"]).sum(1).reshape(-1, 4).sum(0)
    assert len(set(shares)) > 1  # else this would not tell tokens from sentences
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, parts)


def test_every_sentence_is_scored_once_against_its_own_reference():
    task = create_task(make_run(**{"data.buckets": "2", "data.max_length": "48"}))
    evaluator = task.evaluators["validation"]
    batches = list(evaluator.batches())
    rows = sum(int(batch["mask"].any(1).sum()) for batch in batches)
    assert rows == 256 < sum(len(batch["index"]) for batch in batches)  # the last are filled up
    oracle = [
        {"index": np.where(b["mask"].any(1), b["index"], -1), "tokens": b["target"]}
        for b in reversed(batches)
    ]
    found = evaluator.finish({"nll": 0.5}, oracle)
    assert found["bleu"] == pytest.approx(100)
    assert found["chrf"] == pytest.approx(100)
    assert found["perplexity"] == pytest.approx(math.exp(0.5))
    assert {"bleu_1-15", "bleu_16-30"} < found.keys()
    shifted = [{**batch, "tokens": np.roll(batch["tokens"], 1, axis=0)} for batch in oracle]
    assert evaluator.finish({"nll": 0.5}, shifted)["bleu"] < 50


def test_one_endless_line_in_the_validation_split_does_not_take_all_memory(tmp_path, caplog):
    """20 short pairs and a line of 2,810 words took 12 GB, in 8 rows of it."""
    words = [f"w{i}" for i in range(60)]
    (tmp_path / "dict.txt").write_text("".join(f"{w} 1\n" for w in words))
    short = [f"w{i} w{i + 1}\tw{i + 2} w{i}\n" for i in range(20)]
    endless = " ".join(words[i % 60] for i in range(2810))
    (tmp_path / "train.tsv").write_text("".join(short))
    (tmp_path / "validation.tsv").write_text("".join(short) + f"{endless}\t{endless}\n")
    run = make_run(**{
        "steps": "1",
        "eval.batch_size": "512",
        "data.mock": "False",
        "data.files": f"('{tmp_path}/{{split}}.tsv',)",
        "data.tokenizer": "dict",
        "data.dicts": f"('{tmp_path}/dict.txt',)",
    })  # fmt: skip
    shapes = [b["source"].shape for b in create_task(run).evaluators["validation"].batches()]
    assert max(rows * length for rows, length in shapes) <= 512
    caplog.set_level("INFO")
    found = loop.train(run, tmp_path / "run")
    assert found["validation"]["count"] == 60
    _, again = evaluation.evaluate(tmp_path / "run")
    assert again["validation"]["bleu"] == pytest.approx(found["validation"]["bleu"])
    said = [line for line in caplog.messages if "text_pairs/validation" in line]
    assert len(said) == 2 and all("20 pairs" in s and "1 left out" in s for s in said)


def test_dictionaries_are_scored_as_tokenised_text_without_marks_of_subwords(tmp_path):
    """BLEU as the papers have it, and an unknown word of the reference stays one."""
    words = [f"w{i}" for i in range(30)]
    (tmp_path / "dict.txt").write_text("".join(f"{w} 1\n" for w in [*words, "lä@@", "uft"]))
    lines = "".join(f"w{i} lä@@ uft w{i + 1} .\tw{i} lä@@ uft w{i} w2 !\n" for i in range(29))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text(lines)
    overrides = {
        "data.mock": "False",
        "data.files": f"('{tmp_path}/{{split}}.tsv',)",
        "data.tokenizer": "dict",
        "data.dicts": f"('{tmp_path}/dict.txt',)",
    }
    evaluator = create_task(make_run(**overrides)).evaluators["validation"]
    oracle = [
        {"index": np.where(b["mask"].any(1), b["index"], -1), "tokens": b["target"]}
        for b in evaluator.batches()
    ]
    found = evaluator.finish({"nll": 0.5}, oracle)
    # of six words one is unknown, "!": n-gram precisions 4/5, 3/4, 2/3, 1/2
    assert found["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "overrides", "tokenizer"),
    [
        ("{split}.en-zh.zh", {}, "zh"),
        ("{split}.target", {}, "zh"),  # by the text
        ("{split}.de", {"task.bleu_tokenizer": "char"}, "char"),
    ],
)
def test_bleu_of_chinese_counts_characters(tmp_path, name, overrides, tokenizer):
    """Evaluations gave 0 for translations that were right but for one character in 20."""
    text = "今天的天气很好我们一起去公园散步吧好吗"
    lines = [chr(0x4E00 + i) + text for i in range(40)]
    for split in ("train", "validation"):
        (tmp_path / name.format(split=split)).write_text("\n".join(lines))
        (tmp_path / f"{split}.en").write_text("\n".join(f"sentence {i}" for i in range(40)))
    files = f"('{tmp_path}/{{split}}.en', '{tmp_path}/{name}')"
    run = make_run(**{"data.mock": "False", "data.files": files, "data.vocab": "400", **overrides})
    evaluator = create_task(run).evaluators["validation"]
    assert f"tok:{tokenizer}|" in evaluator.summary
    source = pipeline.open_eval(run.data, "validation", tokenizers.create(run.data, lines, lines))
    wrong = [f"{line[:10]}錯{line[11:]}" for line in source.text.targets]
    ids = source.tokenizers.target.encode(wrong)
    found = translation.score(
        source,
        [{"index": np.arange(len(ids)), "tokens": [[*line, tokenizers.EOS] for line in ids]}],
        {"tokenize": tokenizer},
    )
    assert round(found["bleu"], 1) == 85.8


def test_two_vocabularies_do_not_share_embeddings(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i} 1\n" for i in range(9)))
        (tmp_path / f"train.{name}").write_text(f"{name}1 {name}2\n" * 99)
    overrides = {
        "data.mock": "False",
        "data.files": f"('{tmp_path}/{{split}}.a', '{tmp_path}/{{split}}.b')",
        "data.tokenizer": "dict",
        "data.dicts": f"('{tmp_path}/a.txt', '{tmp_path}/b.txt')",
        "data.eval_splits": "train",
    }
    with pytest.raises(ValueError, match=r"model\.embeddings"):
        create_task(make_run(**overrides))
    task = create_task(make_run(**overrides, **{"model.embeddings": "separate"}))
    assert list(task.evaluators) == ["train_eval"]  # "train" names the lines of training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("translation") / "run"
    run = make_run(**{"task.beam": "2", "checkpoint.every": "1", "checkpoint.keep": "4"})
    loop.train(run, workdir)
    return workdir


def test_the_workdir_keeps_the_vocabulary(trained):
    found = tokenizers.load(trained / "tokenizer")
    module, _ = load(trained)
    assert (module.source_vocab, module.target_vocab) == (found.source.size, found.target.size)


def test_without_its_vocabulary_a_run_is_not_evaluated(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ValueError, match=f"{copy} .*tokenizer"):
        evaluation.evaluate(copy)


def test_checkpoints_are_averaged(trained):
    leaves = [jax.tree.leaves(load(trained, step)[1]) for step in (2, 3, 4)]
    _, mean = load(trained, average=3)
    for *three, found in zip(*leaves, jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(found, np.mean(three, 0), rtol=1e-6, atol=1e-8)
    _, earlier = load(trained, 3, average=2)
    for _, *two, found in zip(leaves[2], *leaves[:2], jax.tree.leaves(earlier), strict=True):
        np.testing.assert_allclose(found, np.mean(two, 0), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match=r"average=5.*4"):
        load(trained, average=5)


def test_an_average_names_its_steps_and_does_not_reach_over_a_gap(trained, tmp_path, caplog):
    """Prime#8, #9, fairseq#602: the best step, kept from long ago, was averaged with the newest."""
    caplog.set_level("INFO")
    evaluation.evaluate(trained, average=2, overrides={"task.beam": "0"})
    assert "average  of the steps 3, 4" in caplog.messages
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "checkpoints" / "2")  # 1 is kept, as the best is
    with pytest.raises(ValueError, match=r"average=3.* 1, 3, 4.*\b2 \(--average\)"):
        load(copy, average=3)
    with pytest.raises(ValueError, match=r"average=2.* 1, 3"):
        load(copy, 3, average=2)
    load(copy, average=2)


@pytest.mark.parametrize(
    ("steps", "saving", "most"),
    [
        ((10, 50, 60), {"every": 10}, 2),
        ((100, 200, 300), {"every": 10, "keep_every": 100}, None),
        ((100, 200, 300), {"every": 10, "keep_every": 50}, 1),
        ((100, 290, 300), {"every": 10, "keep_every": 100}, 2),
        ((40, 43, 50), {"every": 10}, None),  # 43: stopped by a signal
        ((10, 60), {"every": 0}, None),  # saved at its end only, and resumed
        ((10, 60), {}, None),  # converted weights
    ],
)
def test_neighbours_among_the_checkpoints(steps, saving, most):
    metadata = [{"config": {"checkpoint": saving}} if saving else {}] * len(steps)
    if most is None:
        return inference_load.check_neighbours(steps, metadata, "average")
    with pytest.raises(ValueError, match=rf"at most {most} \(--average\)"):
        inference_load.check_neighbours(steps, metadata, "average")


def test_another_vocabulary_than_it_began_with_is_refused(trained, tmp_path):
    """It is read, not made anew; and with other words, batches would hold other ids."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    run = make_run(**{"task.beam": "2", "checkpoint.every": "1", "checkpoint.keep": "4"})
    before = (copy / "tokenizer" / "joint.txt").read_bytes()
    words = tokenizers.Dictionary([f"other{i}" for i in range(396)])
    tokenizers.save(tokenizers.Tokenizers(words, words), copy / "tokenizer")
    with pytest.raises(ValueError, match=r"step 4: .*pairs"):
        loop.train(run, copy)
    assert (copy / "tokenizer" / "joint.txt").read_bytes() == words.dump() != before


def test_fine_tuning_takes_weights_and_vocabulary(trained, tmp_path, monkeypatch):
    untouched = {"optim.learning_rate": "1e-9", "data.eval_splits": "()", "checkpoint.best": "None"}
    lengths = {"data.buckets": "2", "data.max_length": "48"}
    run = make_run(**{"init": str(trained), **lengths, **untouched})
    compiled = []
    real = placement.Partitioner.compile_step

    def remember(*args):
        compiled.append(real(*args))
        return compiled[0]

    monkeypatch.setattr(placement.Partitioner, "compile_step", remember)
    loop.train(run, tmp_path / "run")
    shapes = {batch["source"].shape for batch in create_task(run).train_batches(0, 4)}
    assert compiled[0]._cache_size() == len(shapes) == 2  # each shape is compiled once
    (_, old), (_, new) = load(trained), load(tmp_path / "run")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), old, new)
    step = make_run(**{"init": str(trained / "checkpoints" / "4"), "steps": "1", **untouched})
    loop.train(step, tmp_path / "step")
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6), old, load(tmp_path / "step")[1]
    )
    assert load_translator(trained / "checkpoints" / "4").translate(["a b"], beam=1)
    wider = make_run(**{"model.hidden": "(48, 48)", "init": str(trained)})
    with pytest.raises(ValueError, match="shape"):
        loop.train(wider, tmp_path / "wider")
    assert not (tmp_path / "wider").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.source_vocab": "300"}, "model.source_vocab"),
        ({"data.rows_multiple": "6", "optim.accumulate": "4"}, "data.rows_multiple=6"),
        ({"data.files": "('a.tsv',)"}, "mock=True"),
        ({"model.dropout": "2.0"}, "dropout"),
        ({"model.blocks.M.windows": "(3, 3)"}, "windows"),
        ({"batch_size": "64"}, "batch_size=64 .*data.rows_multiple=8"),
        ({"checkpoint.best": "validation/blue"}, "checkpoint.best.*validation/bleu"),
        # fairseq#1910, #1912: these kept the worst
        ({"checkpoint.best": "validation/loss"}, '"-validation/loss"'),
        ({"checkpoint.best": "validation/nll"}, '"-validation/nll"'),
        ({"checkpoint.best": "validation/perplexity"}, '"-validation/perplexity"'),
        ({"checkpoint.best": "-validation/bleu"}, '"validation/bleu"'),
        ({"checkpoint.best": "-validation/accuracy"}, '"validation/accuracy"'),
    ],
)
def test_refused_before_anything_is_written(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loop.train(make_run(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_evaluation_in_other_batches(trained):
    """Two devices (see conftest), and rows of other sentences beside each."""
    assert placement.make_mesh({"data": -1}).size == 2
    few, many = (
        evaluation.evaluate(trained, overrides={"eval.batch_size": size, "task.beam": "1"})[1]
        for size in ("512", "4096")
    )
    for name in ("bleu", "accuracy", "count"):
        assert few["validation"][name] == many["validation"][name]
    assert few["validation"]["loss"] == pytest.approx(many["validation"]["loss"], rel=1e-5)


def test_checkpoints_without_their_words_get_no_new_ones(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} .*tokenizer"):
        create_task(make_run(), workdir=tmp_path)


def test_text_may_move_but_not_change(tmp_path, monkeypatch):
    """lightning#15705, ray#28082: another folder was "another config", or could not be read."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for split in ("train", "validation"):
        lines = [f"this is sentence {i}\tdas ist Satz {i}\n" for i in range(60)]
        pathlib.Path(f"{split}.tsv").write_text("".join(lines))

    def run(files, steps):
        return make_run(**{
            "steps": str(steps), "task.beam": "0", "data.mock": "False", "data.vocab": "300",
            "data.files": f"('{files}',)", "checkpoint.best": "None", "checkpoint.every": "1",
            "optim.schedule": "constant",
        })  # fmt: skip

    workdir = tmp_path / "run"
    loop.train(run("{split}.tsv", 1), workdir)
    monkeypatch.chdir(tmp_path)
    _, found = evaluation.evaluate(workdir)  # the config names an absolute path
    shutil.copytree("here", "there")
    shutil.rmtree("here")
    _, again = evaluation.evaluate(workdir, overrides={"data.files": "there/{split}.tsv"})
    assert found == again
    assert set(loop.train(run("there/{split}.tsv", 1), workdir)) == {"train", "validation"}
    with pathlib.Path("there/train.tsv").open("a") as file:
        file.write("one more\teiner mehr\n")
    with pytest.raises(ValueError, match=r"step 1: 60 pairs .* 61 pairs"):
        loop.train(run("there/{split}.tsv", 1), workdir)
