# SPDX-License-Identifier: Apache-2.0
"""What the workers in PyTorch share: where they compute, how precisely, and their loop."""

import contextlib
import os
import sys
import time

import torch

DEVICE = os.environ.get("DEVICE", "cpu")
REPEATS = 3  # as ours.py


def precision():
    """float32 on CPU; bfloat16 by autocast on a GPU."""
    on_gpu = DEVICE == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()


def finished():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def serve(go, about):
    """Gets `go` warm, then does it whenever a line comes."""
    for _ in range(2):
        go()
    finished()
    where = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"ready torch {torch.__version__} {about}, {where}", flush=True)
    for _ in sys.stdin:
        go()  # see pairs.py
        finished()
        began = time.perf_counter()
        for _ in range(REPEATS):
            go()
            finished()
        print("seconds", (time.perf_counter() - began) / REPEATS, flush=True)
