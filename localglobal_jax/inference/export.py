# SPDX-License-Identifier: Apache-2.0
"""Exports a trained model to formats that other programs read.

    export("runs/digits", "exported", "safetensors")

An export is a new folder, which the Hugging Face hub takes as it is. It is written beside its
place, or inside if that is there, and renamed: an export that is interrupted leaves no folder, or
an empty one.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as stablehlo

from localglobal_jax import convert
from localglobal_jax.checkpoints import gcs, reader, workdir
from localglobal_jax.config import preprocessing, validation, values
from localglobal_jax.data.images import device_ops
from localglobal_jax.data.text import tokenizers
from localglobal_jax.inference import classifier, hub, load
from localglobal_jax.models import EncoderDecoder
from localglobal_jax.models.registry import Variables, create_model, image_channels
from localglobal_jax.parallel import context

Apply = Callable[..., jax.Array]
PROGRAM = "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31 - 2**24  # bytes of parameters; a flatbuffer holds 2 GiB
PARTIAL = ".localglobal_export.partial"  # in a folder that was there
BESIDE = ("model_card.md", "learning_curve.png")  # of the run, copied where they exist


class Source(NamedTuple):
    """The model to export."""

    path: str  # of a workdir or an exported folder
    files: pathlib.Path  # local: config.json, tokenizer
    step: int
    variables: Variables
    metadata: Mapping[str, Any]
    overrides: Mapping[str, str]  # of the preprocessing, see `classifier.load`

    @property
    def module(self) -> Any:
        """Returns the module of the metadata."""
        return create_model(**values.tuples(self.metadata["model"]))

    @property
    def is_text(self) -> bool:
        """Returns whether the model translates."""
        return isinstance(self.module, EncoderDecoder)


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    step: int | str | None = None,
    average: int = 1,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes the model at `path` into the folder `out`, and returns a report of it.

    Args:
      path, step, average: see `load.load`. The moving average is exported if the run kept one.
      out: a folder that does not exist, or is empty.
      format: one of `FORMATS`.
      overrides: of StableHLO: the preprocessing of images, see `classifier.load`.

    Raises ValueError, and writes nothing, for another format, a folder that holds something, and a
    model that the format does not have.
    """
    if format not in FORMATS:
        raise validation.unknown("format", format, FORMATS)
    if overrides and format != "stablehlo":
        raise ValueError(f"--config.{next(iter(overrides))} is for --format stablehlo")
    folder = _free(out)
    path = hub.local(path)
    found, variables, metadata = load.read_variables(path, step, average)
    files = _files_of(path)
    if average == 1 and not hub.describe(path):
        metadata = {**metadata, "metrics": _metrics(path, found)}
    source = Source(str(path), files, found, variables, metadata, overrides or {})
    inside = folder.exists()  # it may be a mount, or the current folder: it stays
    name = f".{folder.name}.{os.getpid()}.partial"
    partial = folder / PARTIAL if inside else folder.with_name(name)
    made = [place for place in partial.parents if not place.exists()]
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        FORMATS[format](source, partial)
        if inside:  # config.json last: without it nothing reads the folder
            for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == hub.CONFIG):
                entry.rename(folder / entry.name)
            partial.rmdir()
        else:
            partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for entry in folder.iterdir() if inside else ():  # it was empty
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for place in made:
            with contextlib.suppress(OSError):  # others have put something there
                place.rmdir()
        raise
    return {
        "format": format,
        "model": metadata["model"]["name"],
        "step": found,
        "parameters": _count(variables),
        "written": {
            file.relative_to(folder).as_posix(): file.stat().st_size for file in _files(folder)
        },
    }


def _free(out: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder to write. Raises ValueError if it is in a bucket, a file, or not empty."""
    workdir.check_local("--out", out, "folder")
    folder = pathlib.Path(os.path.realpath(os.path.expanduser(out)))
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {out} is a file: give a folder")
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} - {PARTIAL}:
            raise ValueError(f"--out {out} is not empty: give a new folder")
        parent = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        raise ValueError(f"--out: {error.strerror}: {str(out)[:200]}") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: no permission to write in {parent}")
    return folder


def _files_of(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the local files of the workdir or exported folder of `path`, which may be a step."""
    if not hub.describe(path):
        directory, _ = reader.locate(path)
        path = directory.parent if directory.name == "checkpoints" else directory
    return gcs.LocalMirror(path).local


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _metrics(path: str | os.PathLike[str], step: int) -> dict[str, float]:
    found = {entry["step"]: entry for entry in reader.inspect(path)["steps"]}
    return found.get(step, {}).get("metrics") or {}


def _count(variables: Variables) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


# ---------------------------------------------------------------------------- formats


def _safetensors(source: Source, folder: pathlib.Path) -> None:
    """Writes what `load.load` reads: weights, config, tokenizer."""
    hub.write(folder, source.step, source.variables, source.metadata)
    _copy_tokenizer(source, folder)
    beside = [name for name in BESIDE if (source.files / name).is_file()]
    for name in beside:
        shutil.copyfile(source.files / name, folder / name)
    use = 'module, variables = lg.load("path/to/this/directory")  # or hf://OWNER/NAME'
    more = f"The card of its run is [{BESIDE[0]}]({BESIDE[0]})." if BESIDE[0] in beside else ""
    _card(source, folder, f"import localglobal_jax as lg\n\n{use}", more)


def _stablehlo(source: Source, folder: pathlib.Path) -> None:
    """Writes `PROGRAM`, which `jax.export` reads without this library.

    The parameters are inside: one file, which cannot meet other weights. The reference
    implementation of the operators is lowered for each platform; the size of the batch, and the
    lengths of sentences, are symbolic. Images are uint8, and normalised in the program.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("StableHLO needs the extra export: pip install 'localglobal_jax[export]'")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(source.variables))
    if size > LARGEST:
        raise ValueError(
            f"{source.path} has {size / 1e9:.1f} GB of parameters, but a StableHLO file holds "
            f"{LARGEST / 1e9:.1f} GB: give --format safetensors"
        )
    apply, inputs, about = (_translation if source.is_text else _classification)(source)
    try:
        with context.implementation("reference"):
            program = stablehlo.export(jax.jit(apply), platforms=PLATFORMS)(*inputs.values())
    except Exception as error:
        if type(error).__name__ != "InconclusiveDimensionOperation":  # jax has moved it
            raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{source.path} needs a fixed size of the batch: {reason}") from None
    (folder / PROGRAM).write_bytes(program.serialize())
    (output,) = program.out_avals
    described = {
        "library_name": "jax",
        "program": PROGRAM,
        "jax": jax.__version__,
        "platforms": PLATFORMS,
        "inputs": {name: _shown(x) for name, x in inputs.items()},
        "output": _shown(output),
        **about,
    }
    hub.write_json(folder / hub.CONFIG, described)
    _copy_tokenizer(source, folder)
    use = (
        "from jax import export\n\n"
        f'with open("{PROGRAM}", "rb") as file:\n'
        "    program = export.deserialize(bytearray(file.read()))\n"
        f"logits = program.call({', '.join(inputs)})"
    )
    shapes = "; ".join(f"`{name}`: {x.dtype} {list(x.shape)}" for name, x in inputs.items())
    more = "`target` are the tokens before each one, `start` first. " * source.is_text
    _card(source, folder, use, f"Runs with `pip install jax flatbuffers` alone. {shapes}. {more}")


def _classification(source: Source) -> tuple[Apply, dict[str, Any], dict[str, Any]]:
    """Returns images -> logits, the input, and entries of ``config.json``."""
    found = classifier.of_checkpoint(
        source.path, source.variables, source.metadata, source.overrides
    )
    options = found.options

    def apply(images: jax.Array) -> jax.Array:
        x = device_ops.normalize(images, options)
        return found.module.apply(found.variables, x, train=False)[0].astype(jnp.float32)

    shape = (*stablehlo.symbolic_shape("b"), *options.image_size, found.channels)
    prepared = preprocessing.of_checkpoint({"config": {"data": options.model_dump()}})
    about = {"labels": list(found.labels), "preprocessing": prepared}
    return apply, {"images": jax.ShapeDtypeStruct(shape, jnp.uint8)}, about


def _translation(source: Source) -> tuple[Apply, dict[str, Any], dict[str, Any]]:
    """Returns source, previous target tokens -> logits, the inputs, entries of ``config.json``."""
    module = source.module.clone(pad_values="zero")  # as `translator.Translator`
    variables = jax.device_put(source.variables)

    def apply(tokens: jax.Array, before: jax.Array) -> jax.Array:
        return module.apply(variables, tokens, before, train=False)[0].astype(jnp.float32)

    shapes = stablehlo.symbolic_shape("b, s, t")
    inputs = {
        name: jax.ShapeDtypeStruct((shapes[0], length), jnp.int32)
        for name, length in zip(("source", "target"), shapes[1:], strict=True)
    }
    return apply, inputs, {name: getattr(module, name) for name in ("pad", "start", "end")}


def _shown(array: Any) -> dict[str, Any]:
    """Returns shape and dtype as JSON; a symbolic size is its letter."""
    shape = [size if isinstance(size, int) else str(size) for size in array.shape]
    return {"shape": shape, "dtype": str(array.dtype)}


def _timm(source: Source, folder: pathlib.Path) -> None:
    """Writes what ``timm.create_model("local-dir:...", pretrained=True)`` reads.

    The state dict is converted back and compared before it is written.
    """
    module, variables = source.module, dict(source.variables)
    found = preprocessing.of_checkpoint(source.metadata)
    size = found.get("image_size", (224, 224))
    name, arguments = convert.timm.describe(module, variables, size)
    if "image_size" in found:
        variables = dict(convert.adapt.resize(module, variables, size))
    state = convert.timm.state_dict(module, variables)
    _, back = convert.timm.load(name, state, **arguments)
    same = functools.partial(np.array_equal, equal_nan=True)
    if not all(jax.tree.leaves(jax.tree.map(same, variables, back))):
        raise AssertionError(f"{source.path}: the state dict of {name} differs when read back")
    safetensors.numpy.save_file(state, folder / hub.WEIGHTS, {"format": "pt"})
    crop, labels = found.get("eval_crop"), source.metadata.get("labels")
    volo = name.startswith("volo")
    prepared: dict[str, Any] = {
        **{field: found[field] for field in ("mean", "std") if field in found},
        "input_size": (image_channels(variables), *size),
        "fixed_input_size": True,
        "num_classes": module.classes,
        "first_conv": "patch_embed.conv.0" if volo else "stem.conv1",
        "classifier": ("head", "aux_head") if volo else "head.fc",
    }
    if crop:
        squash = crop == "squash"
        prepared |= {
            "crop_pct": 1.0 if squash else crop,
            "crop_mode": "squash" if squash else "center",
        }
    if "interpolation" in found:
        theirs = {ours: name for name, ours in preprocessing.INTERPOLATIONS.items()}
        prepared["interpolation"] = theirs[found["interpolation"]]
    described: dict[str, Any] = {
        "architecture": name,
        "num_classes": module.classes,
        **({"label_names": labels} if labels else {}),
        "model_args": arguments,
        "pretrained_cfg": prepared,
    }
    hub.write_json(folder / hub.CONFIG, described)
    use = 'model = timm.create_model("local-dir:path/to/this/directory", pretrained=True)'
    _card(source, folder, f"import timm\n\n{use}  # or hf-hub:OWNER/NAME", library="timm")


def _copy_tokenizer(source: Source, folder: pathlib.Path) -> None:
    """Copies ``tokenizer/``, if there is one."""
    if (source.files / tokenizers.DIRECTORY).is_dir():
        shutil.copytree(source.files / tokenizers.DIRECTORY, folder / tokenizers.DIRECTORY)


def _card(
    source: Source, folder: pathlib.Path, use: str, more: str = "", library: str = hub.LIBRARY
) -> None:
    """Writes the model card, with the front matter that the hub reads."""
    metadata = source.metadata
    name, text = metadata["model"]["name"], source.is_text
    data = (metadata.get("config") or {}).get("data", {}).get("name")
    origin = metadata.get("converted") or {}
    tags = "- jax\n- flax\n" if library == hub.LIBRARY else f"- {library}\n"
    title = f"{name} on {data}" if data else f"{name}, converted from {origin.get('source')}"
    tables = {"Results": metadata.get("metrics") or {}}
    if not text:
        tables["Preparation of images"] = preprocessing.of_checkpoint(metadata)
    parts = [
        f"---\nlibrary_name: {library}\n"
        f"pipeline_tag: {'translation' if text else 'image-classification'}\n"
        f"tags:\n{tags}- {name}\n---",
        f"# {title}",
        f"{_count(source.variables):,} parameters, of step {source.step}. Exported by "
        f"`localglobal export`. {more}".strip(),
        f"## How to use it\n\n```python\n{use}\n```",
    ]
    for head, rows in tables.items():
        if rows:
            lines = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
            parts.append(f"## {head}\n\n| | |\n|---|---|\n{lines}")
    (folder / hub.CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


FORMATS: dict[str, Callable[[Source, pathlib.Path], None]] = {
    "safetensors": _safetensors,
    "stablehlo": _stablehlo,
    "timm": _timm,
}
