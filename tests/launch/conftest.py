# SPDX-License-Identifier: Apache-2.0
"""An installed wheel, for commands that must not see the source tree."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The ``bin`` folder of an environment with a wheel of this package; built once a session.

    Only the package is new: its dependencies are those of the environment of the tests.
    """
    place = tmp_path_factory.mktemp("wheel")
    out = shutil.ignore_patterns(".*", "tests", "experiments", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, place / "source", ignore=out)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words):
        subprocess.run(words, check=True, env=environment, cwd=place, stdout=subprocess.DEVNULL)

    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, place / "source")
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv")
    python = place / "venv" / "bin" / "python"
    (wheel,) = place.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    own = sysconfig.get_path("purelib", vars={"base": str(place / "venv")})
    (pathlib.Path(own) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import localglobal_jax; print(localglobal_jax.__file__)"
    found = subprocess.run(
        [python, "-c", code], check=True, env=environment, cwd=place, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(place / "venv")), found.stdout
    return place / "venv" / "bin"
