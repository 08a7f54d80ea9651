# SPDX-License-Identifier: Apache-2.0
"""`localglobal prepare`: counts, and errors in the data."""

import json

from localglobal_jax.cli.main import main


def test_prepare_prints_counts(data_dir, capsys):
    assert main(["prepare", "digits", f"--dir={data_dir}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"test": 360, "train": 1437}
    assert main(["prepare"]) == 2
    assert "--config" in capsys.readouterr().err


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
    assert "line 2" in capsys.readouterr().err
