# SPDX-License-Identifier: Apache-2.0
"""Another project uses modules and checkpoints from the wheel, with the lowest and newest versions.

Slow: `python -m pytest -m slow tests/strangers_test.py` makes new environments from the registry.
``LOCALGLOBAL_TEST_PYTHON313`` names a folder with a Python 3.13, if the PATH has none.
"""

import json
import operator
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import localglobal_jax as lg
from localglobal_jax.config import values

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
STRANGER = ROOT / "tests" / "strangers"
CASES = [("lowest", "3.11"), ("newest", "3.11"), ("newest", "3.13")]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}


def run(*words, **options):
    done = subprocess.run(
        [str(word) for word in words], check=False, capture_output=True, text=True, timeout=1800,
        env=ENVIRONMENT, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def requirements(name, versions):
    """Returns a list of setup.py; "lowest" pins each bound, with any last number that it lacks."""
    text = re.search(rf"^{name} = \[(.*?)^\]", (ROOT / "setup.py").read_text(), re.S | re.M)[1]
    found = re.findall(r'^ +"(.+?)"', text, re.M)
    if versions == "newest":
        return found
    return [re.sub(r">=([\w.]+).*", _pinned, given) for given in found]


def _pinned(bound):
    number = bound[1] if "." in bound[1] else f"{bound[1]}.0"
    return f"=={number}.*"


def environment(place, version):
    """Makes a virtual environment of that Python; returns its interpreter."""
    folder = os.environ.get(f"LOCALGLOBAL_TEST_PYTHON{version.replace('.', '')}")
    base = shutil.which(f"python{version}", path=folder)
    if sys.version.startswith(f"{version}."):
        base = sys.executable
    elif not base or subprocess.run([base, "--version"], check=False).returncode:
        pytest.skip(f"needs a Python {version}")
    run(base, "-m", "venv", place)
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    out = shutil.ignore_patterns(".*", "tests", "experiments", "build", "*.egg-info")
    shutil.copytree(ROOT, place / "source", ignore=out)
    words = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", place)
    run(sys.executable, *words, place / "source")
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = lg.load_config("configs/coatnet_digits.py:size=tiny,data=mock")
    lg.train(config, str(workdir))
    return workdir


@pytest.mark.parametrize(("versions", "python"), CASES)
def test_another_project_with_modules_and_a_checkpoint(
    versions, python, wheel, checkpoint, tmp_path
):
    pip = (environment(tmp_path / "venv", python), "-m", "pip", "install", "-q")
    run(*pip, *requirements("INSTALL", versions))

    step = checkpoint / "checkpoints" / "20"
    said = json.loads(run(pip[0], STRANGER / "plain_orbax.py", step, cwd=tmp_path))
    module, variables = lg.load(checkpoint)
    assert lg.create_model(**values.tuples(said["model"])) == module
    assert said["whole"] == ["average", "optimizer", "step", "variables"]
    assert said["stage"] == ["stage1"] and said["half"] == ["bfloat16"] and said["devices"] == [8]
    assert said["sums"][0] == said["sums"][1] == said["sums"][2] > 0

    run(*pip, wheel)
    shutil.copytree(STRANGER, tmp_path / "stranger")
    run(*pip, tmp_path / "stranger")
    said = json.loads(run(pip[0], "-m", "stranger.train", checkpoint, cwd=tmp_path))
    assert str(tmp_path / "venv") in said["library"]
    for first, last in (said["own"], said["restored"]):
        assert last < first / 2
    images = np.random.default_rng(0)
    images.integers(0, 10, 16), images.normal(size=(16, 32, 32, 3))  # as stranger.train draws
    images = jnp.asarray(images.normal(size=(16, 8, 8, 1)), jnp.float32)
    logits, _ = module.apply(variables, images, train=False)
    np.testing.assert_allclose(said["logits"], logits, atol=1e-5)
    if versions == "lowest":
        assert f"jax=={said['versions']['jax']}.*" in requirements("INSTALL", versions)


@pytest.fixture(scope="module")
def typed(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel and tools that read its types."""
    place = tmp_path_factory.mktemp("typed")
    python = environment(place / "venv", "3.11")
    run(python, "-m", "pip", "install", "-q", wheel, "mypy>=1.13", "pyright[nodejs]", "jedi")
    return python


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_find_every_wrong_use_and_no_other(checker, typed, tmp_path):
    shutil.copytree(STRANGER / "typed", tmp_path, dirs_exist_ok=True)
    options = ("--pythonpath", typed) if checker == "pyright" else ()
    run(typed, "-m", checker, *options, "uses.py", cwd=tmp_path)


@pytest.mark.parametrize("name", ["", ".operators", ".blocks", ".models", ".decoding"])
def test_an_editor_completes_the_names(name, typed, tmp_path):
    ask = (
        "import jedi;"
        f"code = 'import localglobal_jax as lg\\nlg{name}.';"
        "print(*(found.name for found in jedi.Script(code).complete()))"
    )
    found = run(typed, "-c", ask, cwd=tmp_path).split()
    names = operator.attrgetter(f"{name}.__all__".lstrip("."))(lg)
    assert {*names} - {"__version__"} <= {*found}


@pytest.mark.parametrize(("versions", "python"), CASES)
def test_the_command_line(versions, python, wheel, tmp_path):
    pip = (environment(tmp_path / "venv", python), "-m", "pip", "install", "-q")
    train = requirements("TRAIN", versions)
    core = requirements("INSTALL", versions)
    if versions == "lowest":  # the bound of the extra is the higher one
        core = [name for name in core if not name.startswith("orbax-checkpoint")]
    run(*pip, *core, *train)
    run(*pip, wheel)
    command = (tmp_path / "venv" / "bin" / "localglobal",)
    for family in ("coatnet_digits", "volo_imagenet", "focal_imagenet", "muse_iwslt14"):
        config = f"configs/{family}.py:size=tiny" + ("" if "digits" in family else ",data=mock")
        run(*command, "train", "--config", config, "--workdir", family, cwd=tmp_path)
        said = json.loads(run(*command, "evaluate", "--workdir", family, "--json", cwd=tmp_path))
        assert said["step"] > 0
    run(*command, "inspect", "coatnet_digits", "--verify", cwd=tmp_path)
