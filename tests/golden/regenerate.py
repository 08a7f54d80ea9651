# SPDX-License-Identifier: Apache-2.0
"""The reference numbers of timm's models again, by the timm that is installed.

    python tests/golden/regenerate.py             # compares with what is stored; writes nothing
    python tests/golden/regenerate.py --write     # replaces the stored outputs

Needs timm, torch and safetensors, none of which the package needs. Weights and inputs stay as they
are; the outputs of the model and of its inner modules are computed anew in float32, the model's in
float64 too. (The numbers of MUSE and Focal are of their authors' code, which no index has.)
"""

import argparse
import copy
import json
import pathlib

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.volo import VOLO

HERE = pathlib.Path(__file__).parent


def build(about):
    """The module that a NAME.json describes."""
    if about.get("arch") == "VOLO":
        return VOLO(**about["kwargs"])
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in about["cfg"].items()}
    for part, kind in (("conv_cfg", MaxxVitConvCfg), ("transformer_cfg", MaxxVitTransformerCfg)):
        fields[part] = kind(**fields[part])
    return MaxxVit(MaxxVitCfg(**fields), **about["model_kwargs"])


@torch.no_grad()
def outputs(model, stored):
    """What `stored` holds, computed anew: {name: array}."""
    x, found = torch.from_numpy(stored["input"]), {}
    keep = []
    for name in stored:
        kind, _, inner = name.partition("/")
        if kind == "mid":

            def hook(_module, _inputs, y, name=name):  # a copy: what follows may work in place
                found[name] = y[: len(stored[name])].clone().numpy()  # of the stem, one image's

            keep.append(model.get_submodule(inner).register_forward_hook(hook))
        if kind == "relpos_bias":
            found[name] = model.get_submodule(inner).rel_pos.get_bias().numpy()
    found["output"] = model(x).numpy()
    for hook in keep:
        hook.remove()
    found["output_f64"] = copy.deepcopy(model).double()(x.double()).numpy()
    if "features" in stored:
        features = model.forward_features(x)
        found |= {"features": features.numpy(), "cls_logits": model.head(features[:, 0]).numpy()}
        if "aux_logits" in stored:
            found["aux_logits"] = model.aux_head(features[:, 1:]).numpy()
    return {"input": stored["input"], **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the stored outputs")
    args = parser.parse_args()
    print(f"timm {timm.__version__}, torch {torch.__version__}")
    for file in sorted(HERE.glob("*.npz")):
        about = json.loads(file.with_suffix(".json").read_text())
        if not str(about.get("reference", "")).startswith("timm "):
            continue
        model = build(about).eval()
        model.load_state_dict(load_file(file.with_suffix(".safetensors")))
        stored = dict(np.load(file))
        found = outputs(model, stored)
        if missing := set(stored) - set(found):
            raise SystemExit(f"{file.name}: nobody computes {sorted(missing)}")
        worst = max(
            float(np.abs(found[k] - stored[k]).max() / np.abs(stored[k]).max()) for k in stored
        )
        print(f"{file.stem:<20} {len(stored)} arrays, farthest from the stored: {worst:.1e}")
        if args.write:
            np.savez_compressed(file, **found)


if __name__ == "__main__":
    main()
