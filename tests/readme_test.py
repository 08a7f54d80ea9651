# SPDX-License-Identifier: Apache-2.0
"""The README is executed: its Python runs, its commands and files exist."""

import pathlib
import re
import shlex

import pytest

from localglobal_jax import list_models
from localglobal_jax.cli.main import parser

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / name).read_text()
    for name in (
        *("README.md", "configs/README.md", "localglobal_jax/README.md", "tests/README.md"),
        *("experiments/README.md", "CONTRIBUTING.md"),
    )
}


def blocks(language):
    return [
        found
        for page in PAGES.values()
        for found in re.findall(rf"```{language}\n(.*?)```", page, re.S)
    ]


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


@pytest.mark.parametrize("page", PAGES)
def test_files_anchors_and_models_exist(page):
    for path, anchor in re.findall(r"\]\(([\w./]*)(#[\w-]+)?\)", PAGES[page]):
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            names = [re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings]
            assert anchor[1:] in names, f"{path}{anchor}"
    for name in re.findall(r"`((?:coatnet|volo|focal|muse|transformer)[\w]*_\w+)`", PAGES[page]):
        assert name in list_models(), name


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 340


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
