# SPDX-License-Identifier: Apache-2.0
"""The README is executed: its Python runs, its commands and files exist."""

import pathlib
import re
import shlex

import pytest

from localglobal_jax import list_models
from localglobal_jax.cli import parser

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_commands_parse():
    lines = [
        line[line.index("localglobal ") :]
        for block in blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
        if "localglobal " in line
    ]
    assert lines
    for line in lines:
        words = [
            word
            for word in shlex.split(line, comments=True)[1:]
            if not word.startswith(("--config.", "--compare."))
        ]
        parser().parse_args(words)


def test_files_and_models_exist():
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:coatnet|volo|focal|muse|transformer)[\w]*_\w+)`", README):
        assert name in list_models(), name


def test_nothing_was_left_to_fill_in():
    for file in (ROOT / "README.md", *(ROOT / "experiments").glob("*/README.md")):
        assert not re.findall(r"^[A-Z_]{4,}$", file.read_text(), re.M), file


def test_every_room_is_on_the_map():
    house = README[README.index("## The house") :]
    for room in (ROOT / "localglobal_jax").iterdir():
        if room.suffix == ".py" and room.stem not in ("__init__", "__main__"):
            assert f"`{room.name}`" in house, room.name
        if room.is_dir() and room.name != "__pycache__":
            assert f"`{room.name}/`" in house, room.name
