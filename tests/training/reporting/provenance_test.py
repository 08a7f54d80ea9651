# SPDX-License-Identifier: Apache-2.0
"""What a run says of its code."""

import pathlib
import subprocess

import pytest

from localglobal_jax.training.reporting import provenance


def test_a_run_names_the_commit_of_its_code():
    root = pathlib.Path(provenance.__file__).parents[3]
    if not (root / ".git").exists():
        pytest.skip("the package is not in a checkout")
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert provenance.environment()["commit"].removesuffix("-dirty") == head.strip()
