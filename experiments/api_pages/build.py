# SPDX-License-Identifier: Apache-2.0
"""Writes the API pages: ``python experiments/api_pages/build.py OUT``.

Needs the extra [docs], and no network. There is a page for every public package, for its
submodules in ``__all__`` and for the classes that ``lg.load_classifier`` and ``lg.load_translator``
return.
"""

import importlib
import inspect
import pathlib
import re
import sys
import types

import pdoc.doc
import pdoc.render

HERE = pathlib.Path(__file__).parent
ROOT = "localglobal_jax"
PACKAGES = (
    *("operators", "blocks", "models", "inference.decoding", "convert"),
    *("config", "data", "parallel", "training"),
)
MODULES = ("inference.classifier", "inference.translator", "inference.grad_cam")
PATHS = re.compile(
    r"\b(jaxtyping|jaxlib\._jax|jax|numpy|flax\.linen\.module|flax\.core\.scope|typing)\."
)
OF_LINEN = ("parent", "name")  # constructor keywords of every linen module


class Shown:
    """An annotation by its text."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def short(signature: inspect.Signature) -> inspect.Signature:
    """Returns `signature` without the keywords of every linen module and the paths of array types.

    ``jaxtyping.Float[jaxlib._jax.Array, 'b d']`` becomes ``Float[Array, 'b d']``.
    """

    def shown(annotation: object) -> object:
        if annotation is inspect.Parameter.empty:
            return annotation
        return Shown(PATHS.sub("", inspect.formatannotation(annotation)))

    linen = signature.parameters.keys() >= {*OF_LINEN}
    parameters = [
        parameter.replace(annotation=shown(parameter.annotation))
        for name, parameter in signature.parameters.items()
        if not (linen and name in OF_LINEN)
    ]
    return signature.replace(
        parameters=parameters, return_annotation=shown(signature.return_annotation)
    )


def public_modules() -> list[str]:
    """Returns the paths of the documented modules, in the order of the index."""
    root = importlib.import_module(ROOT)
    for name in root.__all__:  # imports what is imported when first used
        setattr(root, name, getattr(root, name))
    paths = [ROOT]
    for package in PACKAGES:
        found = importlib.import_module(f"{ROOT}.{package}")
        inside = (getattr(found, name) for name in found.__all__)
        modules = (value.__name__ for value in inside if isinstance(value, types.ModuleType))
        paths += [found.__name__, *modules]
    return [*paths, *(f"{ROOT}.{module}" for module in MODULES)]


def build(out: pathlib.Path) -> None:
    pdoc.render.configure(docformat="google", template_directory=HERE, show_source=False)
    pdoc.render.env.filters["short"] = short
    modules = {path: pdoc.doc.Module(importlib.import_module(path)) for path in public_modules()}
    for path, module in modules.items():
        file = out / f"{path.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pdoc.render.html_module(module, modules), encoding="utf-8")
    (out / "index.html").write_text(pdoc.render.html_index(modules), encoding="utf-8")
    (out / "search.js").write_text(pdoc.render.search_index(modules), encoding="utf-8")


if __name__ == "__main__":
    build(pathlib.Path(sys.argv[1]))
