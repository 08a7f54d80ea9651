# SPDX-License-Identifier: Apache-2.0
"""How timm prepares images: the configurations of its names, and its transform on some images.

    python tests/golden/timm_preprocessing.py     # writes the two files beside it

Needs timm, torch, torchvision and safetensors, none of which the package needs.
``timm_preprocessing.json``: name -> size, mean, std, crop and interpolation of every CoAtNet,
CoAtNeXt and VOLO that has weights. ``timm_preprocessing.npz``: images; ``view/IMAGE/CASE``, what
``timm.data.create_transform`` makes of them before normalisation; and ``logits/IMAGE/CASE``, the
output of the model ``coatnet_nano_rw`` beside this file for the whole transform.
"""

import json
import pathlib

import numpy as np
import torch
from PIL import Image
from regenerate import build
from safetensors.torch import load_file
from timm.data import create_transform
from timm.models._registry import _model_pretrained_cfgs as configurations

HERE = pathlib.Path(__file__).parent
SHAPES = {"wide": (70, 101), "tall": (90, 64), "long": (40, 300), "tiny": (9, 13), "same": (64, 64)}
CASES = {  # input size, crop_pct, crop_mode, interpolation
    "coatnet": (64, 0.95, "center", "bicubic"),
    "nano": (64, 0.9, "center", "bicubic"),
    "volo": (64, 0.96, "center", "bicubic"),
    "volo_448": (64, 1.15, "center", "bicubic"),
    "squash": (64, 1.0, "squash", "bicubic"),
    "bilinear": (64, 0.875, "center", "bilinear"),
    "oblong": ((64, 96), 0.9, "center", "bicubic"),
}
MODEL = ("coatnet", "squash")  # cases with logits: the size of the model
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(shape, seed):
    """Waves and noise: what a wrong filter, offset or rounding changes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [np.sin(x / (3 + c) + c) * np.cos(y / (5 - c)) for c in range(3)]
    noisy = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 25, (*shape, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def transform(case, **normalisation):
    size, crop, mode, interpolation = CASES[case]
    height, width = (size, size) if isinstance(size, int) else size
    return create_transform(
        (3, height, width), crop_pct=crop, crop_mode=mode, interpolation=interpolation,
        **normalisation,
    )  # fmt: skip


@torch.no_grad()
def main():
    fields = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation", "num_classes")
    known = {
        name: {field: getattr(configuration, field) for field in fields}
        for name, configuration in sorted(configurations.items())
        if name.split("_")[0] in ("coatnet", "coatnext", "volo")
        and "." in name
        and configuration.has_weights
    }
    file = HERE / "timm_preprocessing.json"
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    model = build(json.loads((HERE / "coatnet_nano_rw.json").read_text())).eval()
    model.load_state_dict(load_file(HERE / "coatnet_nano_rw.safetensors"))
    found = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        image = picture(shape, seed)
        found[f"image/{name}"] = image
        for case in CASES:
            view = transform(case, normalize=False)(Image.fromarray(image))
            found[f"view/{name}/{case}"] = view.numpy().transpose(1, 2, 0)
            if case in MODEL:
                x = transform(case, mean=MEAN, std=STD)(Image.fromarray(image))
                found[f"logits/{name}/{case}"] = model(x[None]).numpy()[0]
    np.savez_compressed(HERE / "timm_preprocessing.npz", **found)


if __name__ == "__main__":
    main()
