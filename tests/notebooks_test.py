# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_it_runs(file, tmp_path):
    cells = json.loads(file.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = tmp_path / "notebook.py"
    # a few steps show that it runs; what is printed in the notebook took some hundred
    short = re.sub(r"\bsteps=(150|220)\b", "steps=10", "\n".join(code))
    script.write_text(re.sub(r"warmup_steps=\d+", "warmup_steps=2", short))
    environment = {**os.environ, "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=FOLDER,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
