# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at any moment is exit code 130 without a traceback: real processes, stopped at a line."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TRAIN = ("train", f"--config={CONFIGS / 'muse_lohelp.py'}:size=tiny,data=mock", "--workdir=run")
IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}  # a line for each module
COMPILES = {"JAX_LOG_COMPILES": "1"}  # a line for each program


@pytest.mark.parametrize(
    ("env", "at"),
    [
        (IMPORTS, "localglobal_jax.launch.exit_codes"),  # in the command line
        (IMPORTS, "ml_collections"),
        (IMPORTS, "jaxlib"),
        (IMPORTS, "flax.core"),
        (COMPILES, "Compiling jit("),
        (COMPILES, "Finished XLA compilation"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_interrupted(env, at, again, tmp_path):
    """keras#21019: an interrupt in a compilation ended by SIGSEGV, 7 times of 23."""
    if again and env is IMPORTS:
        pytest.skip("the process ends at the first")
    command = [sys.executable, "-m", "localglobal_jax", *TRAIN]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stderr:
                if at in line:
                    break
            process.send_signal(signal.SIGINT)
            if again:
                process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error and "Fatal" not in error
