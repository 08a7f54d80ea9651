# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: parser, help, exit codes, completion, light imports."""

import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import pytest
import small

from localglobal_jax.checkpoints import reader
from localglobal_jax.cli import models, sweep
from localglobal_jax.cli.main import COMMANDS, main, take_overrides
from localglobal_jax.inference import load
from localglobal_jax.launch.exit_codes import ExitCode
from localglobal_jax.parallel import multihost
from localglobal_jax.profiling import compiler_process

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DIGITS = f"--config={CONFIGS / 'coatnet_digits.py'}:size=tiny"
SMALL = [f"--config.{field}={value}" for field, value in small.IMAGES.items()]


def test_take_overrides():
    argv = ["train", "--config", "f.py", "--config.a.b=1", "--config.c", "x", "--workdir", "d"]
    rest, overrides = take_overrides(argv)
    assert rest == ["train", "--config", "f.py", "--workdir", "d"]
    assert overrides == {"a.b": "1", "c": "x"}
    assert take_overrides(["--config.flip", "--config", "f"]) == (
        ["--config", "f"],
        {"flip": "true"},
    )


@pytest.mark.parametrize("command", [module.NAME for module in COMMANDS])
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
                 "--config.steps=1", "--config.optim.warmup_steps=1", *{SMALL}])
assert code == 0, code
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_workdir_that_does_not_exist_is_named_before_jax_is_imported(tmp_path):
    missing, picture = str(tmp_path / "missing"), tmp_path / "one.png"
    picture.touch()
    calls = [
        ["evaluate", "--workdir", missing],
        ["translate", "--workdir", missing],
        ["classify", "--workdir", missing, str(picture)],
        ["export", missing, "--format", "safetensors", "--out", str(tmp_path / "out")],
        ["inspect", missing],
        ["report", missing],
    ]
    code = f"""
import sys
from localglobal_jax.cli.main import main
print(*[int(main(call)) for call in {calls}], "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{'2 ' * len(calls)}False\n"
    reasons = []
    for read in (reader.steps, load.read_run):  # the code that would have raised the error
        with pytest.raises(ValueError, match=missing) as error:
            read(pathlib.Path(missing))
        reasons.append(str(error.value))
    names = [call[0] for call in calls]
    assert done.stderr.splitlines() == [
        f"localglobal {name}: {reasons[name == 'report']}" for name in names
    ]


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


def test_every_file_of_a_command_is_registered():
    files = {file.stem for file in pathlib.Path(sweep.__file__).parent.glob("*.py")}
    assert {module.NAME for module in COMMANDS} == files - {"__init__", "main", "options"}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["trian"], "trian"),
        (["score", "a", "b", "--config.steps=1"], "--config.steps"),
        (["translate", "--workdir=x", "--config.steps=1"], "--config.steps"),
        (["sweep", "--config=x", "--workdir=y", "--compare.steps=1"], "--compare.steps"),
        (["train", "--workdir=x"], "--config"),
    ],
)
def test_wrong_commands_and_overrides_are_exit_code_2(argv, named, capsys):
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == ExitCode.WRONG
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["evaluate", "--workdir=~/nothing"], "workdir"),
        (["translate", "--workdir=~/nothing", "~/x"], "file"),
        (["train", "--workdir=~/nothing", "--config=~/x.py:size=tiny"], "config"),
        (["sweep", "--workdir=~/nothing", "--config=~/x.py"], "workdir"),
        (["score", "~/hyp", "~/ref", "--source=~/src"], "source"),
        (["classify", "--workdir=~/nothing", "~/a", "b"], "images"),
        (["convert", "timm", "~/f", "--out=~/o"], "out"),
        (["report", "~/w"], "workdirs"),
    ],
)
def test_a_tilde_is_the_home_directory_in_every_command(argv, name, monkeypatch):
    """train made a folder called "~"."""
    monkeypatch.setenv("HOME", "/home/somebody")
    seen = []
    module = next(command for command in COMMANDS if argv[0] == command.NAME)
    monkeypatch.setattr(module, "run", seen.append)
    assert main(argv) == 0
    paths = [p for v in vars(seen[0]).values() for p in (v if isinstance(v, list) else [v])]
    assert not any(str(path).startswith("~") for path in paths)
    assert any(str(path).startswith("/home/somebody/") for path in paths)
    assert name in vars(seen[0])


class NotOurs(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("seen"), ExitCode.WRONG),
        (OSError("seen"), ExitCode.FAILED),
        (FileNotFoundError("seen"), ExitCode.FAILED),
        (compiler_process.CompilerFailed("seen"), ExitCode.FAILED),
        (multihost.HostLost("seen"), ExitCode.FAILED),
    ],
)
def test_expected_errors_are_one_line(error, code, monkeypatch, capsys):
    def fails(args):
        raise error

    monkeypatch.delenv("LOCALGLOBAL_DEBUG", raising=False)
    monkeypatch.setattr(models, "run", fails)
    assert main(["models"]) == code
    assert capsys.readouterr().err == "localglobal models: seen\n"
    monkeypatch.setenv("LOCALGLOBAL_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["models"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nx"),
            ("allocating 9 bytes", "eval.batch_size"),
        ),
        # TFDS has it in an error about the data set, which would be a wrong config
        (ValueError("no data set digits (can't start new thread)"), ("digits", "ulimit")),
    ],
)
def test_out_of_memory_is_one_line(error, words, monkeypatch, capsys):
    def fails(args):
        raise error

    monkeypatch.delenv("LOCALGLOBAL_DEBUG", raising=False)
    monkeypatch.setattr(models, "run", fails)
    assert main(["models"]) == ExitCode.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words)


@pytest.mark.parametrize("error", [NotOurs("x"), RuntimeError("x"), KeyError("x")])
def test_other_errors_keep_their_traceback(error, monkeypatch):
    def fails(args):
        raise error

    monkeypatch.setattr(models, "run", fails)
    with pytest.raises(type(error)):
        main(["models"])


def test_an_interrupt_is_exit_code_130(monkeypatch):
    def fails(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "run", fails)
    assert main(["models"]) == 130


def test_exit_codes_are_those_of_the_documentation():
    codes = {code.name: int(code) for code in ExitCode}
    assert codes == {
        **{"DONE": 0, "FAILED": 1, "WRONG": 2, "DIVERGED": 3, "PREEMPTED": 42},
        "INTERRUPTED": 130,
    }
