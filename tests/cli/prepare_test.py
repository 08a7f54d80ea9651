# SPDX-License-Identifier: Apache-2.0
"""`localglobal prepare`: counts, and errors in the data."""

import json

import pytest

from localglobal_jax.cli.main import main


def test_prepare_prints_counts(data_dir, capsys):
    assert main(["prepare", "digits", f"--dir={data_dir}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"test": 360, "train": 1437}
    assert main(["prepare"]) == 2
    assert "--config" in capsys.readouterr().err


def test_prepare_counts_the_pairs_of_own_files(tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n"
        "    return ConfigDict(dict(model=dict(name='muse'), task=dict(name='translation')))\n"
    )
    (tmp_path / "pairs.tsv").write_text(
        "".join(f"eins {i}\tone {i}\n" for i in range(99)) + "x\t\n"
    )
    command = ["prepare", f"--config={tmp_path}/c.py", f"--config.data.files={tmp_path}/pairs.tsv"]
    assert main([*command, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert sum(counts.values()) == 100 and counts["train"] > 80 and counts["test"]
    (tmp_path / "pairs.tsv").write_text("a\tb\nc\n")
    assert main(command) == 2
    assert "line 2" in capsys.readouterr().err


def test_a_set_that_is_there_is_said_to_be_there(data_dir, capsys):
    assert main(["prepare", "digits", f"--dir={data_dir}"]) == 0
    assert f"{data_dir}/digits/1.0.0 is there already" in capsys.readouterr().err


def test_splits_that_the_set_lacks_are_named(data_dir, capsys):
    command = ["prepare", "--config=configs/coatnet_digits.py", f"--config.data.dir={data_dir}"]
    assert main([*command, "--config.data.eval_splits=trian"]) == 2
    assert "trian" in capsys.readouterr().err


def test_a_set_that_is_there_in_a_bucket_is_not_sent_again(bucket, faults, capsys):
    command = ["prepare", "digits", f"--dir={bucket}"]
    assert main(command) == 0
    assert "is there already" not in capsys.readouterr().err
    faults.clear()
    assert main(command) == 0
    assert f"{bucket}/digits/1.0.0 is there already" in capsys.readouterr().err
    assert {method for method, _, _ in faults.requests} == {"GET"}


@pytest.mark.parametrize("option", ["dir", "from_tfrecord", "index"])
@pytest.mark.parametrize("path", ["gs:/bucket/x", "gs://bucket", "gs://bucket/", "s3://b/x"])
def test_the_option_of_a_wrong_path_is_named(option, path, capsys):
    name = ["digits"] if option == "dir" else []
    assert main(["prepare", *name, f"--{option}={path}"]) == 2
    said = capsys.readouterr().err
    assert f"--{option}" in said and path in said and "data.dir" not in said
    assert ("gs://bucket/runs" in said) == (path in ("gs://bucket", "gs://bucket/"))


@pytest.mark.parametrize("config", ["coatnet_imagenet", "finetune_folder", "muse_lohelp"])
def test_mock_data_are_counted_and_nothing_is_prepared(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert main(["prepare", "--config", f"configs/{config}.py:data=mock", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given",
    [
        ["digits", "--config=configs/coatnet_digits.py"],
        ["digits", "--from_tfrecord=gs://bucket/digits"],
        ["digits", "--config.data.dir=elsewhere"],
        ["folder", "--config.data.dir=pictures"],
        ["folder"],
        ["--config=configs/coatnet_digits.py:data=mock", "--source=downloads"],
        ["--index=gs://bucket/digits", "--source=downloads"],
        ["--index=gs://bucket/digits", "--dir=elsewhere"],
        ["--config=configs/coatnet_digits.py:data=mock", "--dir=elsewhere"],
        ["--config=configs/coatnet_digits.py:data=mock", "--from_tfrecord=elsewhere"],
        ["--config=configs/muse_lohelp.py:data=mock", "--from_tfrecord=elsewhere"],
    ],
    ids=" ".join,
)
def test_an_option_that_would_not_be_read_is_refused(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert main(["prepare", *given]) == 2
    assert "--" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
