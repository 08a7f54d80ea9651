# SPDX-License-Identifier: Apache-2.0
"""`localglobal train`: exit codes, errors, and that a refused run writes nothing."""

import json
import pathlib
import shutil

import pytest
import small

from localglobal_jax.cli.main import main

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DIGITS = f"--config={CONFIGS / 'coatnet_digits.py'}:size=tiny"
SMALL = [f"--config.{field}={value}" for field, value in small.IMAGES.items()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.optim.lr=1"], '"lr"'),
        (["--config.stepz=1"], '"steps"'),
        (["--config.steps=many"], "config.steps='many'"),
        (["--config.batch_size=-8"], "config.batch_size=-8"),
        (["--config.model.depths=(1,)"], "depths=(1,)"),
        (["--config.model.layout=CX"], '"CX"'),
        (["--config.model.name=coatnot"], '"coatnet"'),
        (["--config.model.dephts=(1, 1)"], '"depths"'),
        (["--config.model.classes=3"], "10 classes"),
        (["--config.model.dtype=bfloat16"], "config.dtype"),
        (["--config.model.drop_path=1.5"], "drop_path=1.5"),
        (["--config.model.head_norm=foo"], "head_norm='foo'"),
        (["--config.model.blocks.T.pool=foo"], "pool='foo'"),
        (["--config.model.blocks.T.head_width=0"], "head_width=0"),
        (["--config.model.blocks.C.expansion=-4"], "expansion=-4"),
        (["--config.model.blocks.C.window=2"], "window"),
        (["--config.model.widths=(16.5, 32)"], "widths=(16.5, 32)"),
        (["--config.model.stem=(0, 8)"], "stem=(0, 8)"),
        (["--config.checkpoint.best=test/acuracy"], '"test/accuracy"'),
        (["--config.data.eval_splits=train[:99]"], "checkpoint.best"),
        (["--config.log.profile=(10, 20)"], "log.profile"),
        (["--config.data.area=(0.9, 0.1)"], "data.area"),
        (["--config.seed=4294967296"], "config.seed"),
        (["--config.data.image_size=(7, 8)"], "6x8"),
        (["--config.data.name=digit"], "digits"),
        (["--config.data.name=fashion_mnist"], "localglobal prepare fashion_mnist"),
        (["--config.data.train_split=trian"], "train"),
        (["--config.batch_size=33"], "batch_size=33"),
        (["--config.optim.accumulate=5"], "optim.accumulate=5"),
        (["--config.optim.accumulate=32"], "optim.accumulate=1"),
        (["--config.optim.warmup_steps=100"], "warmup_steps"),
        (["--config.parallel.mesh={'data': 3}"], "mesh"),
    ],
)
def test_a_wrong_run_is_exit_code_2_and_touches_nothing(
    overrides, message, data_dir, tmp_path, capsys
):
    workdir = tmp_path / "run"
    command = ["train", DIGITS, f"--workdir={workdir}", f"--config.data.dir={data_dir}"]
    assert main([*command, *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not workdir.exists()


def test_wrong_config_files(tmp_path, capsys):
    assert main(["train", f"--config={CONFIGS}/coatnet_digit.py", "--workdir=x"]) == 2
    assert "coatnet_digits.py" in capsys.readouterr().err
    assert main(["train", f"{DIGITS},sise=tiny", "--workdir=x"]) == 2
    assert '"size"' in capsys.readouterr().err
    (tmp_path / "c.py").write_text("x = 1\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--workdir=x"]) == 2
    assert "get_config" in capsys.readouterr().err
    (tmp_path / "c.py").write_text("x = 1\ny = (\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--workdir=x"]) == 2
    assert "c.py:2: SyntaxError" in capsys.readouterr().err
    (tmp_path / "c.py").write_text("def get_config(arg=None):\n    return 3\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--workdir=x"]) == 2
    assert "ConfigDict" in capsys.readouterr().err


def test_wrong_workdirs(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", DIGITS, f"--workdir={tmp_path / 'file' / 'below'}"]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    assert main(["train", DIGITS, f"--workdir={tmp_path}"]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    assert main(["train", DIGITS, "--workdir=ftp://bucket/x"]) == 2
    assert "gs://" in capsys.readouterr().err


def test_a_workdir_of_another_config_is_refused_and_left_alone(data_dir, tmp_path, capsys):
    command = ["train", DIGITS, *SMALL, f"--workdir={tmp_path}", f"--config.data.dir={data_dir}"]
    assert main([*command, "--config.steps=2", "--config.optim.warmup_steps=1"]) == 0

    def files():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}

    before = files()
    assert main([*command, "--config.steps=3", "--config.optim.warmup_steps=1"]) == 2
    error = capsys.readouterr().err
    assert "steps: 2" in error
    assert files() == before

    assert main(["evaluate", f"--workdir={tmp_path}", "--step=best", "--json"]) == 0
    capsys.readouterr()
    smaller = ["--config.data.eval_splits=test[:99]", "--step=2", "--json"]
    assert main(["evaluate", f"--workdir={tmp_path}", *smaller]) == 0
    assert json.loads(capsys.readouterr().out)["test[:99]"]["count"] == 99
    assert main(["evaluate", f"--workdir={tmp_path}", "--step=bset"]) == 2
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={tmp_path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["count"] == 360
    assert main(["inspect", str(tmp_path), "--verify", "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert step["verified"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "variables/params/stem/conv1/kernel" in capsys.readouterr().out


def test_a_corrupt_record_is_named_or_skipped(data_dir, tmp_path, capsys):
    root = tmp_path / "tfds"
    shutil.copytree(data_dir, root)
    (file,) = root.rglob("digits-train*array_record*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    workdir = tmp_path / "run"
    command = ["train", DIGITS, *SMALL, f"--workdir={workdir}", f"--config.data.dir={root}"]
    command += ["--config.steps=2", "--config.optim.warmup_steps=1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert file.name in error
    assert not workdir.exists()
    assert main([*command, "--config.data.max_bad_records=100"]) == 0
