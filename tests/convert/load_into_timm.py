# SPDX-License-Identifier: Apache-2.0
"""Loads an export into timm, strictly, and writes its logits: ``DIR X.npy Y.npy``.

Runs where timm and torch are installed; imports nothing of this package.
"""

import sys

import numpy as np
import timm
import torch
from safetensors.torch import load_file

folder, inputs, outputs = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
state = load_file(f"{folder}/model.safetensors")
model.load_state_dict(state, strict=True)  # no name is missing or left over
for name, array in model.state_dict().items():
    assert (array.dtype, array.shape) == (state[name].dtype, state[name].shape), name
    assert torch.equal(array, state[name]), name
with torch.no_grad():
    np.save(outputs, model(torch.from_numpy(np.load(inputs))).numpy())
print(timm.data.resolve_model_data_config(model))
