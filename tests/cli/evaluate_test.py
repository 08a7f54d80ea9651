# SPDX-License-Identifier: Apache-2.0
"""`localglobal evaluate` and `inspect` without a checkpoint."""

from localglobal_jax.cli.main import main


def test_no_workdir_no_checkpoint(tmp_path, capsys):
    assert main(["evaluate", f"--workdir={tmp_path}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
