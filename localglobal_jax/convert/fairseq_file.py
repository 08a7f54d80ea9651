# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files of fairseq: ``.safetensors``, or ``.pt`` through torch's weights-only loading.

A ``.pt`` is a pickle, and a pickle can run anything. torch's weights-only unpickler makes tensors
and plain containers, and refuses other classes. Here it is allowed one more, `argparse.Namespace`
(the training arguments); the meters that fairseq saves beside them become empty objects of ours.
"""

import argparse
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from localglobal_jax.convert import weights

METERS = ("AverageMeter", "StopwatchMeter", "TimeMeter")  # of fairseq.meters


def read(
    path: pathlib.Path, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Arguments and state dict of a checkpoint, for `fairseq.load`.

    `arguments` are added to those in the file, and win. Raises ValueError for a file that is no
    checkpoint, holds other classes or no arguments, and where torch is missing.
    """
    if path.suffix != ".pt":
        if not arguments:
            raise ValueError(
                f"{path} has no training arguments: give them, the checkpoint's args as a JSON "
                "object, with --args"
            )
        return dict(arguments), weights.read_safetensors(path)
    args, model = _load(path)
    if args is None and not arguments:
        raise ValueError(f"{path} holds no training arguments (args): give them with --args")
    state_dict = {name: _array(tensor) for name, tensor in model.items()}
    return {**vars(args or argparse.Namespace()), **arguments}, state_dict


def _load(path: pathlib.Path) -> tuple[argparse.Namespace | None, Mapping[str, Any]]:
    torch = _torch()
    meters = [type(name, (), {"__module__": "fairseq.meters"}) for name in METERS]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *meters]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch do
        other = re.search(r"GLOBAL (\S+)", str(error))
        if other is None:
            reason = str(error).split("\n")[0].split(". ")[0]
            raise ValueError(f"{path} is damaged, or no file of torch's: {reason}") from error
        raise ValueError(
            f"{path} holds a {other[1]}, which is not loaded: only tensors, plain containers and "
            "the training arguments are. Where you trust it, save its weights as .safetensors and "
            "give its arguments with --args"
        ) from error
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    args, model = parts.get("args"), parts.get("model")
    if (
        not isinstance(args, argparse.Namespace | None)
        or not isinstance(model, Mapping)
        or not all(isinstance(x, torch.Tensor) for x in model.values())
    ):
        raise ValueError(
            f'{path} is no checkpoint of fairseq 0.6: it should be a dict with "args" (a '
            f'namespace) and "model" (tensors by name), but has {sorted(map(str, parts)) or "none"}'
        )
    return args, model


def _torch() -> Any:
    try:
        import torch  # noqa: PLC0415  (an extra)
    except ImportError:
        torch = None
    # until 2.5, a file could run code in spite of weights_only (CVE-2025-32434)
    if torch is None or tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 6):
        found = f"this is {torch.__version__}" if torch else "it is not installed"
        raise ValueError(
            f"reading a .pt file needs torch 2.6 or newer, and {found}: "
            "run `pip install 'localglobal_jax[torch]'`"
        )
    return torch


def _array(tensor: Any) -> np.ndarray:
    """Half precision (NumPy has no bfloat16) becomes float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
