# SPDX-License-Identifier: Apache-2.0
"""The table of the extra `train` is that of setup.py; what lacks is said in one line."""

import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config import extras
from localglobal_jax.parallel import private_names

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = [sys.executable, "-c"]


def test_the_table_is_that_of_setup_py():
    declared = re.search(r"^TRAIN = \[(.*?)^\]", (ROOT / "setup.py").read_text(), re.S | re.M)
    names = {
        name.lower().replace("_", "-") for name in re.findall(r'^ +"([\w-]+)', declared[1], re.M)
    }
    provided = importlib.metadata.packages_distributions()
    for module in extras.TRAIN:
        assert {name.lower().replace("_", "-") for name in provided[module]} & names, module
    of_flax = {"absl-py", "orbax-checkpoint", "scipy", "tensorstore"}
    assert len(extras.TRAIN) == len(names - of_flax)


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in {modules}:
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize("module", ["operators", "blocks", "models", "convert", "inference.load"])
def test_modules_and_checkpoints_need_no_extra(module):
    hide = HIDE.format(modules=extras.TRAIN)
    code = f"{hide}import localglobal_jax.{module}"
    subprocess.run([*PYTHON, code], check=True, timeout=300)


def test_without_the_extra_one_line_names_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("cv2", "grain") else real(name)
    )
    assert main(["train", "--help"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cv2, grain" in line and "localglobal_jax[train]" in line
    with pytest.raises(extras.MissingExtra, match=r"localglobal_jax\.train .*cv2, grain"):
        extras.check("localglobal_jax.train")


@pytest.mark.parametrize("name", private_names.PURPOSES)
def test_private_names_exist_and_a_missing_one_is_named(name, monkeypatch):
    assert private_names.find.__wrapped__(name) is not None
    missing = name + "_"
    monkeypatch.setitem(private_names.PURPOSES, missing, "a test")
    with pytest.raises(private_names.MissingPrivateName, match=re.escape(missing)):
        private_names.find(missing)
