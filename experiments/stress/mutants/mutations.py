# SPDX-License-Identifier: Apache-2.0
"""Lists the mutants of a source file: a place in its text, and another text for it.

Places are found by `ast`; only the bytes of the place change, so the rest of the file keeps its
text and its line numbers. Not mutated:

- docstrings, annotations, imports, ``__all__``, ``if TYPE_CHECKING``, shapes of jaxtyping;
- what a `raise` raises, `assert`, calls of a logger, `warn` and `print`, f-strings, strings with
  white space: text for people, or for mypy.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
COMPARISONS |= {"is": "is not", "is not": "is", "in": "not in", "not in": "in"}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/"}
BOOLEAN = {"and": "or", "or": "and"}
TYPES = {"Array", "Bool", "Float", "Int", "Integer", "Key", "Literal", "PyTree", "Shaped"}
SPEAKERS = {"log", "logging", "warnings"}
UNTOUCHED = (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Raise)


class Mutant(NamedTuple):
    """Replacement of the bytes ``start:end`` by `new`.

    `ranges` are lines (first, last): of the statement, of the function, class and file around it.
    A test that ran the first of them that any test ran may notice: the statement may be executed at
    import, or by another case of the test than the one that was recorded.
    """

    kind: str
    start: int
    end: int
    new: str
    ranges: tuple[tuple[int, int], ...]


def mutants(source: bytes) -> list[Mutant]:
    """Returns all mutants of a file, in the order of their places."""
    return sorted(_Finder(source).file(), key=lambda m: (m.start, m.end, m.new))


class _Finder:
    def __init__(self, source: bytes):
        self.source = source
        lengths = (len(line) for line in source.splitlines(keepends=True))
        self.starts = [0, *itertools.accumulate(lengths)]
        self.ranges: tuple[tuple[int, int], ...] = ((1, len(self.starts)),)

    def file(self) -> Iterator[Mutant]:
        yield from self.below(ast.parse(self.source))

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def mutant(self, kind: str, start: int, end: int, new: str) -> Mutant:
        return Mutant(kind, start, end, new, self.ranges)

    def whole(self, kind: str, node: ast.AST, new: str) -> Mutant:
        """The mutant that replaces a node; {} in `new` is the text of the node."""
        start, end = self.span(node)
        return self.mutant(kind, start, end, new.replace("{}", self.source[start:end].decode()))

    def between(self, kind: str, left: ast.AST, right: ast.AST, table: dict) -> Iterator[Mutant]:
        """The mutant that swaps the operator between two nodes, if `table` has it."""
        start, end = self.span(left)[1], self.span(right)[0]
        words = re.compile(rb"not\s+in|is\s+not|[a-z]+|[-+*/<>=!%@&|^]+")
        if found := words.search(
            re.sub(rb"#[^\n]*", lambda m: b" " * len(m[0]), self.source[start:end])
        ):
            old = " ".join(found[0].decode().split())
            if old.removesuffix("=") in table and table is ARITHMETIC:
                new = table[old.removesuffix("=")] + "=" * old.endswith("=")
            elif (new := table.get(old)) is None:
                return
            yield self.mutant(kind, start + found.start(), start + found.end(), new)

    def below(self, node: ast.AST) -> Iterator[Mutant]:
        """The mutants of the children, with the ranges of lines that belong to each."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    outer = self.ranges
                    self.ranges = self.inside(child)
                    yield from self.at(child)
                    self.ranges = outer

    def inside(self, child: ast.AST) -> tuple[tuple[int, int], ...]:
        """Returns the ranges of lines for a node below those of `self.ranges`."""
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            return ((child.lineno, child.end_lineno), *self.ranges)
        if isinstance(child, ast.stmt):
            body = getattr(child, "body", None)
            last = body[0].lineno - 1 if body else child.end_lineno
            return ((child.lineno, max(child.lineno, last)), *self.ranges)
        return self.ranges

    def at(self, node: ast.AST) -> Iterator[Mutant]:
        """The mutants of a node and of those below it."""
        if isinstance(node, UNTOUCHED) or _is_text(node):
            return
        match node:
            case ast.Compare(left=left, comparators=[right]):
                yield from self.between("comparison", left, right, COMPARISONS)
            case ast.BinOp(left=left, right=right) if not (_is_string(left) or _is_string(right)):
                yield from self.between("arithmetic", left, right, ARITHMETIC)
            case ast.AugAssign(target=left, value=right):
                yield from self.between("arithmetic", left, right, ARITHMETIC)
                yield self.whole("deleted statement", node, "pass")
            case ast.BoolOp(values=[left, right, *_]):
                yield from self.between("and, or", left, right, BOOLEAN)
            case ast.UnaryOp(op=ast.Not()):
                start = self.span(node)[0]
                yield self.mutant("negation", start, start + len("not"), "")
            case ast.Constant(value=bool()):
                yield self.whole("True, False", node, str(not node.value))
            case ast.Constant(value=int()):
                yield self.whole("number", node, repr(node.value + 1))
            case ast.Constant(value=float()):  # not by 1 alone: 42e6 would stay what it is
                yield self.whole("number", node, repr(2 * node.value + 1))
            case ast.Constant(value=str()) if node.value and not re.search(r"\s", node.value):
                yield self.whole("string", node, repr(node.value + "_"))
            case ast.Return(value=ast.AST()) if not _is_none(node.value):
                yield self.whole("returned value", node.value, "None")
            case ast.Expr(value=ast.Call()):
                yield self.whole("deleted statement", node, "pass")
            case ast.Assign() if all(
                isinstance(t, (ast.Attribute, ast.Subscript)) for t in node.targets
            ):
                yield self.whole("deleted statement", node, "pass")
        conditions = [getattr(node, "test", None), *(getattr(node, "ifs", None) or [])]
        for condition in conditions:
            if condition and not isinstance(condition, ast.UnaryOp):
                yield self.whole("negation", condition, "not ({})")
        yield from self.below(node)


def _is_text(node: ast.AST) -> bool:
    """Whether a node is text for people or types for a checker."""
    match node:
        case ast.Expr(value=ast.Constant()):  # a docstring
            return True
        case ast.If(test=ast.Name("TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name("__all__")]):
            return True
        case ast.Subscript(value=ast.Name(name)):
            return name in TYPES
        case ast.Expr(value=ast.Call(func=function)) | ast.Call(func=function):
            first = function
            while isinstance(first, (ast.Attribute, ast.Call)):
                first = first.value if isinstance(first, ast.Attribute) else first.func
            called = getattr(function, "attr", getattr(function, "id", ""))
            said = called in ("print", "warn", "_warn")
            return said or (isinstance(first, ast.Name) and first.id in SPEAKERS)
    return False


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
