# SPDX-License-Identifier: Apache-2.0
"""Models in the layout of the Hugging Face hub: folders, and names such as ``hf://owner/name``.

A folder has ``model.safetensors`` (an array for each path of the variables, such as
"params/head/classifier/kernel"), ``config.json`` (step, fields of the module, the run's config,
names of the classes) and, of text, ``tokenizer/``. The files are data: nothing in them is executed.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from localglobal_jax.checkpoints import reader
from localglobal_jax.config.values import shown
from localglobal_jax.convert import downloads
from localglobal_jax.models.registry import Variables

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LIBRARY = "localglobal_jax"  # `library_name` in config.json and in the card
VERSION = 1  # of the layout
SCHEME = "hf://"
NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
METADATA = ("model", "config", "labels", "preprocessing", "converted", "versions", "metrics")
DOWNLOADED = (WEIGHTS, CONFIG, "tokenizer/*")


# ---------------------------------------------------------------------------- folders


def write(
    folder: pathlib.Path, step: int, variables: Variables, metadata: Mapping[str, Any]
) -> None:
    """Writes the two files into `folder`; the arrays keep their bits."""
    flat, _ = reader.flatten(variables)
    arrays = {path: np.asarray(leaf, order="C") for path, leaf in flat.items()}
    # one entry: safetensors writes several in any order, and equal models would differ in bytes
    safetensors.numpy.save_file(arrays, folder / WEIGHTS, {"format": "flax"})
    kept = {key: metadata[key] for key in METADATA if metadata.get(key)}
    described = {"library_name": LIBRARY, "version": VERSION, "step": step, **kept}
    write_json(folder / CONFIG, described)


def write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns the content of ``config.json`` of a folder that `write` has written, else None.

    Raises ValueError for a layout of a later version.
    """
    folder = pathlib.Path(path).expanduser()
    if not os.path.isfile(folder / WEIGHTS):  # False also for a path that is too long
        return None
    if os.path.isdir(folder / "checkpoints"):  # converted beside the weights of others
        return None
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("library_name") != LIBRARY:
        raise ValueError(
            f"{path} is not a model of {LIBRARY}: {CONFIG} does not say so. If it is one of timm, "
            f"run `localglobal convert timm {folder / WEIGHTS} --name NAME --out DIR`"
        )
    if found.get("version") != VERSION:
        raise ValueError(
            f"{folder / CONFIG}: version={found.get('version')!r}; this {LIBRARY} reads {VERSION}: "
            f"pip install --upgrade {LIBRARY}"
        )
    if not isinstance(found.get("step"), int) or not isinstance(found.get("model"), dict):
        raise ValueError(f"{folder / CONFIG} has no step, or no model: export it again")
    return found


def read(
    path: str | os.PathLike[str],
    described: Mapping[str, Any],
    step: int | str | None,
    select: Callable[[Collection[str]], Collection[str]] | None = None,
) -> tuple[int, dict, dict]:
    """Reads ``(step, {"variables": ..}, metadata)`` of a folder; `described` is its `describe`.

    `select`: see `checkpoints.reader.read`; its paths begin with "variables/". Raises ValueError
    for another step, and for damaged weights.
    """
    file = pathlib.Path(path).expanduser() / WEIGHTS
    if step is not None and str(step) != str(described["step"]):
        raise ValueError(f"step={step}: {path} has one step, {described['step']}: leave it out")
    try:
        with safetensors.safe_open(file, framework="numpy") as content:
            names = [f"variables/{name}" for name in content.keys()]  # noqa: SIM118, no mapping
            wanted = [name.partition("/")[2] for name in (select(names) if select else names)]
            flat = {name: content.get_tensor(name) for name in wanted}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {shown(str(error))}") from None
    return described["step"], {"variables": reader.nest(flat)}, dict(described)


# ---------------------------------------------------------------------------- names of the hub


def local(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Returns the folder of the files of ``hf://owner/name[@revision]``; another path as it is.

    The files are downloaded once, into the cache of huggingface_hub, which reads HF_ENDPOINT,
    HF_HOME and HF_TOKEN. Without a network, the files in the cache are taken. Raises ValueError for
    a wrong name, a repository or revision that does not exist or that this token may not read, and
    without the extra ``hub``; OSError if the hub cannot be reached.
    """
    if not str(path).startswith(SCHEME):
        return path
    given = str(path)
    match = NAME.fullmatch(given)
    if not match:
        raise ValueError(f"{given}: give hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    repository, revision = match.groups()
    with downloads.naming_failures(given) as client:
        # any revision is safe: these files are data
        folder = client.snapshot_download(  # nosec B615
            repository, revision=revision, allow_patterns=[*DOWNLOADED]
        )
    if not os.path.isfile(os.path.join(folder, WEIGHTS)):
        raise ValueError(f"{given}: {repository} has no file {WEIGHTS}")
    return folder
