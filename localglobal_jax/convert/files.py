# SPDX-License-Identifier: Apache-2.0
"""Converts a file of published weights into a checkpoint directory."""

import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from localglobal_jax import convert
from localglobal_jax.checkpoints import gcs, manager
from localglobal_jax.config import schema
from localglobal_jax.data.text import tokenizers
from localglobal_jax.models import registry
from localglobal_jax.models.registry import Variables

log = logging.getLogger(__name__)
FILES = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".ckpt")

# (file, name of the model, arguments of the original) -> ours
Load = Callable[[pathlib.Path, str, Mapping[str, Any]], tuple[nn.Module, Variables]]
SOURCES: dict[str, Load] = {
    "timm": lambda file, name, arguments: convert.timm.load(
        name, convert.weights.read_safetensors(file), **arguments
    ),
    "fairseq": lambda file, name, arguments: convert.fairseq.load(
        *convert.fairseq.read(file, arguments)
    ),
    "focal": lambda file, name, arguments: convert.focal.load(
        arguments, convert.weights.read_safetensors(file)
    ),
}


def convert_file(
    source: str,
    weights: str,
    out: str,
    *,
    name: str | None = None,
    arguments: Mapping[str, Any],
    dictionaries: Sequence[str] = (),
) -> dict[str, Any]:
    """Converts the file `weights` into ``out/checkpoints/0``, for `lg.load`.

    Args:
      source: one of `SOURCES`.
      weights: a local ``.safetensors`` file (of fairseq also ``.pt``), or a hub name such as
        ``timm/coatnet_0_rw_224.sw_in1k`` (where there is internet; needs huggingface_hub).
      name: timm's name of the model; None: that of the file or hub name.
      arguments: those of the original model that differ from its defaults and are not in the
        file.
      dictionaries: of fairseq, the ``dict.txt`` of source and target, or one for both; they
        become ``out/tokenizer``, which translating needs.

    Raises ValueError, and writes nothing, if the weights do not fit or `out` has a checkpoint.
    """
    mirror = gcs.LocalMirror(out)
    folder = mirror.local
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out} is a file: give a directory")
    for taken in ("checkpoints", tokenizers.DIRECTORY):
        if (folder / taken).exists():
            raise ValueError(f"{out} holds {taken} already: give another --out")
    if dictionaries and source != "fairseq":
        raise ValueError(f"--dict is for fairseq: models of {source} have no vocabulary")
    file = find_weights(weights)
    name = name or (pathlib.Path(weights).stem if file == pathlib.Path(weights) else weights)
    module, variables = SOURCES[source](file, name, arguments)
    if dictionaries:
        tokenizers.save(vocabularies(dictionaries, module), folder / tokenizers.DIRECTORY)
        mirror.push()
    elif source == "fairseq":
        log.warning("no --dict, no words: the model loads, but `localglobal translate` needs it")
    saved = manager.Checkpoints(mirror.checkpoints, schema.Checkpoints())
    metadata = {"model": registry.describe(module), "converted": {"source": source, "name": name}}
    saved.save(0, {"variables": variables}, metadata=metadata)
    saved.close()
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {"model": metadata["model"]["name"], "parameters": count, "written": out}


def vocabularies(files: Sequence[str], module: nn.Module) -> tokenizers.Tokenizers:
    """Reads ``dict.txt`` files. Raises ValueError unless their sizes fit the embeddings."""
    if len(files) > 2:
        raise ValueError(f"--dict {' '.join(files)}: give one for both languages, or two")
    found = tokenizers.of_dictionaries(files, "--dict")
    rows = module.source_vocab, module.target_vocab
    for file, words, count, side in zip(
        (files[0], files[-1]), found, rows, ("source", "target"), strict=True
    ):
        if words.size != count:
            raise ValueError(
                f"--dict {file}: {words.size - tokenizers.SPECIAL} words and {tokenizers.SPECIAL} "
                f"special tokens are {words.size}, but the {side} embedding has {count} rows. Give "
                "the dict.txt of the checkpoint; if fairseq padded it, the padding is in there"
            )
    if module.embeddings == "shared" and found.source.dump() != found.target.dump():
        raise ValueError(
            f"--dict {' '.join(files)}: source and target share their embedding, but these differ"
        )
    return found


def read_arguments(given: str) -> dict[str, Any]:
    """Returns a JSON object, given as text, ``@FILE`` or ``FILE.json``."""
    text, where = given, given
    if given.startswith("@") or given.endswith(".json"):
        where = given.removeprefix("@")
        try:
            text = pathlib.Path(where).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--args: cannot read {where}: {error}") from None
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--args {where} is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f'--args {where} is not a JSON object: give {{"name": value, ...}}')
    return arguments


def find_weights(weights: str) -> pathlib.Path:
    """Returns the local file, or downloads the hub's ``model.safetensors`` of that name."""
    file = pathlib.Path(weights)
    if file.is_file():
        return file
    if file.suffix in FILES or weights.count("/") != 1:  # hub names have tags: .sw_in1k
        raise ValueError(
            f"{weights}: no such file (a hub name looks like timm/coatnet_0_rw_224.sw_in1k)"
        )
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415, an optional package
    except ImportError:
        raise ValueError(
            f"{weights} is not a file; to fetch it as a hub name, pip install huggingface_hub"
        ) from None
    # of any revision, only arrays are read: .safetensors holds no code
    return pathlib.Path(hf_hub_download(weights, "model.safetensors"))  # nosec B615
