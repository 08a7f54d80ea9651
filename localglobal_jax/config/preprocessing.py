# SPDX-License-Identifier: Apache-2.0
"""Preprocessing of images that belongs to the weights of a checkpoint. Imports no jax.

A preprocessing is a dict of `FIELDS` of config.data. A run has them in its config; `localglobal
convert` writes them beside the weights: from the name, or from the ``config.json`` of the hub.
"""

import re
from collections.abc import Mapping
from typing import Any

from localglobal_jax.config.values import tuples

FIELDS = ("image_size", "mean", "std", "eval_crop", "interpolation")  # of config.data
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# names of timm, and ours; Pillow averages areas by its filter "box"
INTERPOLATIONS = {"bilinear": "bilinear", "bicubic": "bicubic", "box": "area"}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # timm's "inception": [-1, 1]


def of_timm(name: str) -> dict[str, Any]:
    """Returns the preprocessing of a CoAtNet, CoAtNeXt or VOLO of timm; {} for another name.

    Those of timm 1.0.31 (``pretrained_cfg``); the tags of a name, and the sizes that timm has no
    weights of, have the values of their family.
    """
    base = name.removeprefix("hf-hub:").removeprefix("timm/").split(".")[0]
    found = re.fullmatch(r"(coatnet|coatnext|volo)(_.*?)?(?:_(\d{3}))?", base)
    if not found:
        return {}
    family, variant, size = found[1], found[2] or "", int(found[3] or 224)
    crop: float | str
    if family == "volo":
        large = 1.0 if size == 384 or variant == "_d3" else 1.15
        crop, normalisation = (0.96 if size == 224 else large), IMAGENET
    elif (variant, size) == ("_rmlp_2_rw", 384):
        crop, normalisation = "squash", HALVES
    else:
        crop = 0.9 if variant.endswith("nano_rw") else 0.95
        normalisation = IMAGENET if variant.startswith("_bn_0") else HALVES
    size_field = {"image_size": (size, size)} if found[3] else {}
    return {**size_field, **normalisation, "eval_crop": crop, "interpolation": "bicubic"}


def of_focal() -> dict[str, Any]:
    """Returns the preprocessing of the official Focal Transformers: that of Swin's code.

    The short side becomes 256/224 of the image size.
    """
    return {**IMAGENET, "eval_crop": 0.875, "interpolation": "bicubic"}


def of_hub(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing in a ``config.json`` as timm writes it; {} without one."""
    given = config.get("pretrained_cfg", config)
    if not isinstance(given, Mapping):
        return {}
    found: dict[str, Any] = {
        name: tuple(given[name]) for name in ("mean", "std") if _numbers(given.get(name))
    }
    size: Any = given.get("input_size")
    if _numbers(size) and len(size) == 3:
        found["image_size"] = tuple(size[1:])
    crop = given.get("crop_pct")
    if given.get("crop_mode") == "squash":
        found["eval_crop"] = "squash"
    elif isinstance(crop, int | float):
        found["eval_crop"] = float(crop)
    if (name := given.get("interpolation")) in INTERPOLATIONS:
        found["interpolation"] = INTERPOLATIONS[name]
    return found


def of_converted(source: str, name: str) -> dict[str, Any]:
    """Returns the preprocessing of published weights, by the arguments of `localglobal convert`."""
    if source == "timm":
        return of_timm(name)
    return of_focal() if source == "focal" else {}


def of_checkpoint(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing of a checkpoint, by its metadata; {} if it is not known.

    Of a run, the crop of evaluation is given even where it followed from ``data.crop``.
    """
    data = (metadata.get("config") or {}).get("data") or {}
    if "mean" in data:
        found = {field: data[field] for field in FIELDS if data.get(field) is not None}
        found.setdefault("eval_crop", 0.875 if data.get("crop") == "resized" else "squash")
        return tuples({"interpolation": "area", **found})
    if "preprocessing" in metadata:
        return tuples(metadata["preprocessing"])
    converted = metadata.get("converted") or {}  # by a version that did not store them
    return of_converted(converted.get("source", ""), converted.get("name") or "")


def shown(preprocessing: Mapping[str, Any]) -> str:
    """Returns a preprocessing as options of the command line."""
    return " ".join(f"--config.data.{name}={_text(v)}" for name, v in preprocessing.items())


def _text(value: Any) -> str:
    return f"'{value}'" if isinstance(value, tuple) else str(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
