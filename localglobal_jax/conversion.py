# SPDX-License-Identifier: Apache-2.0
"""Other people's weights as a checkpoint of ours, and checkpoints as a start for fine-tuning."""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from localglobal_jax import checkpoint, convert, evaluate, models, schema
from localglobal_jax.tasks import Variables


def convert_file(
    source: str, weights: str, out: str, *, name: str | None = None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Converts the `.safetensors` file `weights` into ``out/checkpoints/0``, for `lg.load`.

    Args:
      source: "timm" or "focal".
      weights: a local file, or a hub name such as ``timm/coatnet_0_rw_224.sw_in1k`` (where there
        is internet; needs huggingface_hub).
      name: timm's name of the model; None: that of the file or hub name.
      arguments: what the original model was built with, where that is not its default.

    Raises ValueError where the weights do not fit, and if `out` holds checkpoints already.
    """
    folder = pathlib.Path(out)
    if (folder / "checkpoints").exists():
        raise ValueError(f"{out} holds checkpoints already: give another --out")
    file = find_weights(weights)
    state_dict = convert.weights.read_safetensors(file)
    name = name or (pathlib.Path(weights).stem if file == pathlib.Path(weights) else weights)
    if source == "timm":
        module, variables = convert.timm.load(name, state_dict, **arguments)
    else:
        module, variables = convert.focal.load(arguments, state_dict)
    saved = checkpoint.Checkpoints(folder / "checkpoints", schema.Checkpoints())
    metadata = {"model": models.describe(module), "converted": {"source": source, "name": name}}
    saved.save(0, {"variables": variables}, metadata=metadata)
    saved.close()
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {"model": metadata["model"]["name"], "parameters": count, "written": str(folder)}


def find_weights(weights: str) -> pathlib.Path:
    """The local file, or the hub's ``model.safetensors`` under that name."""
    file = pathlib.Path(weights)
    if file.is_file():
        return file
    if file.suffix or weights.count("/") != 1:
        raise ValueError(f"{weights}: no such file (a hub name looks like timm/coatnet_0_rw_224)")
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415, an optional package
    except ImportError:
        raise ValueError(
            f"{weights} is no file; to fetch it as a hub name, pip install huggingface_hub"
        ) from None
    return pathlib.Path(hf_hub_download(weights, "model.safetensors"))


def pretrained(path: str, module: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> Variables:
    """The variables of the checkpoint `path`, made to fit `module` on `inputs`.

    Position tables are resized, and a classifier for another number of classes starts at zero.
    Raises ValueError where anything else differs.
    """
    old, variables = evaluate.load(path)
    classes = getattr(module, "classes", None)
    if classes is not None and old.classes != classes:
        old, variables = convert.adapt.reclassify(old, variables, classes)
    return convert.adapt.fit(module, variables, *inputs)
