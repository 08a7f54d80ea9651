# SPDX-License-Identifier: Apache-2.0
"""Models by their names on the hub, from a server with its routes, by huggingface_hub itself."""

import pathlib
import sys
import tarfile

import hub_server
import jax
import numpy as np
import pytest

import localglobal_jax as lg
from localglobal_jax.cli.main import main
from localglobal_jax.data.text import tokenizers
from localglobal_jax.inference import export, hub

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "workdirs" / "4f09b88"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Exported models of images and of text."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("coatnet", "muse"):
        with tarfile.open(GOLDEN / f"{family}.tar.gz") as archive:
            archive.extractall(folder / "runs", filter="data")
        export.export(folder / "runs" / family, folder / family)
    return folder


@pytest.fixture
def server(models, tmp_path, monkeypatch):
    """A hub, to which a huggingface_hub that is imported anew talks."""

    def anew():
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            monkeypatch.delitem(sys.modules, name)

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.serve() as (found, url):
        found.add("someone/digits", models / "coatnet")
        found.add("someone/translation", models / "muse")
        monkeypatch.setenv("HF_ENDPOINT", url)
        anew()
        yield found
    anew()


def bits(variables):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(variables)]


def test_a_name_of_the_hub_is_loaded_then_taken_from_the_cache(server, models, tmp_path):
    (models / "coatnet" / "evil.py").write_text("raise SystemExit")
    module, variables = lg.load("hf://someone/digits")
    expected, others = lg.load(models / "coatnet")
    assert module == expected and bits(variables) == bits(others)
    fetched = {path.rpartition("/")[2] for path in server.requests if "/resolve/" in path}
    assert fetched == {hub.WEIGHTS, hub.CONFIG}
    server.requests.clear()
    lg.load("hf://someone/digits")
    assert not [path for path in server.requests if "/resolve/" in path]
    server.broken = 503  # the cache serves where the hub does not
    assert bits(lg.load("hf://someone/digits")[1]) == bits(others)
    assert any((tmp_path / "hf").rglob(hub.WEIGHTS))


def test_a_revision_and_a_model_of_text(server, models, tmp_path):
    export.export(models / "coatnet", tmp_path / "older")
    step = (tmp_path / "older" / hub.CONFIG).read_text().replace('"step": 4', '"step": 3')
    (tmp_path / "older" / hub.CONFIG).write_text(step)
    server.add("someone/digits", tmp_path / "older", "v1")
    for name, expected in (("hf://someone/digits@v1", 3), ("hf://someone/digits", 4)):
        assert hub.describe(hub.local(name))["step"] == expected
    translator = lg.load_translator("hf://someone/translation")
    of_run = tokenizers.load(models / "runs" / "muse" / tokenizers.DIRECTORY)
    assert [side.dump() for side in translator.tokenizers] == [side.dump() for side in of_run]


def test_a_private_model_needs_the_token(server, monkeypatch):
    server.private.add("someone/digits")
    with pytest.raises(ValueError, match="HF_TOKEN"):
        lg.load("hf://someone/digits")
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert lg.load("hf://someone/digits")[0].classes == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://someone/absent", "hf://someone/absent"),
        ("hf://someone/digits@v9", "hf://someone/digits@v9: it has no such revision"),
        ("hf://someone/bare", "someone/bare has no file model.safetensors"),
        ("hf://digits", "hf://OWNER/NAME"),
        ("hf://someone/digits/more", "hf://OWNER/NAME"),
        ("hf://-x/..", "hf://-x/.."),
        ("hf://someone/other", "convert timm"),
    ],
)
def test_wrong_names_end_with_2_and_one_line(name, message, server, models, tmp_path, capsys):  # noqa: PLR0917
    other = tmp_path / "other"
    other.mkdir()
    (other / hub.CONFIG).write_text('{"architecture": "volo_d1_224"}')
    (other / hub.WEIGHTS).write_bytes((models / "coatnet" / hub.WEIGHTS).read_bytes())
    server.add("someone/other", other)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / hub.CONFIG).write_text("{}")
    server.add("someone/bare", bare)
    assert main(["export", name, "--format=safetensors", f"--out={tmp_path}/out"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("localglobal export: ") and message in error[-1]
    assert "Traceback" not in "".join(error)


def test_a_wrong_token_ends_with_2_and_a_broken_hub_with_1(server, tmp_path, monkeypatch, capsys):
    command = ["export", "hf://someone/digits", "--format=safetensors", f"--out={tmp_path}/out"]
    server.broken = 500
    assert main(command) == 1
    server.broken = None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(command) == 2
    assert "HF_TOKEN" in capsys.readouterr().err.splitlines()[-1]


def test_no_network_ends_with_1(server, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    command = ["export", "hf://someone/digits", "--format=safetensors", f"--out={tmp_path}/out"]
    assert main(command) == 1
    assert "hf://someone/digits" in capsys.readouterr().err.splitlines()[-1]


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"localglobal_jax\[hub\]"):
        lg.load("hf://someone/digits")


@pytest.mark.parametrize(
    ("name", "message"), [("someone/absent", "401"), ("someone/bare", "model.safetensors")]
)
def test_a_wrong_name_of_weights_to_convert_ends_with_2(name, message, server, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / hub.CONFIG).write_text("{}")
    server.add("someone/bare", tmp_path / "bare")
    assert main(["convert", "timm", name, f"--out={tmp_path}/out"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert name in line and message in line
