# SPDX-License-Identifier: Apache-2.0
"""A worker (see pairs.py): timm's models. ``python theirs.py infer|train NAME BATCH eager|compile``

Runs in an environment of its own that has torch and timm; does not import this package.
"""

import sys

import theirs_device
import timm
import torch


def main(work, name, batch, mode):
    torch.manual_seed(0)
    device = theirs_device.DEVICE
    model = timm.create_model(name).to(device, memory_format=torch.channels_last)
    x = torch.randn(int(batch), 3, 224, 224, device=device)
    x = x.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (int(batch),), device=device)
    forward = torch.compile(model) if mode == "compile" else model

    if work == "infer":
        model.eval()

        def go():
            with torch.inference_mode(), theirs_device.precision():
                forward(x)

    else:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters())

        def go():
            optimizer.zero_grad(set_to_none=True)
            with theirs_device.precision():
                loss = torch.nn.functional.cross_entropy(forward(x), labels)
            loss.backward()
            optimizer.step()

    theirs_device.serve(go, f"timm {timm.__version__} {mode}")


if __name__ == "__main__":
    main(*sys.argv[1:])
