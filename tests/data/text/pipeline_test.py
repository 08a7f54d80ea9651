# SPDX-License-Identifier: Apache-2.0
import collections
import functools

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.config import schema
from localglobal_jax.data.text import pairs, pipeline
from localglobal_jax.data.text.bucketing import ATTENTION, Budget
from localglobal_jax.data.text.tokenizers import EOS, PAD, Dictionary, Tokenizers

SOME = settings(deadline=None, max_examples=20)
MOCK = schema.Text(mock=True, vocab=40, max_length=20, buckets=3)


@functools.cache
def mock():
    return pipeline.open_train(MOCK)


def small(lengths, **kwargs):
    """Pairs of ``(source words, target words)``; word k of pair i is a number of its own."""
    words = Dictionary([f"w{i}" for i in range(500)])

    def line(i, n):
        return " ".join(f"w{(7 * i + k) % 500}" for k in range(n))

    made = pairs.Pairs(
        [line(i, n) for i, (n, _) in enumerate(lengths)],
        [line(i + 1, n) for i, (_, n) in enumerate(lengths)],
        {"read": len(lengths)},
    )
    return pipeline.TextSource(Tokenizers(words, words), made, **kwargs), made


LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40)


def words_of(batch, key, row, decoder):
    return decoder.decode(batch[key][row])


def check_batch(batch, source, made):
    """Every array of a batch says the same as the pairs it is made of."""
    rows, length = batch["source"].shape
    assert length in source.edges
    for row, i in enumerate(batch["index"].tolist()):
        decoder = source.tokenizers.target
        assert decoder.decode(batch["source"][row]) == made.sources[i]
        assert decoder.decode(batch["target"][row]) == made.targets[i]
        n = len(made.targets[i].split()) + 1
        assert batch["target"][row, n - 1] == EOS
        assert (batch["target"][row, n:] == PAD).all()
        assert batch["target_input"][row, 0] == EOS
        np.testing.assert_array_equal(
            batch["target_input"][row, 1:n], batch["target"][row, : n - 1]
        )
        assert (batch["target_input"][row, n:] == PAD).all()
        if batch["mask"][row].any():
            np.testing.assert_array_equal(batch["mask"][row], np.arange(length) < n)
    for key in ("source", "target", "target_input"):
        assert batch[key].shape == (rows, length) and batch[key].dtype == np.int32
    assert batch["mask"].dtype == np.float32 and batch["index"].dtype == np.int32


@SOME
@given(lengths=LENGTHS, count=st.integers(1, 4), hosts=st.sampled_from([1, 2, 4]))
def test_evaluation_sees_every_pair_once(lengths, count, hosts):
    source, made = small(lengths, count=count)
    parts = [
        list(pipeline.eval_batches(source, budget=Budget(200, 4), shard=(host, hosts)))
        for host in range(hosts)
    ]
    seen, total = collections.Counter(), 0.0
    for step in zip(*parts, strict=True):
        assert len({batch["source"].shape for batch in step}) == 1
        for batch in step:
            check_batch(batch, source, made)
            real = batch["mask"].any(axis=1)
            seen.update(batch["index"][real].tolist())
            total += batch["mask"].sum()
    assert seen == dict.fromkeys(range(len(lengths)), 1)
    assert total == source.tokens == sum(n + 1 for _, n in lengths)
    assert source.text is made


@SOME
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 2**40),
    start=st.integers(0, 12),
    hosts=st.sampled_from([1, 2, 4]),
    threads=st.integers(1, 3),
)
def test_hosts_threads_and_resuming_change_nothing(lengths, seed, start, hosts, threads):
    source, made = small(lengths, count=3, max_length=32)
    settings = dict(tokens=128, multiple=4, seed=seed, stop=16)
    whole = list(pipeline.train_batches(source, start=0, **settings))
    assert len(whole) == 16
    for batch in whole:
        check_batch(batch, source, made)
        assert batch["mask"].any(axis=1).all()
        rows, length = batch["source"].shape
        assert rows % 4 == 0 and rows * length <= 128
    parts = [
        list(
            pipeline.train_batches(
                source, start=start, shard=(host, hosts), threads=threads, **settings
            )
        )
        for host in range(hosts)
    ]
    for batch, step in zip(whole[start:], zip(*parts, strict=True), strict=True):
        for key in batch:
            together = np.concatenate([part[key] for part in step])
            np.testing.assert_array_equal(together, batch[key], strict=True)


def test_too_long_pairs_are_counted_and_only_training_leaves_them_out():
    source, _ = small([(3, 3), (9, 2), (2, 9), (8, 8)], max_length=9)
    assert source.counts == {"read": 4, "left out: more than 9 tokens": 2, "used": 2}
    assert "2 left out: more than 9 tokens" in source.summary
    evaluated, _ = small([(3, 3), (90, 2)], edges=source.edges)
    assert evaluated.counts == {"read": 2, "used": 2}
    assert evaluated.edges == (*source.edges, 96)  # the lengths of training, and one that holds it
    shapes = [b["source"].shape for b in pipeline.eval_batches(evaluated, budget=Budget(160, 8))]
    assert shapes == [(8, 16), (8, 96)]
    with pytest.raises(ValueError, match=r"read: 1.*tokens: 1"):
        small([(9, 9)], max_length=4)


@SOME
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    tokens=st.integers(256, 8192),
    parts=st.sampled_from([1, 2, 4]),
)
def test_batches_of_an_evaluation_keep_the_budget_of_training(lengths, tokens, parts):
    """Public reports: one line of thousands of words took more memory than the training."""
    budget = Budget(tokens, 8, parts, max_length=64)
    lengths = [(5, 5), *((n, 3) for n in lengths)]  # one is always short enough
    source, _ = small(lengths, edges=(8, 16, 64), budget=budget)
    fitting = [i for i, (n, _) in enumerate(lengths) if n + 1 <= budget.longest]
    assert len(source) == len(source.text.sources) == len(fitting)
    seen = collections.Counter()
    for batch in pipeline.eval_batches(source, budget=budget):
        rows, length = batch["source"].shape
        assert rows % parts == 0
        assert rows * length <= tokens or (rows == parts and length <= 64)
        assert rows * length**2 <= ATTENTION * tokens * 64 or (rows == parts and length <= 64)
        check_batch(batch, source, source.text)
        seen.update(batch["index"][batch["mask"].any(axis=1)].tolist())
    assert seen == dict.fromkeys(range(len(fitting)), 1)
    assert source.counts["read"] == len(lengths)
    left_out = len(lengths) - len(fitting)
    if left_out:
        needed = budget.tokens_for(max(n + 1 for n, _ in lengths))
        assert f"{left_out} left out: more than {budget.longest} tokens" in source.summary
        assert f"eval.batch_size={needed}" in source.summary
        roomy = Budget(needed, 8, parts, max_length=64)
        assert len(small(lengths, edges=(8, 16, 64), budget=roomy)[0]) == len(lengths)


def test_shapes_are_few():
    shapes = {b["source"].shape for b in pipeline.train_batches(
        mock(), tokens=512, multiple=8, seed=0, start=0, stop=200)}  # fmt: skip
    assert len(shapes) == len(mock().edges) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tokens=100, multiple=8), "batch_size=100 .*192"),
        (dict(tokens=512, multiple=6, shard=(0, 4)), "rows_multiple=6 .* 4 "),
        (dict(tokens=512, multiple=8, shard=(2, 2)), r"shard \(2, 2\)"),
    ],
)
def test_refuses_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.train_batches(mock(), seed=0, start=0, stop=1, **arguments)


# ------------------------------------------------------------------------------------------ mock


def test_the_mock_language_can_be_learned():
    """Each word has one translation, and the order is reversed, in all splits alike."""
    meanings = {}
    for split in ("train", "validation", "test"):
        made = pairs.read(MOCK, split)
        assert made.sources[:50] == pairs.read(MOCK, split).sources[:50]
        for source, target in zip(made.sources, made.targets, strict=True):
            for a, b in zip(source.split(), reversed(target.split()), strict=True):
                assert meanings.setdefault(a, b) == b
    assert len(meanings) == len(set(meanings.values())) == 36
    train, held_out = (pairs.read(MOCK, split) for split in ("train", "validation"))
    assert train.sources != held_out.sources
    assert mock().tokenizers.joint and mock().tokenizers.source.size == 40
    evaluation = pipeline.open_eval(MOCK, "validation", mock().tokenizers)
    assert len(evaluation.edges) <= MOCK.buckets  # of its own: training was not opened for it


# ------------------------------------------------------------------------------------------ TFDS


def test_a_prepared_wmt_set_is_read_by_its_standard_name(tmp_path, make_translations):
    """TFDS does not even know the name where TensorFlow is missing; the directory is enough."""
    examples = [
        {"de": f"Satz  {i} \u00a0ist gut", "en": f"sentence {i} is good"} for i in range(50)
    ]
    examples += [{"de": " ", "en": "nothing"}, {"de": "nichts", "en": ""}]
    make_translations(tmp_path, "wmt14_translate", examples)
    options = schema.Text(name="wmt14_translate/de-en", dir=str(tmp_path), vocab=300)
    made = pairs.read(options, "train")
    assert made.counts["read"] == 52
    assert made.counts["left out: a side is empty"] == 2
    found = dict(zip(made.sources, made.targets, strict=True))
    assert found == {f"Satz {i} ist gut": f"sentence {i} is good" for i in range(50)}
    assert len(pairs.read(options, "train[:10%]").sources) <= 6
    turned = options.model_copy(update={"source": "en"})
    assert pairs.read(turned, "train").targets == made.sources
    source = pipeline.open_train(options)
    assert len(source) == 50
    evaluation = pipeline.open_eval(options, "validation", source.tokenizers, source.edges)
    (first, *_) = pipeline.eval_batches(evaluation, budget=Budget(512, 8))
    i = int(first["index"][0])
    assert source.tokenizers.target.decode(first["target"][0]) == evaluation.text.targets[i]
    for wrong, message in (
        ({"source": "eng"}, '"eng".*"en"'),
        ({"source": "de", "target": "de"}, "data.source=de .*data.target=de"),
        ({"name": "wmt14_translate/fr-en"}, "wmt14_translate/fr-en"),
        ({"dir": str(tmp_path / "nowhere")}, "wmt14_translate"),
    ):
        with pytest.raises(ValueError, match=message):
            pairs.read(options.model_copy(update=wrong), "train")
    with pytest.raises(ValueError, match=r'"trian" .*train'):
        pairs.read(options, "trian")


@pytest.mark.parametrize(
    ("name", "languages"),
    [
        ("ted_hrlr_translate/pt_to_en", ("pt", "en")),
        ("opus/medical", ("de", "en")),
        ("para_crawl/enbg", ("en", "bg")),
    ],
)
def test_sets_that_tfds_knows(name, languages, tmp_path):
    with tfds.testing.mock_data(
        num_examples=7, policy=tfds.testing.MockPolicy.USE_CODE, data_dir=str(tmp_path)
    ):
        options = schema.Text(name=name, dir=str(tmp_path))
        made = pairs.read(options, "train")
        assert len(made.sources) + made.counts["left out: a side is empty"] == 7
        assert pairs.languages(tfds.builder(name, data_dir=str(tmp_path)).info) == languages


def test_a_set_without_two_languages(tmp_path, data_dir):
    with pytest.raises(ValueError, match=r"digits/1\.0\.0"):
        pairs.read(schema.Text(name="digits", dir=data_dir), "train")
    with pytest.raises(ValueError, match="localglobal prepare lohelp_translate/en-de"):
        pairs.read(schema.Text(dir=str(tmp_path)), "train")


def test_unreadable_records_stop_or_are_counted(tmp_path, make_translations):
    make_translations(tmp_path, "wmt14_translate", [{"de": f"Satz {i}", "en": f"sentence {i}"}
                                                     for i in range(100)])  # fmt: skip
    (file,) = tmp_path.rglob("*train.array_record*")
    data = bytearray(file.read_bytes())
    at = data.find(b"Satz ")
    if at < 0:
        at = len(data) // 2
    data[at + 1] ^= 0xFF
    file.write_bytes(data)
    options = schema.Text(name="wmt14_translate/de-en", dir=str(tmp_path))
    with pytest.raises(ValueError, match=file.name):
        pairs.read(options, "train")
    made = pairs.read(options.model_copy(update={"max_bad_records": 100}), "train")
    bad = made.counts["left out: unreadable record"]
    assert bad > 0 and len(made.sources) == 100 - bad


# ----------------------------------------------------------------------------------------- files


def test_own_files_become_batches(tmp_path):
    lines = [(f"das ist Satz {i}", f"this is sentence {i}") for i in range(400)]
    lines[7] = ("", "nobody said this")
    for n, name in enumerate(("a.de", "a.en")):
        (tmp_path / name).write_text("".join(f"{line[n]}\n" for line in lines))
    files = (str(tmp_path / "a.de"), str(tmp_path / "a.en"))
    options = schema.Text(files=files, vocab=300)
    assert options.name == "text_pairs"
    counts = pairs.count(options)
    source = pipeline.open_train(options)
    evaluation = pipeline.open_eval(options, "validation", source.tokenizers, source.edges)
    assert counts["train"] == len(source) and counts["validation"] == len(evaluation)
    assert sum(n for key, n in pairs.count(
        options.model_copy(update={"eval_splits": ("validation", "test")})
    ).items()) == 400  # fmt: skip
    assert not set(evaluation.text.sources) & set(pairs.read(options, "train").sources)
    again = pipeline.open_train(options, source.tokenizers)
    assert again.tokenizers is source.tokenizers
