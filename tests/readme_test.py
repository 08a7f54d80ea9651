# SPDX-License-Identifier: Apache-2.0
"""The pages are executed: their Python runs, their commands parse, their links and files exist."""

import pathlib
import re
import shlex

import pytest

from localglobal_jax import list_models
from localglobal_jax.cli.main import parser

ROOT = pathlib.Path(__file__).parents[1]
FOUND = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("configs", "localglobal_jax", "tests")),
    *sorted((ROOT / "configs").glob("[a-z]*.md")),
    *sorted((ROOT / "experiments").rglob("README.md")),
]
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in FOUND}
FILES = {
    str(file.relative_to(ROOT))
    for folder in ("configs", "docs", "experiments", "localglobal_jax", "tests")
    for file in (ROOT / folder).rglob("*.*")
}


def blocks(language):
    return [
        found
        for page in PAGES.values()
        for found in re.findall(rf"```{language}\n(.*?)```", page, re.S)
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)  # some of it trains
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
    for name in re.findall(
        r"`((?:coatnet|volo|focal|muse|transformer)[a-z\d_]*_[a-z\d]+)`", PAGES[page]
    ):
        assert name in list_models(), name


def test_the_front_page_is_short():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 120
    long = [line for line in lines if len(line) > 120]
    # only the first command, which is one line so that it can be copied
    assert [line.partition(" && ")[0] for line in long] == ["python3.11 -m venv .venv"]


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_text_exist(page):
    """`operators/dense.py`: from the root, the package, the page's folder or any other."""
    names = re.findall(r"`(\w+\.(?:py|sh))`", PAGES[page])
    names += re.findall(r"(?<![\w/])([a-z][\w/]*/\w+\.(?:py|sh))\b", PAGES[page])
    for name in names:
        assert any(file == name or file.endswith(f"/{name}") for file in FILES), name


def test_nothing_was_left_to_fill_in():
    for name, text in PAGES.items():
        assert not re.findall(r"^[A-Z_]{4,}$", text, re.M), name
