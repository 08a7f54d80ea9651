# SPDX-License-Identifier: Apache-2.0
"""From a file of other people's weights to a checkpoint, and from a checkpoint to fine-tuning."""

import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

import localglobal_jax as lg
from localglobal_jax.cli.main import main
from localglobal_jax.convert import files, weights
from localglobal_jax.data.text import tokenizers as text_tokenizers

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "volo"
    arguments = json.loads((GOLDEN / "volo_aux.json").read_text())["kwargs"]
    command = ["convert", "timm", str(GOLDEN / "volo_aux.safetensors"), f"--out={out}"]
    command += ["--name=volo", f"--args={json.dumps(arguments)}"]
    assert main(command) == 0
    assert main(command) == 2  # not twice into one folder
    return out


def test_a_converted_file_loads_and_gives_the_references_logits(converted):
    module, variables = lg.load(converted)
    golden = np.load(GOLDEN / "volo_aux.npz")
    x = golden["input"].transpose(0, 2, 3, 1)
    logits, _ = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, x)
    np.testing.assert_allclose(logits, golden["output"], atol=2e-5 * np.abs(golden["output"]).max())


@pytest.mark.slow  # training/evaluate_elsewhere_test.py fine-tunes a smaller model
def test_fine_tuning_starts_from_it_at_another_size_with_other_classes(converted, tmp_path, capsys):
    model = json.loads(next(converted.glob("checkpoints/0/metadata/metadata")).read_text())[
        "metadata"
    ]["model"]
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n"
        f"    model = { ({**model, 'classes': 10})!r}\n"
        "    model = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}\n"
        "    del model['dtype'], model['classes']\n"
        f"    return ConfigDict(dict(steps=1, batch_size=2, model=model, init={str(converted)!r},\n"
        "        data=dict(name='cifar10', mock=True, image_size=(48, 80)),\n"
        "        optim=dict(learning_rate=1e-9, weight_decay=0.0), log=dict(tensorboard=False)))\n"
    )
    assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 0, (
        capsys.readouterr().err
    )
    (_, before), (module, after) = lg.load(converted), lg.load(tmp_path / "run")
    assert module.classes == 10
    assert after["params"]["position"].shape[:2] == (3, 5)
    for part in ("stem", "stage2"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            before["params"][part],
            after["params"][part],
        )
    assert main(["train", f"--config={config}", f"--workdir={tmp_path}/x", "--config.init=no"]) == 2
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------- fairseq

VOLO = str(GOLDEN / "volo_aux.safetensors")
MUSE = str(GOLDEN / "muse_post.safetensors")
ARGS = json.loads((GOLDEN / "muse_post.json").read_text())["args"]


def dictionary(path, words=36):
    path.write_text("".join(f"w{i} 1\n" for i in range(words)))
    return str(path)


def test_a_checkpoint_of_fairseq_with_its_words(tmp_path, capsys):
    (tmp_path / "args.json").write_text(json.dumps(ARGS))
    words = dictionary(tmp_path / "dict.txt")
    command = ["convert", "fairseq", MUSE, f"--out={tmp_path}/out", f"--args=@{tmp_path}/args.json"]
    assert main([*command, "--dict", words, words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == sum(
        x.size for x in jax.tree.leaves(lg.load(tmp_path / "out")[1])
    )
    tokenizers = text_tokenizers.load(tmp_path / "out" / "tokenizer")
    assert tokenizers.source.encode(["w0 w35"]) == [[4, 39]]
    golden = np.load(GOLDEN / "muse_post.npz")
    module, variables = lg.load(tmp_path / "out")
    inputs = [golden[f"left/{x}"].astype(np.int32) for x in ("src_tokens", "prev_output_tokens")]
    logits, _ = jax.jit(module.apply)(variables, *inputs)
    np.testing.assert_allclose(logits, golden["left/logits"], atol=2e-5 * np.abs(logits).max())


def test_half_precision_becomes_float32(tmp_path):
    state = {k: v.astype(np.float16) for k, v in weights.read_safetensors(MUSE).items()}
    safetensors.numpy.save_file(state, tmp_path / "half.safetensors")
    files.convert_file(
        "fairseq", str(tmp_path / "half.safetensors"), str(tmp_path / "out"), arguments=ARGS
    )
    _, variables = lg.load(tmp_path / "out")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        variables["params"]["embedding"]["embedding"], state["encoder.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "has no training arguments"),
        (["--args=nowhere.json"], "cannot read nowhere.json"),
        (["--args=@dict.txt"], "--args dict.txt is not JSON"),
        (["--args=[1]"], "--args"),
        (["--args=args.json", "--dict", "short.txt"], "35 words and 4 special tokens are 39, but "
         "the source embedding has 40 rows"),
        (["--args=args.json", "--dict", "dict.txt", "short.txt"], "but the target embedding has"),
        (["--args=args.json", "--dict", "dict.txt", "other.txt"], "but these differ"),
        (["--args=args.json", "--dict", "dict.txt", "dict.txt", "dict.txt"], "or two"),
        (["--args=args.json", "--dict", "args.json"], "--dict: cannot read args.json: line 1"),
        (["--args=args.json", "--dict", "nowhere"], "--dict: cannot read nowhere"),
        (["--args=args.json", "--config.data.mean=(0.1,)"], "--config.data.mean is for models of"),
        (["--args=args.json", "--labels=dict.txt"], "--labels is for models of images"),
    ],
)  # fmt: skip
def test_what_is_refused_writes_nothing(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dictionary(tmp_path / "dict.txt")
    dictionary(tmp_path / "short.txt", 35)
    (tmp_path / "other.txt").write_text("".join(f"v{i} 1\n" for i in range(36)))
    (tmp_path / "args.json").write_text(json.dumps(ARGS))
    assert main(["convert", "fairseq", MUSE, "--out=out", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["convert", "timm", MUSE, "--out=out", "--dict", "dict.txt"]) == 2
    assert "--dict is for fairseq" in capsys.readouterr().err


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["timm", "missing.safetensors", "--out=x"], "no such file"),
        (["timm", str(GOLDEN / "volo_aux.json"), "--out=x", "--name=volo"], "volo_aux.json"),
        (["timm", str(GOLDEN / "volo_aux.safetensors"), "--out=x", "--name=vollo"], "volo"),
        (["timm", str(GOLDEN / "volo_aux.safetensors"), "--out=x", "--args={"], "is not JSON"),
        (["timm", str(GOLDEN / "volo_aux.safetensors"), "--out=x", "--name=volo_d1_224"], "fit"),
    ],
)
def test_wrong_files_are_refused(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *command]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


VOLO_ARGUMENTS = json.loads((GOLDEN / "volo_aux.json").read_text())["kwargs"]


@pytest.mark.parametrize(
    ("classes", "count"), [({}, 10), ({"num_classes": 7}, 10), ({"num_classes": 0}, 10)]
)
def test_another_number_of_classes_is_named_as_it_is_given(classes, count, capsys, tmp_path):
    """And what the error says works."""
    arguments = {k: v for k, v in VOLO_ARGUMENTS.items() if k != "num_classes"}
    command = ["convert", "timm", str(GOLDEN / "volo_aux.safetensors"), f"--out={tmp_path}/out"]
    command += ["--name=volo"]
    assert main([*command, f"--args={json.dumps({**arguments, **classes})}"]) == 2
    error = capsys.readouterr().err
    assert f"--args '{{\"num_classes\": {count}}}'" in error and not list(tmp_path.iterdir())
    assert main([*command, f"--args={json.dumps({**arguments, 'num_classes': count})}"]) == 0


def test_the_name_of_a_released_file_needs_timms_name(capsys, tmp_path):
    file = tmp_path / "coatnet_nano_rw_224_sw-f53093b4.safetensors"
    file.write_bytes((GOLDEN / "coatnet_nano_rw.safetensors").read_bytes())
    assert main(["convert", "timm", str(file), f"--out={tmp_path}/out"]) == 2
    assert "--name" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["timm", "focal"])
@pytest.mark.parametrize("name", ["d1_224_84.2.pth.tar", "coatnet_0_rw_224.pth", "model.bin"])
def test_a_file_of_torch_tells_how_to_make_it_readable(source, name, capsys, tmp_path):
    (tmp_path / name).write_bytes(b"PK\x03\x04 of torch")
    assert main(["convert", source, str(tmp_path / name), f"--out={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    for part in ("python -c", f"torch.load('{tmp_path / name}'", "save_file", ".safetensors'"):
        assert part in error
    assert ("--name" in error) == (source == "timm")


@pytest.mark.slow  # needs torch, which nothing else needs
@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
def test_the_line_makes_a_readable_file(wrapped, capsys, tmp_path):
    torch = pytest.importorskip("torch")
    state = {k: torch.from_numpy(v) for k, v in weights.read_safetensors(VOLO).items()}
    torch.save({wrapped: state} if wrapped else state, tmp_path / "volo.pth")
    command = ["convert", "timm", str(tmp_path / "volo.pth"), f"--out={tmp_path}/out"]
    assert main(command) == 2
    line = capsys.readouterr().err.split("make one: ")[1].split("; then")[0]
    subprocess.run(line, shell=True, check=True)
    command[2] = str(tmp_path / "volo.safetensors")
    command += ["--name=volo", f"--args={json.dumps(VOLO_ARGUMENTS)}"]
    assert main(command) == 0


@pytest.mark.parametrize("name", ["coatnet", "volo", "focal"])
def test_a_description_builds_the_same_module(name):
    module = lg.create_model(name, drop_path=0.25)
    description = json.loads(json.dumps(lg.models.describe(module)))
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items()}
    assert lg.create_model(**tuples) == module


def test_models_prints_ours_beside_the_papers(capsys):
    names = ["coatnet_0", "volo_d1", "focal_tiny", "muse_iwslt", "transformer_iwslt"]
    assert main(["models", *names, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["parameters"] == 25_036_820
    assert rows[2]["parameters"] == 28_880_380
    assert rows[3]["parameters"] == rows[3]["paper_parameters"] - 9_216 == 48_184_368
    assert [row["image_size"] for row in rows] == [224, 224, 224, None, None]
    assert [row["lengths"] for row in rows] == [None, None, None, [32, 32], [32, 32]]
    for row in rows:
        assert abs(row["parameters"] / row["paper_parameters"] - 1) < 0.05
    assert main(["models", "coatnet_00"]) == 2
    assert main(["models", "coatnet_7", "transformer_base"]) == 0
    out = capsys.readouterr().out
    assert "2440 M" in out and "32+32" in out


def test_hub_names_have_tags(monkeypatch, tmp_path):
    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(tmp_path / "model.safetensors")

    client = SimpleNamespace(hf_hub_download=download, errors=None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    found = files.find_weights("timm/coatnet_0_rw_224.sw_in1k")
    assert found == tmp_path / "model.safetensors"
    assert asked == [("timm/coatnet_0_rw_224.sw_in1k", "model.safetensors")]
    for name in ("timm/weights.safetensors", "coatnet_0_rw_224.sw_in1k", "a/b/c"):
        with pytest.raises(ValueError, match=name):
            files.find_weights(name)


def test_a_name_that_no_hub_has_is_an_error_without_a_traceback(tmp_path, capsys):
    assert main(["convert", "timm", "timm/a b--c", f"--out={tmp_path}/out"]) == 2
    assert "timm/a b--c" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "file", "arguments"),
    [
        ("timm", "volo_aux", {"num_classes": "10"}),
        ("timm", "volo_aux", {"layers": 3}),
        ("timm", "coatnet_0_rw_224", {"num_classes": "10"}),
        ("timm", "coatnet_0_rw_224", {"img_size": [3]}),
        ("focal", "focal_tiny", {"depths": 2}),
        ("focal", "focal_tiny", {"num_heads": [3, 6]}),
        ("focal", "focal_tiny", {"window_size": None}),
    ],
)
def test_arguments_of_another_type_or_length_are_named(source, file, arguments, tmp_path, capsys):
    own = GOLDEN / f"{file}.json"
    known = json.loads(own.read_text()) if own.exists() else {}
    given = {**known.get("kwargs", known.get("args", {})), **arguments}
    weights = own.with_suffix(".safetensors")
    if not weights.exists():
        weights = tmp_path / f"{file}.safetensors"
        safetensors.numpy.save_file({"x": np.zeros(2, np.float32)}, weights)
    command = ["convert", source, str(weights), f"--out={tmp_path}/out"]
    command += ["--name=volo"] if file == "volo_aux" else []
    assert main([*command, f"--args={json.dumps(given)}"]) == 2
    assert next(iter(arguments)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_fails_can_be_repeated(tmp_path):
    """The file of the arrays is larger than a process may write."""
    words, out = dictionary(tmp_path / "dict.txt"), tmp_path / "out"
    given = f"'fairseq', {MUSE!r}, {str(out)!r}, arguments={ARGS!r}, dictionaries=[{words!r}] * 2"
    code = f"""
import resource, signal
from localglobal_jax.convert import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
files.convert_file({given})
"""
    command = [sys.executable, "-c", code]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode and "SaveFailed" in failed.stderr, failed.stderr
    files.convert_file("fairseq", MUSE, str(out), arguments=ARGS, dictionaries=[words, words])
    assert text_tokenizers.load(out / "tokenizer")
