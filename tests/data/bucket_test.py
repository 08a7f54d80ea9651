# SPDX-License-Identifier: Apache-2.0
"""Data in a bucket gives the batches, parameters and metrics of the same data on disk."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap

import cv2
import jax
import numpy as np
import pytest
import small
from etils import epath

import localglobal_jax as lg
from localglobal_jax.checkpoints import reader
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, schema
from localglobal_jax.data import loader
from localglobal_jax.data.images import folder, folder_count
from localglobal_jax.data.images import pipeline as images
from localglobal_jax.data.text import pairs
from localglobal_jax.data.text import pipeline as texts
from localglobal_jax.training.reporting.run import of_the_machine

WORDS = ["the", "a", "dialog", "opens", "closes", "menu", "button", "file", "window", "page"]


def put(directory, bucket):
    """Copies a directory into a bucket, past the code under test."""
    for path in pathlib.Path(directory).rglob("*"):
        if path.is_file():
            (epath.Path(bucket) / path.relative_to(directory)).write_bytes(path.read_bytes())


def picture(i, channels=3):
    shape = (20 + i % 5, 24, channels)[: 2 + (channels > 1)]
    pixels = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def sentence(rng):
    return " ".join(rng.choice(WORDS, rng.integers(2, 12)))


@pytest.fixture
def sets(tmp_path, data_dir, make_tfds, make_translations):
    """A data directory with sets of images, of one and of three channels, and of sentences."""
    root = tmp_path / "data"
    shutil.copytree(f"{data_dir}/digits", root / "digits")
    make_tfds(root, "photos", [(picture(i), i % 10) for i in range(30)], channels=3)
    rng = np.random.default_rng(0)
    sentences = [{"de": sentence(rng), "en": sentence(rng)} for _ in range(80)]
    make_translations(root, "sentences", sentences)
    return root


def same(there, here):
    for one, other in zip(there, here, strict=True):
        assert one.keys() == other.keys()
        for key in other:
            np.testing.assert_array_equal(one[key], other[key], strict=True)


IMAGES = {
    "digits": dict(name="digits", crop="pad", pad=1, flip=True, train_split="train[:200]"),
    "digits, not in memory": dict(name="digits", in_memory=False),
    "photos": dict(
        name="photos", image_size=(16, 16), crop="resized", randaugment_layers=1, in_memory=False
    ),
    "a part": dict(name="photos", train_split="train[5:70%]", image_size=(16, 16)),
}


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_batches_of_images_on_any_number_of_hosts(sets, bucket, options):
    put(sets, bucket)

    def batches(root, shard=(0, 1)):
        chosen = schema.Images(dir=str(root), **options)
        source = images.open_split(chosen, chosen.train_split, train=True)
        found = loader.train_batches(
            source, batch_size=8, seed=3, start=1, stop=6, shard=shard, threads=2
        )
        return list(found)

    here = batches(sets)
    same(batches(bucket), here)
    both = [batches(bucket, (host, 2)) for host in range(2)]
    joined = [
        {key: np.concatenate([one[key], other[key]]) for key in one}
        for one, other in zip(*both, strict=True)
    ]
    same(joined, here)


def test_batches_of_sentences_on_any_number_of_hosts(sets, bucket):
    put(sets, bucket)

    def batches(root, shard=(0, 1)):
        options = schema.Text(name="sentences/de-en", dir=str(root), vocab=300, rows_multiple=2)
        source = texts.open_train(options)
        given = dict(tokens=256, multiple=2, seed=0, shard=shard)
        return list(texts.train_batches(source, start=0, stop=6, **given))

    here = batches(sets)
    same(batches(bucket), here)
    both = [batches(bucket, (host, 2)) for host in range(2)]
    for one, other, whole in zip(*both, here, strict=True):
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([one[key], other[key]]), whole[key])


@pytest.mark.slow  # in the suite two hosts are two sources in one process, see above
def test_two_hosts_read_their_parts_in_processes_of_their_own(sets, bucket):
    """As on a pod: each host opens the bucket itself, at the same time as the other."""
    put(sets, bucket)
    code = """
        import pickle, sys
        from localglobal_jax.config.schema import Images
        from localglobal_jax.data import loader
        from localglobal_jax.data.images import pipeline
        root, host, hosts = sys.argv[1], *map(int, sys.argv[2:])
        source = pipeline.open_split(Images(dir=root, in_memory=False), "train", train=True)
        given = dict(batch_size=8, seed=3, start=0, stop=4, shard=(host, hosts))
        pickle.dump(list(loader.train_batches(source, **given)), sys.stdout.buffer)
    """

    def start(root, host, hosts):
        command = [sys.executable, "-c", textwrap.dedent(code), str(root), str(host), str(hosts)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    started = [start(bucket, 0, 2), start(bucket, 1, 2), start(sets, 0, 1)]
    one, other, whole = (pickle.loads(p.communicate(timeout=600)[0]) for p in started)
    same(
        [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(one, other, strict=True)],
        whole,
    )


# ------------------------------------------------------------------------------------------ runs


def lines_of(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not of_the_machine(k)} for line in lines]


RUNS = {
    "coatnet": ("coatnet_digits", {**small.IMAGES, "data.name": "digits"}),
    "muse": (
        "muse_lohelp",
        {
            **small.TEXT,
            "data.name": "sentences/de-en",
            "data.vocab": 300,
            "data.train_split": "train",
            "data.eval_splits": ("validation",),
        },
    ),
}


@pytest.mark.parametrize("family", RUNS)
def test_a_run_on_data_in_a_bucket_is_the_run_on_disk_bit_for_bit(family, sets, bucket, tmp_path):
    file, fields = RUNS[family]
    if family == "muse":  # the digits are prepared there by the run
        put(sets, bucket)
    config = f"{pathlib.Path(__file__).parents[2]}/configs/{file}.py:size=tiny"
    short = {"steps": 3, "eval.every": 3, "checkpoint.every": 3, "optim.warmup_steps": 1}
    states, lines = [], []
    for name, root in (("disk", str(sets)), ("bucket", bucket)):
        given = {"data.dir": root, **short, **fields}
        overrides = {key: str(value) for key, value in given.items()}
        lg.train(loading.load(config, overrides), tmp_path / name)
        step, state, _ = reader.read(tmp_path / name)
        assert step == 3
        states.append(state)
        lines.append(lines_of(tmp_path / name))
    assert lines[0] == lines[1] and lines[0][-1]["step"] == 3
    if family == "coatnet":
        assert [path.name for path in (epath.Path(bucket) / "digits").iterdir()] == ["1.0.0"]
    here, there = map(jax.tree.leaves, states)
    for x, y in zip(here, there, strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


# --------------------------------------------------------------------------- one's own files


@pytest.fixture
def pictures(tmp_path):
    for i in range(40):
        for name in ("cat", "dog/more"):
            path = tmp_path / "mine" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i + (name == "cat")))
    return tmp_path / "mine"


def test_folders_of_pictures(pictures, bucket, capsys):
    put(pictures, bucket)
    assert folder_count.count(bucket) == folder_count.count(str(pictures))
    config = "--config=configs/finetune_folder.py:size=tiny"
    assert main(["prepare", config, f"--config.data.dir={bucket}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == folder_count.count(str(pictures))

    def batches(root):
        options = schema.Images(name="folder", dir=str(root), image_size=(16, 16), in_memory=False)
        source = images.open_split(options, "train", train=True)
        return list(loader.train_batches(source, batch_size=8, seed=0, start=0, stop=3))

    same(batches(bucket), batches(pictures))
    (epath.Path(bucket) / "cat/0.png").write_bytes(b"no picture")
    assert main(["prepare", config, f"--config.data.dir={bucket}"]) == 2
    assert f"{bucket}/cat/0.png: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data\.dir"):
        folder.classes(f"{bucket}/nowhere")
    with pytest.raises(ValueError, match="gs://no-such-bucket-here"):
        folder.classes("gs://no-such-bucket-here/x")


def test_files_of_sentences(tmp_path, bucket, capsys):
    rng = np.random.default_rng(0)
    for name in ("a.de", "a.en"):
        lines = [f"{i} {sentence(rng)}" for i in range(200)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        (epath.Path(bucket) / name).write_text("\n".join(lines) + "\n")
    here, there = (
        schema.Text(files=(f"{root}/a.de", f"{root}/a.en"), vocab=100)
        for root in (tmp_path, bucket)
    )
    for split in ("train", "validation"):
        assert pairs.read(there, split) == pairs.read(here, split)
    command = ["prepare", "--config=configs/muse_lohelp.py:size=tiny", "--json"]
    files = f"--config.data.files=('{bucket}/a.de', '{bucket}/a.en')"
    assert main([*command, files]) == 0
    assert json.loads(capsys.readouterr().out) == pairs.count(here)
    with pytest.raises(ValueError, match=f"{bucket}/b.en"):
        pairs.read(schema.Text(files=(f"{bucket}/a.de", f"{bucket}/b.en")), "train")
