# SPDX-License-Identifier: Apache-2.0
"""A worker (see pairs.py): timm's models. ``python theirs.py infer|train NAME BATCH eager|compile``

Runs in an environment of its own that has torch and timm; imports nothing of ours.
"""

import sys
import time

import timm
import torch

REPEATS = 3  # as ours.py


def main(work, name, batch, mode):
    torch.manual_seed(0)
    model = timm.create_model(name).to(memory_format=torch.channels_last)
    x = torch.randn(int(batch), 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (int(batch),))
    forward = torch.compile(model) if mode == "compile" else model

    if work == "infer":
        model.eval()

        def go():
            with torch.inference_mode():
                forward(x)

    else:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters())

        def go():
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(forward(x), labels).backward()
            optimizer.step()

    for _ in range(2):
        go()
    versions = (
        f"torch {torch.__version__} timm {timm.__version__} {torch.get_num_threads()} threads"
    )
    print(f"ready {versions}", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(REPEATS):
            go()
        print("seconds", (time.perf_counter() - began) / REPEATS, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
