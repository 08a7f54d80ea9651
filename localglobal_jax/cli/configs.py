# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal configs`: lists the configs of the package, or copies one to edit."""

import argparse
import ast
import json
import pathlib

NAME = "configs"
HELP = "list the configs of the package, or copy one"
EXAMPLE = "coatnet_digits.py --out mine.py"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="the config to copy")
    parser.add_argument("--out", metavar="FILE", help="of the copy; default: NAME, in this folder")


def run(args: argparse.Namespace) -> None:
    """Copies the config and prints the path of the copy, or lists all with their summaries."""
    from localglobal_jax.config import loading, validation

    known = {file.stem: file for file in loading.packaged()}
    if args.name is None:
        if args.out:
            raise ValueError("--out is for a copy: give the NAME of a config, too")
        found = {f"configs/{file.name}": _summary(file) for file in known.values()}
        width = max(map(len, found), default=0)
        lines = (f"{name:<{width}}  {summary}" for name, summary in found.items())
        print(json.dumps(found) if args.json else "\n".join(lines))
        return
    stem = pathlib.PurePath(args.name).name.removesuffix(".py")
    if stem not in known:
        raise validation.unknown("config", args.name, known)
    if args.out:
        from localglobal_jax.checkpoints import workdir

        workdir.check_local("--out", args.out, "file")
    target = pathlib.Path(args.out or known[stem].name)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(known[stem].read_text(encoding="utf-8"))
    except FileExistsError:
        kind = "is a folder" if target.is_dir() else "exists"
        raise ValueError(f"--out {target} {kind}: give the name of a new file") from None
    print(json.dumps({"copy": str(target)}) if args.json else target)


def _summary(file: pathlib.Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
