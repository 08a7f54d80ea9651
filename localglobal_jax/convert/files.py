# SPDX-License-Identifier: Apache-2.0
"""Converts a file of published weights into a checkpoint directory."""

import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from localglobal_jax import convert
from localglobal_jax.checkpoints import gcs, manager, steps, workdir
from localglobal_jax.config import loading, preprocessing, schema, validation
from localglobal_jax.convert import downloads
from localglobal_jax.data.text import files as text_files
from localglobal_jax.data.text import tokenizers
from localglobal_jax.models import registry
from localglobal_jax.models.registry import Variables

log = logging.getLogger(__name__)
CARD = "model_card.md"
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
    overrides: Mapping[str, str] | None = None,
    labels: str | None = None,
) -> dict[str, Any]:
    """Converts the file `weights` into ``out/checkpoints/0``, for `lg.load`.

    The preprocessing of the images (`config.preprocessing`) is stored, too, and written to
    ``out/model_card.md``. It is that of the ``config.json`` beside the file, else that of the name.

    Args:
      source: one of `SOURCES`.
      weights: a local ``.safetensors`` file (of fairseq also ``.pt``), or a hub name such as
        ``timm/coatnet_0_rw_224.sw_in1k`` (where there is internet; needs the extra hub).
      name: timm's name of the model; None: that of the file or hub name.
      arguments: those of the original model that differ from its defaults and are not in the
        file.
      dictionaries: of fairseq, the ``dict.txt`` of source and target, or one for both; they
        become ``out/tokenizer``, which translating needs.
      overrides: fields of `preprocessing.FIELDS` as text, ``{"data.mean": "(0.5,)"}``, for weights
        that are prepared in another way.
      labels: a file with the names of the classes, one a line, in the order of the classifier;
        None: the ``label_names`` in the ``config.json``, if any.

    Raises ValueError, and writes nothing, if the weights do not fit or `out` has a checkpoint.
    """
    mirror = gcs.LocalMirror(out)
    folder = mirror.local
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out} is a file: give a directory")
    # A conversion that failed leaves no step, so that it can be repeated.
    if steps.scan(mirror.checkpoints) or (folder / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds checkpoints already, or a run: give another --out")
    if dictionaries and source != "fairseq":
        raise ValueError(f"--dict is for fairseq: models of {source} have no vocabulary")
    if source == "fairseq" and (labels or overrides):
        option = "--labels" if labels else f"--config.{next(iter(overrides or {}))}"
        raise ValueError(f"{option} is for models of images, and fairseq's translate")
    given = _preprocessing_given(overrides or {})
    weights = weights.removeprefix("hf-hub:")
    file = find_weights(weights)
    name = name or (pathlib.Path(weights).stem if file == pathlib.Path(weights) else weights)
    try:
        module, variables = SOURCES[source](file, name, arguments)
    except (TypeError, LookupError) as error:  # such as "10" for a number, or too short a list
        if not arguments:
            raise
        raise ValueError(
            f"--args {json.dumps(dict(arguments))}: {error}: give every argument the type and the "
            f"length that it has in the code of {source}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{error}{_advice(source, file, name, arguments)}") from None
    hub = _hub_config(weights, file) if source != "fairseq" else None
    names = _labels(labels, hub, getattr(module, "classes", 0))
    channels = registry.image_channels(variables) if source != "fairseq" else 0
    for field in given.keys() & {"mean", "std"}:
        if len(given[field]) not in (1, channels):
            raise ValueError(
                f"--config.data.{field}={given[field]} has {len(given[field])} values; the model "
                f"has {channels} channels: give one value, or one for each"
            )
    words = vocabularies(dictionaries, module) if dictionaries else None
    if source == "fairseq" and not words:
        log.warning("no --dict, no words: the model loads, but `localglobal translate` needs it")
    found = {**prepared(source, name, arguments, variables, hub), **given}
    metadata: dict[str, Any] = {
        "model": registry.describe(module),
        "converted": {"source": source, "name": name},
    }
    if source != "fairseq":
        metadata["preprocessing"] = found
    if names:
        metadata["labels"] = names
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    report = {"model": metadata["model"]["name"], "parameters": count}
    if source != "fairseq":
        report |= {field: found.get(field, "not known") for field in preprocessing.FIELDS}
    report |= {"written": out}
    saved = manager.Checkpoints(mirror.checkpoints, schema.Checkpoints())
    if words:
        tokenizers.save(words, folder / tokenizers.DIRECTORY)
    saved.save(0, {"variables": variables}, metadata=metadata)
    saved.close()
    workdir.write_atomically(folder / CARD, card(source, name, report))
    mirror.push()
    return report


def prepared(
    source: str,
    name: str,
    arguments: Mapping[str, Any],
    variables: Variables,
    hub: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the preprocessing of weights: of ``config.json`` (`hub`), or else by their name.

    Warns where it is not known, and leaves out mean and std of another number of channels.
    """
    if source == "fairseq":
        return {}
    found = preprocessing.of_converted(source, name) | (preprocessing.of_hub(hub) if hub else {})
    size = arguments.get("img_size") or found.get("image_size")
    if size or not name.startswith("volo"):  # of the others `SOURCES` take 224, and check it
        found["image_size"] = convert.weights.sides(size or 224)
    channels = registry.image_channels(variables)
    if channels != 3 and len(set(found.get("mean", ()))) == 1:
        found |= {field: found[field][:1] for field in ("mean", "std")}
    elif channels != len(found.get("mean", ())):
        found = {field: found[field] for field in found if field not in ("mean", "std")}
    if missing := [field for field in ("mean", "std") if field not in found]:
        log.warning(
            "%s: how its images are normalised is not known. Give %s, the values that it was "
            "trained with, or commands that use it will ask for them",
            *(name, " ".join(f"--config.data.{field}=..." for field in missing)),
        )
    return found


def _hub_config(weights: str, file: pathlib.Path) -> Mapping[str, Any] | None:
    """Returns the ``config.json`` beside a file, or that of a hub name; None without one."""
    if file != pathlib.Path(weights):
        try:
            from huggingface_hub import hf_hub_download  # noqa: PLC0415, an optional package

            file = pathlib.Path(hf_hub_download(weights, "config.json"))  # nosec B615
        except Exception as error:
            log.info("no config.json of %s: %s", weights, error)
            return None
    else:
        file = file.with_name("config.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _labels(file: str | None, hub: Mapping[str, Any] | None, classes: int) -> list[str]:
    """Returns the names of the classes in a file, or in a hub's ``config.json``; [] if none.

    Raises ValueError for a file that has not one name for each class.
    """
    if file is None:
        pretrained = (hub or {}).get("pretrained_cfg")
        places = (hub, pretrained if isinstance(pretrained, Mapping) else None)
        found: Any = next((x["label_names"] for x in places if x and "label_names" in x), None)
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            return []
        return found if len(found) == len(set(found)) == classes else []
    try:
        names = text_files.read_lines(file)
    except ValueError as error:
        raise ValueError(f"--labels {file}: {error}") from None
    if len(names) != classes or len(set(names)) != classes:
        raise ValueError(
            f"--labels {file} has {len(set(names))} different names in {len(names)} lines; the "
            f"classifier has {classes} classes: give one line for each, in its order"
        )
    return names


def _preprocessing_given(overrides: Mapping[str, str]) -> dict[str, Any]:
    """Returns the preprocessing of overrides, checked. Raises ValueError for other fields."""
    allowed = [f"data.{field}" for field in preprocessing.FIELDS]
    config = ConfigDict({"model": {"name": "coatnet"}})
    for field, text in overrides.items():
        if field not in allowed:
            raise validation.unknown("field of the preprocessing:", field, allowed)
        loading.override(config, field, text)
    data = validation.check(config).data
    names = [field.removeprefix("data.") for field in overrides]
    return {name: getattr(data, name) for name in names}


def _advice(source: str, file: pathlib.Path, name: str, arguments: Mapping[str, Any]) -> str:
    """Returns the end of an error: the option, or the command for a readable file, that helps."""
    if source == "fairseq":
        return ""
    if file.suffix != ".safetensors":
        of_timm = ", with --name, timm's name of the model" * (source == "timm")
        return (
            f". {file} is not a .safetensors file. Where torch is installed, make one: python -c "
            f'"import torch, safetensors.torch as s; '
            f"x = torch.load('{file}', map_location='cpu', weights_only=True); "
            "x = x.get('state_dict', x.get('model', x)); "
            "s.save_file({k: v.contiguous().clone() for k, v in x.items()}, "
            f"'{file.with_suffix('.safetensors')}')\"; then convert that{of_timm}"
        )
    if source != "timm":
        return ""
    advice = f". --name={name} is used: if it is not timm's name of the model, give --name"
    classes = _classes(file)
    if classes is not None and classes != arguments.get("num_classes", 1000):
        count = f"'{{\"num_classes\": {classes}}}'"
        advice += f". The file has a classifier of {classes} classes: give --args {count}"
    return advice


def _classes(file: pathlib.Path) -> int | None:
    """Returns the classes of a file of timm, 0 without a classifier; None if unreadable."""
    try:
        state = convert.weights.read_safetensors(file)
    except (ValueError, OSError):
        return None
    found = next((state[n] for n in ("head.fc.bias", "head.bias") if n in state), None)
    return 0 if found is None else len(found)


def card(source: str, name: str, report: Mapping[str, Any]) -> str:
    """Returns the model card of converted weights, in Markdown."""
    lines = [f"# {name}", "", f"Converted from {source} by `localglobal convert`.", "", "| | |"]
    lines += ["|---|---|", *(f"| {key} | {value} |" for key, value in report.items())]
    if source != "fairseq":
        lines += [
            "",
            "`image_size`, `mean`, `std`, `eval_crop` and `interpolation` are fields of "
            "config.data: how images are prepared for these weights. `classify`, `evaluate` and "
            "the fine-tuning configs use them.",
            "",
            "```sh",
            f"localglobal classify --workdir {report['written']} PICTURES",
            f"localglobal evaluate --workdir {report['written']} "
            "--config configs/finetune_folder.py --config.data.dir=PICTURES",
            f"localglobal train --config configs/finetune_folder.py:init={report['written']} "
            "--config.data.dir=PICTURES --workdir runs/mine",
            "```",
        ]
    return "\n".join(lines) + "\n"


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
    with downloads.naming_failures(f"{weights} (no file, so a name of the hub)") as client:
        # of any revision, only arrays are read: .safetensors holds no code
        return pathlib.Path(client.hf_hub_download(weights, "model.safetensors"))  # nosec B615
