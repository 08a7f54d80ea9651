# SPDX-License-Identifier: Apache-2.0
"""Shared by the workers in PyTorch: device, precision and loop."""

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
    """Warms `go` up, then calls it for every line of stdin."""
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
