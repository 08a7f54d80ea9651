# SPDX-License-Identifier: Apache-2.0
"""Rules for the language of docstrings, code and pages."""

import ast
import pathlib
import re

import localglobal_jax

PACKAGE = pathlib.Path(localglobal_jax.__file__).parent
ROOT = PACKAGE.parent
# A docstring starts with a verb ("Returns ...") or with the noun that it defines. These words start
# a fragment or a riddle instead.
WORDS = """
    What Which Who Whose Where When How Why Whether That Those These This It They Of For From In On
    At By To With Without As If So But And Or Is Are Was Were Does Do Has Have
"""
FRAGMENTS = set(WORDS.split())
PROPER = {"fairseq", "jit", "timm"}  # names in lower case
METAPHORS = re.compile(r"\b(?:houses?|rooms?|floors?)\b(?!\()", re.IGNORECASE)  # not floor(x)


def docstrings(path):
    """Yields (line, first word) of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text.split()[0]


def is_fragment(word):
    """Returns whether a docstring that starts with `word` starts neither with a verb nor a noun."""
    word = re.split(r"\W", word)[0]
    return word in FRAGMENTS or (word[:1].islower() and word not in PROPER)


def test_docstrings_start_with_a_verb_or_a_noun():
    assert is_fragment("What") and is_fragment("of") and not is_fragment("Returns")
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, word in docstrings(path)
        if is_fragment(word)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_metaphors_of_buildings():
    """In code and on pages; sentences of tests and experiments may be about houses."""
    folders = [ROOT / name for name in ("localglobal_jax", "configs", "experiments", "tests")]
    pages = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    code = [path for folder in folders[:2] for path in folder.rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted([*pages, *code])
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if METAPHORS.search(line)
    ]
    assert not wrong, "\n".join(wrong)
