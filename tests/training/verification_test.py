# SPDX-License-Identifier: Apache-2.0
"""Which files of a workdir are verified beside its checkpoints; whole runs: faults_test.py."""

import pytest

from localglobal_jax.training import verification


@pytest.mark.parametrize("task", ["classification", "translation"])
def test_a_missing_vocabulary_is_an_error_of_text_alone(task, tmp_path):
    entry = {"step": 3, "error": None, "metadata": {"config": {"task": {"name": task}}}}
    found = {line["file"]: line["error"] for line in verification.check_files(tmp_path, [entry])}
    assert "config.json is missing" in found["config.json"]
    assert ("tokenizer" in found) == (task == "translation")
    assert "missing" in found.get("tokenizer", "missing")
