# SPDX-License-Identifier: Apache-2.0
"""The edges people script against: exit codes, messages, and that a refused run touches nothing."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from localglobal_jax.cli.main import main, take_overrides

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DIGITS = f"--config={CONFIGS / 'coatnet_digits.py'}:size=tiny"


def test_take_overrides():
    argv = ["train", "--config", "f.py", "--config.a.b=1", "--config.c", "x", "--workdir", "d"]
    rest, overrides = take_overrides(argv)
    assert rest == ["train", "--config", "f.py", "--workdir", "d"]
    assert overrides == {"a.b": "1", "c": "x"}
    assert take_overrides(["--config.flip", "--config", "f"]) == (
        ["--config", "f"],
        {"flip": "true"},
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.optim.lr=1"], 'unknown config key in optim: "lr"'),
        (["--config.stepz=1"], 'did you mean "steps"'),
        (["--config.steps=many"], "config.steps='many' (str)"),
        (["--config.batch_size=-8"], "config.batch_size=-8"),
        (["--config.model.depths=(1,)"], 'layout "CT" names 2 stages, but depths=(1,) has 1'),
        (["--config.model.layout=CX"], 'unknown block in layout "CX": "X"'),
        (["--config.model.name=coatnot"], 'unknown model "coatnot"; did you mean "coatnet"'),
        (["--config.model.dephts=(1, 1)"], 'did you mean "depths"'),
        (["--config.model.classes=3"], "digits has 10 classes"),
        (["--config.model.dtype=bfloat16"], "set config.dtype"),
        (["--config.model.drop_path=1.5"], "drop_path=1.5: it is a probability below 1"),
        (["--config.model.head_norm=foo"], "head_norm='foo': Input should be 'batch' or 'layer'"),
        (["--config.model.blocks.T.pool=foo"], "block T: pool='foo'"),
        (["--config.model.blocks.T.head_width=0"], "head_width=0"),
        (["--config.model.blocks.C.expansion=-4"], "expansion=-4"),
        (["--config.model.blocks.C.window=2"], "needs odd sizes"),
        (["--config.model.widths=(16.5, 32)"], "widths=(16.5, 32)"),
        (["--config.model.stem=(0, 8)"], "stem=(0, 8)"),
        (["--config.checkpoint.best=test/acuracy"], 'did you mean "test/accuracy"'),
        (["--config.data.eval_splits=train[:99]"], "checkpoint.best"),
        (["--config.log.profile=(10, 20)"], "would trace steps up to 30"),
        (["--config.data.area=(0.9, 0.1)"], "smallest, largest"),
        (["--config.seed=4294967296"], "config.seed"),
        (["--config.data.image_size=(7, 8)"], "must be multiples of 2, for instance 6x8"),
        (["--config.data.name=digit"], "digits"),
        (["--config.data.name=fashion_mnist"], "localglobal prepare fashion_mnist"),
        (["--config.data.train_split=trian"], "train"),
        (["--config.batch_size=33"], "batch_size=33 is not divisible by the 2 devices"),
        (["--config.optim.accumulate=5"], "not divisible by optim.accumulate=5"),
        (["--config.optim.accumulate=32"], "batch_size / optim.accumulate=1 is not divisible"),
        (["--config.optim.warmup_steps=100"], "longer than the run"),
        (["--config.parallel.mesh={'data': 3}"], "does not fit 2 device"),
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
    assert 'did you mean "size"' in capsys.readouterr().err
    (tmp_path / "c.py").write_text("x = 1\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--workdir=x"]) == 2
    assert "has no get_config" in capsys.readouterr().err
    (tmp_path / "c.py").write_text("x = 1\ny = (\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--workdir=x"]) == 2
    assert "c.py:2: SyntaxError" in capsys.readouterr().err
    (tmp_path / "c.py").write_text("def get_config(arg=None):\n    return {}\n")
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--workdir=x"]) == 2
    assert "not an ml_collections.ConfigDict" in capsys.readouterr().err


def test_wrong_workdirs(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", DIGITS, f"--workdir={tmp_path / 'file' / 'below'}"]) == 2
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    assert main(["train", DIGITS, f"--workdir={tmp_path}"]) == 2
    assert "has metrics.jsonl but no config.json" in capsys.readouterr().err
    assert main(["train", DIGITS, "--workdir=ftp://bucket/x"]) == 2
    assert "give a local directory, or gs://" in capsys.readouterr().err


def test_a_workdir_of_another_config_is_refused_and_left_alone(data_dir, tmp_path, capsys):
    command = ["train", DIGITS, f"--workdir={tmp_path}", f"--config.data.dir={data_dir}"]
    assert main([*command, "--config.steps=2", "--config.optim.warmup_steps=1"]) == 0

    def files():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}

    before = files()
    assert main([*command, "--config.steps=3", "--config.optim.warmup_steps=1"]) == 2
    error = capsys.readouterr().err
    assert "steps: 2 there, 3 now" in error
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


def test_no_workdir_no_checkpoint(tmp_path, capsys):
    assert main(["evaluate", f"--workdir={tmp_path}"]) == 2
    assert "is not a workdir" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_prepare_prints_counts(data_dir, capsys):
    assert main(["prepare", "digits", f"--dir={data_dir}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"test": 360, "train": 1437}
    assert main(["prepare"]) == 2
    assert "name a data set" in capsys.readouterr().err


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
    assert "line 2 of" in capsys.readouterr().err


def test_score(tmp_path, capsys):
    for name, lines in (("hyp", "a b c d\n"), ("ref", "a b c d\n"), ("src", "x y\n")):
        (tmp_path / name).write_text(lines)
    hyp, ref, src = (str(tmp_path / name) for name in ("hyp", "ref", "src"))
    assert main(["score", hyp, ref, "--source", src, "--tokenized"]) == 0
    out = capsys.readouterr().out
    assert "BLEU  100.00" in out and "tok:none|smooth:none" in out and "1-15" in out
    assert main(["score", hyp, ref, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bleu"] == pytest.approx(100) and "tok:13a" in result["signature"]
    (tmp_path / "ref").write_text("a b c d\ne\n")
    assert main(["score", hyp, ref]) == 2
    assert "1 hypotheses, 2 references" in capsys.readouterr().err
    (tmp_path / "ref").write_bytes(b"\xff\n")
    assert main(["score", hyp, ref]) == 2
    assert f"{ref} is not UTF-8 text: line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["train", "evaluate", "prepare", "translate", "score", "inspect", "models", "convert", "sweep"],
)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"Example: localglobal {command}" in capsys.readouterr().out


def test_nothing_asked_shows_what_can_be_asked(capsys):
    assert main([]) == 2
    assert "classify" in capsys.readouterr().err


def test_help_and_import_are_light_and_tensorflow_is_not_needed(data_dir, tmp_path):
    code = f"""
import sys
from localglobal_jax.cli import main as cli
cli.parser()
assert "jax" not in sys.modules
code = cli.main(["train", {DIGITS!r}, "--workdir={tmp_path}", "--config.data.dir={data_dir}",
                 "--config.steps=1", "--config.optim.warmup_steps=1"])
assert code == 0, code
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_corrupt_record_is_named_or_skipped(data_dir, tmp_path, capsys):
    root = tmp_path / "tfds"
    shutil.copytree(data_dir, root)
    (file,) = root.rglob("digits-train*array_record*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    workdir = tmp_path / "run"
    command = ["train", DIGITS, f"--workdir={workdir}", f"--config.data.dir={root}"]
    command += ["--config.steps=2", "--config.optim.warmup_steps=1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert file.name in error
    assert not workdir.exists()
    assert main([*command, "--config.data.max_bad_records=100"]) == 0


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_shell_completes_commands_options_and_files(tmp_path):
    script = tmp_path / "completion.bash"
    command = [sys.executable, "-m", "localglobal_jax", "--print_completion", "bash"]
    script.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "runs").mkdir()

    def completed(*words):
        array = " ".join(f"'{word}'" for word in ("localglobal", *words))
        ask = f"""source {script}; cd {tmp_path}; COMP_WORDS=({array}); COMP_CWORD={len(words)};
            _shtab_localglobal; printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", ask], check=False, capture_output=True, text=True)
        return {line.strip().rstrip("/") for line in done.stdout.splitlines()}

    assert completed("tra") == {"train", "translate"}
    assert "--workdir" in completed("train", "--work")
    assert completed("train", "--workdir", "ru") == {"runs"}
    assert "photo.jpg" in completed("score", "ph")


def test_completion_into_a_pipe_that_closes():
    command = [sys.executable, "-m", "localglobal_jax", "--print_completion", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_crash_in_native_code_names_its_line():
    code = "import ctypes; from localglobal_jax.cli import main as cli; "
    code += "cli.main = lambda: ctypes.string_at(0); cli.console()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error" in done.stderr and 'File "<string>", line 1' in done.stderr
