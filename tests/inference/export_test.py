# SPDX-License-Identifier: Apache-2.0
"""`localglobal export`: every family, read back with the same bits; wrong input; interruptions."""

import ast
import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import sklearn.datasets
import small

import localglobal_jax as lg
from localglobal_jax.checkpoints import manager, objects, reader, workdir
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, schema
from localglobal_jax.convert import files
from localglobal_jax.data.images import device_ops
from localglobal_jax.data.text import tokenizers
from localglobal_jax.inference import export, hub, load

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ("coatnet", "volo", "focal", "muse")


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """A workdir of each family; its runs kept a moving average."""
    folder = tmp_path_factory.mktemp("workdirs")
    for family in FAMILIES:
        with tarfile.open(GOLDEN / "workdirs" / "4f09b88" / f"{family}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def exported(workdirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    for family in FAMILIES:
        export.export(workdirs / family, out / family)
    return out


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(one, other):
    flat, others = reader.flatten(one)[0], reader.flatten(other)[0]
    assert flat.keys() == others.keys()
    for path, leaf in flat.items():
        assert (leaf.dtype, leaf.shape) == (others[path].dtype, others[path].shape), path
        assert np.asarray(leaf).tobytes() == np.asarray(others[path]).tobytes(), path


# ---------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("family", FAMILIES)
def test_load_reads_the_same_module_and_bits(family, workdirs, exported):
    module, variables = lg.load(workdirs / family)
    found, others = lg.load(exported / family)
    assert found == module
    same(variables, others)
    flat = reader.flatten(variables)[0]
    assert safetensors.numpy.load_file(exported / family / hub.WEIGHTS).keys() == flat.keys()
    part = next(iter(flat)).split("/")[1]
    _, some = lg.load(exported / family, only=part, dtype=jnp.bfloat16)
    assert {path.split("/")[1] for path in reader.flatten(some)[0]} == {part}
    assert load.find_step(workdirs / family, None) is None
    assert hub.describe(exported / family)["step"] == 4


def test_it_is_the_average_that_evaluation_uses(workdirs, exported):
    _, state, _ = reader.read(workdirs / "coatnet")
    same(state["average"], lg.load(exported / "coatnet")[1])
    with pytest.raises(AssertionError):
        same(state["variables"], lg.load(exported / "coatnet")[1])


@pytest.mark.parametrize("family", ["coatnet", pytest.param("muse", marks=pytest.mark.slow)])
def test_evaluate_gives_the_metrics_of_the_run(family, exported, capsys):
    assert main(["evaluate", f"--workdir={exported / family}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    saved = hub.describe(exported / family)["metrics"]
    assert saved and found["step"] == 4
    for name, value in saved.items():
        split, _, metric = name.partition("/")
        assert found[split][metric] == pytest.approx(value, rel=1e-4), name


def test_an_exported_folder_has_one_step(exported):
    with pytest.raises(ValueError, match="step=3"):
        lg.evaluate(exported / "volo", step=3)
    with pytest.raises(ValueError, match="average=2"):
        lg.evaluate(exported / "volo", average=2)


def test_an_export_is_exported_again_and_is_a_start(workdirs, exported, tmp_path, capsys):
    assert (
        main(["export", f"{exported / 'muse'}", "--format=safetensors", f"--out={tmp_path}/x"]) == 0
    )
    capsys.readouterr()
    for name in (hub.WEIGHTS, hub.CONFIG, hub.CARD):
        assert (tmp_path / "x" / name).read_bytes() == (exported / "muse" / name).read_bytes()
    of_run, again = (
        tokenizers.load(folder / tokenizers.DIRECTORY)
        for folder in (workdirs / "muse", tmp_path / "x")
    )
    assert [side.dump() for side in of_run] == [side.dump() for side in again]
    translator = lg.load_translator(tmp_path / "x")
    assert translator.tokenizers.source.size == translator.module.source_vocab
    module, variables = lg.load(exported / "coatnet")
    image = (jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),)
    same(variables, load.pretrained(str(exported / "coatnet"), module, image))


def test_a_workdir_in_a_bucket_gives_the_same_files(bucket, workdirs, exported, tmp_path):
    files = [path for path in (workdirs / "muse").rglob("*") if path.is_file()]
    names = [path.relative_to(workdirs / "muse").as_posix() for path in files]
    objects.upload(workdir.absolute(bucket), workdirs / "muse", names)
    export.export(bucket, tmp_path / "out")
    found, expected = (
        {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "out", exported / "muse")
    )
    assert found == expected and hub.WEIGHTS in found


def test_dtypes_and_shapes_survive(tmp_path):
    arrays = {
        "half": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "wide": np.array([np.pi, -0.0, np.nan], np.float64),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "none": np.zeros((0, 3), np.float32),
        "number": np.float32(3),
        "index": np.arange(3, dtype=np.int32),
    }
    hub.write(tmp_path, 7, {"params": {"a": arrays}}, {"model": {"name": "volo"}})
    step, state, metadata = hub.read(tmp_path, hub.describe(tmp_path), None)
    assert step == 7 and metadata["model"] == {"name": "volo"}
    same({"params": {"a": arrays}}, state["variables"])


def test_the_card_has_the_front_matter_of_the_hub(exported):
    for family, task in (("coatnet", "image-classification"), ("muse", "translation")):
        card = (exported / family / hub.CARD).read_text()
        front = card.split("---\n")[1].splitlines()
        assert "library_name: localglobal_jax" in front and f"pipeline_tag: {task}" in front
        assert "lg.load(" in card
    assert "| test/accuracy | 0.0859375 |" in (exported / "coatnet" / hub.CARD).read_text()


# ---------------------------------------------------------------------------- StableHLO

ALONE = """
import json, pathlib, sys
for name in ("localglobal_jax", "flax", "orbax", "safetensors", "optax", "pydantic", "cv2"):
    sys.modules[name] = None  # an import raises
import numpy as np
from jax import export
for folder in map(pathlib.Path, sys.argv[1:]):
    program = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    found = np.load(folder.with_suffix(".npz"))
    for n in range(len(found) // 2):
        logits = program.call(*found[f"inputs{n}"])
        np.testing.assert_allclose(logits, found[f"logits{n}"], rtol=0, atol=1e-6)
    print(folder.name, program.platforms)
"""


def alone(*folders):
    """Runs the programs of `folders` on the arrays beside them, in a process without our code."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def digits(count, size=8):
    images = np.rint(sklearn.datasets.load_digits().images[:count] * (255 / 16)).astype(np.uint8)
    return np.kron(images, np.ones((size // 8, size // 8), np.uint8))[..., None]


def write_expected(workdir, folder, batches):
    """Writes inputs and the logits of the module for batches of these sizes beside `folder`."""
    module, variables = lg.load(workdir)
    apply = jax.jit(
        module.clone(**({"pad_values": "zero"} if workdir.name == "muse" else {})).apply
    )
    arrays = {}
    for n, count in enumerate(batches):
        if workdir.name == "muse":
            rng = np.random.default_rng(count)
            inputs = rng.integers(3, 300, (2, count, 5 + 2 * n)).astype(np.int32)
            logits, _ = apply(variables, *inputs)
        else:
            config = load.read_run(workdir).data
            inputs = digits(count, config.image_size[0])[None]
            logits, _ = apply(variables, device_ops.normalize(jnp.asarray(inputs[0]), config))
        arrays |= {f"inputs{n}": inputs, f"logits{n}": logits}
    np.savez(folder.with_suffix(".npz"), **arrays)


@pytest.mark.parametrize(
    "families", [("coatnet",), pytest.param(("volo", "focal", "muse"), marks=pytest.mark.slow)]
)
def test_a_program_runs_in_a_process_that_has_jax_alone(families, workdirs, tmp_path):
    """In batches of several sizes; a sentence of several lengths."""
    for family in families:
        command = ["-m", "localglobal_jax", "export", str(workdirs / family), "--format=stablehlo"]
        # a process of its own: in this one sizes are checked to be numbers
        subprocess.run([sys.executable, *command, f"--out={tmp_path / family}"], check=True)
        write_expected(
            workdirs / family, tmp_path / family, (1, 7) if family in ("coatnet", "muse") else (3,)
        )
        described = json.loads((tmp_path / family / hub.CONFIG).read_text())
        assert described["platforms"] == ["cpu", "cuda", "tpu"]
        assert described["output"]["shape"][0] == "b"
    assert alone(*(tmp_path / family for family in families)) == [
        f"{family} ('cpu', 'cuda', 'tpu')" for family in families
    ]
    card = (tmp_path / families[0] / hub.CARD).read_text()
    scope = {"images": digits(2, 8 if families[0] == "coatnet" else 32)}
    code = card.split("```python\n")[1].split("```")[0]
    with contextlib.chdir(tmp_path / families[0]):
        exec(compile(code, "card", "exec"), scope)
    assert scope["logits"].shape == (2, 10)


def test_a_program_at_another_size_and_what_it_cannot_hold(workdirs, tmp_path, monkeypatch, capsys):
    command = ["export", f"{workdirs / 'coatnet'}", "--format=stablehlo", f"--out={tmp_path}/out"]
    assert main([*command, "--config.data.image_sise=(8, 8)"]) == 2
    assert "image_size" in capsys.readouterr().err
    assert main([*command, "--format=safetensors", "--config.data.std=(1,)"]) == 2
    assert "data.std" in capsys.readouterr().err
    monkeypatch.setattr(export, "LARGEST", 1000)
    assert main(command) == 2
    assert "GB" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"localglobal_jax\[export\]"):
        export.export(workdirs / "coatnet", tmp_path / "out", "stablehlo")
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def with_timm():
    """The Python that has timm and torch: that of TIMM_PYTHON, or this one."""
    python = os.environ.get("TIMM_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import timm"], capture_output=True, check=False).returncode:
        pytest.skip("timm is not installed; TIMM_PYTHON names another Python")
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("coatnet_pico_rw", (224, 224), 3, 1000),
        ("coatnet_rmlp_nano_rw", (96, 64), 1, 10),
        ("coatnext_nano_rw", (64, 64), 3, 0),
        ("volo_d1", (64, 96), 3, 10),
    ],
)
def test_timm_loads_it_strictly_and_gives_the_same_logits(case, with_timm, tmp_path):
    name, size, channels, classes = case
    module = lg.create_model(name, classes=classes)
    image = jax.random.normal(jax.random.key(1), (2, *size, channels))
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    rng = np.random.default_rng(0)

    def filled(leaf):  # variances are positive
        low, high = (0.02, 0.08) if leaf.ndim > 1 else (0.5, 1)
        signs = rng.choice([-1, 1], leaf.shape) if leaf.ndim > 1 else 1
        return (rng.uniform(low, high, leaf.shape) * signs).astype(leaf.dtype)

    variables = jax.tree.map(filled, shapes)
    found = {"image_size": size, "mean": (0.5,) * channels, "std": (0.25,) * channels}
    found |= {"eval_crop": "squash", "interpolation": "area"}
    metadata = {"model": lg.models.registry.describe(module), "preprocessing": found}
    kept = manager.Checkpoints(tmp_path / "run" / "checkpoints", schema.Checkpoints())
    kept.save(0, {"variables": variables}, metadata=metadata)
    kept.close()
    assert main(["export", f"{tmp_path}/run", "--format=timm", f"--out={tmp_path}/out"]) == 0
    np.save(tmp_path / "x.npy", np.moveaxis(image, -1, 1))
    script = pathlib.Path(__file__).parents[1] / "convert" / "load_into_timm.py"
    command = [with_timm, script, "out", "x.npy", "y.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    told = ast.literal_eval(done.stdout)
    assert tuple(told["input_size"]) == (channels, *size) and told["crop_mode"] == "squash"
    assert told["interpolation"] == "box" and tuple(told["std"]) == found["std"]
    theirs = np.load(tmp_path / "y.npy")
    logits, rest = jax.jit(module.apply)(variables, image)
    ours = logits if classes else rest["features"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_timm_does_not_have_ends_with_2(family, workdirs, tmp_path, capsys):
    assert main(["export", f"{workdirs / family}", "--format=timm", f"--out={tmp_path}/out"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("localglobal export: timm has no ")
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------- places


def test_the_folder_may_be_there_as_a_link_or_the_current_folder(workdirs, inside):
    (inside / "real").mkdir()
    (inside / "link").symlink_to("real")
    export.export(workdirs / "coatnet", "link")
    here = inside / "here"
    here.mkdir()
    os.chdir(here)
    export.export(workdirs / "coatnet", ".")
    for folder in (inside / "link", inside / "real", here):
        assert hub.describe(folder)["step"] == 4
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_of_a_step_by_its_folder_the_files_of_the_run_are_copied(workdirs, tmp_path):
    export.export(workdirs / "muse" / "checkpoints" / "4", tmp_path / "out")
    assert (tmp_path / "out" / tokenizers.DIRECTORY / tokenizers.INDEX).is_file()
    lg.load_translator(tmp_path / "out")


def test_the_paths_of_the_data_are_absolute(inside, data_dir):
    (inside / "data").symlink_to(data_dir)
    config = str(pathlib.Path(__file__).parents[2] / "configs" / "coatnet_digits.py")
    overrides = {**small.IMAGES, "data.dir": "data", "steps": "1", "optim.warmup_steps": "0"}
    lg.train(loading.load(f"{config}:size=tiny", overrides), "run")
    export.export("run", "out")
    assert hub.describe("out")["config"]["data"]["dir"] == str(inside / "data")


def test_an_export_that_was_killed_is_made_again(workdirs, tmp_path):
    partial = tmp_path / export.PARTIAL
    partial.mkdir()
    (partial / hub.CONFIG).write_text("{")
    export.export(workdirs / "coatnet", tmp_path)
    assert hub.describe(tmp_path)["step"] == 4 and not partial.exists()


def test_weights_converted_beside_their_file_are_a_checkpoint(tmp_path):
    golden = json.loads((GOLDEN / "volo_aux.json").read_text())
    (tmp_path / hub.CONFIG).write_text('{"architecture": "volo_d1_224", "num_classes": 10}')
    shutil.copy(GOLDEN / "volo_aux.safetensors", tmp_path / hub.WEIGHTS)
    files.convert_file(
        *("timm", f"{tmp_path / hub.WEIGHTS}", str(tmp_path)),
        name="volo",
        arguments=golden["kwargs"],
    )
    assert hub.describe(tmp_path) is None and not load.has_run(tmp_path)
    lg.load(tmp_path)
    with pytest.raises(ValueError, match="--config"):
        lg.evaluate(tmp_path)


# ---------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step=3"], "step 3"),
        (["--step=newest"], "step="),
        (["--average=2"], "average=2"),
        (["--out=full"], "--out full is not empty"),
        (["--out=file"], "--out file is a file"),
        (["--out=file/x"], "--out file/x"),
        (["--out=gs://bucket/x"], "--out gs://bucket/x"),
        (["--out=" + "x" * 300], "--out"),
        (["--format=savetensors"], "--format"),
    ],
)
def test_wrong_options_end_with_2_and_write_nothing(options, message, workdirs, inside, capsys):
    (inside / "full").mkdir()
    (inside / "full" / "mine").write_text("mine")
    (inside / "file").write_text("mine")
    command = ["export", f"{workdirs / 'coatnet'}", "--format=safetensors", "--out=new", *options]
    try:
        assert main(command) == 2
    except SystemExit as error:  # of argparse
        assert error.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in inside.iterdir()) == ["file", "full"]
    assert [path.name for path in (inside / "full").iterdir()] == ["mine"]


def test_a_folder_without_a_checkpoint_and_a_wrong_format(tmp_path, workdirs, capsys):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "absent"):
        command = ["export", f"{tmp_path / path}", "--format=safetensors", f"--out={tmp_path}/out"]
        assert main(command) == 2
        assert path in capsys.readouterr().err
    with pytest.raises(ValueError, match='"safetensor"; did you mean "safetensors"'):
        export.export(workdirs / "coatnet", tmp_path / "out", "safetensor")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_an_interrupted_export_leaves_nothing(error, workdirs, tmp_path, monkeypatch):
    write = hub.write

    def interrupted(folder, *rest):
        write(folder, *rest)
        raise error

    monkeypatch.setattr(hub, "write", interrupted)
    for out in (tmp_path / "out", tmp_path):
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            export.export(workdirs / "coatnet", out)
        assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (hub.CONFIG, b"{", "config.json"),
        (hub.CONFIG, b'{"architecture": "volo_d1_224"}', "convert timm"),
        (hub.CONFIG, b'{"library_name": "localglobal_jax", "version": 2}', "version=2"),
        (hub.CONFIG, b'{"library_name": "localglobal_jax", "version": 1}', "no step"),
        (hub.WEIGHTS, b"short", "model.safetensors"),
    ],
)
def test_damaged_files_are_named(file, content, message, workdirs, tmp_path):
    export.export(workdirs / "coatnet", tmp_path / "out")
    (tmp_path / "out" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        lg.load(tmp_path / "out")


def test_a_step_is_chosen(tmp_path):
    module = lg.create_model("coatnet", layout="C", depths=(1,), widths=(8,), stem=(4,), classes=3)
    shapes = jax.eval_shape(
        lambda x: module.init(jax.random.key(0), x, train=False), jnp.zeros((1, 8, 8, 3))
    )
    kept = manager.Checkpoints(tmp_path / "run" / "checkpoints", schema.Checkpoints(keep=3))
    described = {"model": lg.models.registry.describe(module)}
    for step in (1, 2):
        variables = jax.tree.map(lambda x, n=step: np.full(x.shape, n, x.dtype), shapes)
        kept.save(step, {"variables": variables}, metadata=described, metrics={"test/loss": step})
    kept.close()
    for options, value in (({"step": 1}, 1), ({}, 2), ({"average": 2}, 1.5)):
        out = tmp_path / str(value)
        export.export(tmp_path / "run", out, **options)
        assert jax.tree.leaves(lg.load(out)[1])[0].ravel()[0] == value
        assert ("metrics" in hub.describe(out)) == (value != 1.5)


@pytest.mark.parametrize("known", [True, False])
def test_a_size_other_than_that_of_the_tables_is_exported_to_timm(known, tmp_path, monkeypatch):
    """The tables are those of the images that evaluation sees; of an unknown size, none."""
    module = lg.create_model("volo_d1", classes=3, depths=(1, 1, 1, 1))
    monkeypatch.setattr(lg.convert.timm, "describe", lambda *_: ("volo_d1_96", {}))
    monkeypatch.setattr(lg.convert.timm, "load", lambda name, state, **_: (module, loaded[0]))
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    resized = lg.convert.adapt.resize(module, variables, 96) if known else variables
    loaded = [resized]
    found = {"image_size": (96, 96), "mean": (0.5,), "std": (0.5,)} if known else {}
    metadata = {"model": lg.models.registry.describe(module), "preprocessing": found}
    kept = manager.Checkpoints(tmp_path / "run" / "checkpoints", schema.Checkpoints())
    kept.save(0, {"variables": variables}, metadata=metadata)
    kept.close()
    export.export(tmp_path / "run", tmp_path / "out", "timm")
    with safetensors.safe_open(tmp_path / "out" / hub.WEIGHTS, framework="numpy") as written:
        table = written.get_tensor("pos_embed")[0]
    np.testing.assert_array_equal(table, resized["params"]["position"])


def test_an_export_that_fails_leaves_no_folder(workdirs, tmp_path):
    with pytest.raises(ValueError, match="timm has no"):
        export.export(workdirs / "muse", tmp_path / "a" / "b" / "c", "timm")
    assert not [*tmp_path.iterdir()]
