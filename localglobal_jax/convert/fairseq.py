# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints of MUSE's published code, a fork of fairseq 0.6.2 (MUSE is Prime there).

Their training arguments become the fields of `EncoderDecoder`, with padding as their code has it.
Skipped, because they change no result: ``encoder_attn_layer_norm`` (never called), the gate
of a single kernel, the kernels under ``attn_dynamic_cat=0``, ``version`` and ``_float_tensor``.

>>> fields = lg.convert.fairseq.fields({"arch": "transformer", "encoder_layers": 3})
>>> fields["depths"]
(3, 6)
"""

import argparse
import numbers
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.convert import weights
from localglobal_jax.convert.weights import Path, Transform, Variables
from localglobal_jax.models.encoder_decoder import EncoderDecoder, layer_options

PAD, END = 1, 2  # of every fairseq dictionary; the end of a sentence also begins the next
DEFAULTS: dict[str, Any] = {  # of their architecture "transformer"
    "encoder_embed_dim": 512,
    "encoder_ffn_embed_dim": 2048,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_layers": 6,
    "decoder_attention_heads": 8,
    "activation_fn": "relu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "input_dropout": 0.0,
    "kernel_size": 0,
    "attn_dynamic_type": 0,
    "attn_dynamic_cat": 1,
    "dynamic_gate": 1,
    "dynamic_padding": 0,
}
SIZES = ("embed_dim", "ffn_embed_dim")  # of the decoder; the default is the value of the encoder
# Features that are not built: argument -> the only value allowed, and the feature.
FIXED: dict[str, tuple[Any, str]] = {
    "combine": (1, "branches one after the other, or their older fused code (bm)"),
    "adaptive_softmax_cutoff": (None, "adaptive softmax"),
    "adaptive_input": (False, "adaptive input"),
    "encoder_learned_pos": (False, "learned positions"),
    "decoder_learned_pos": (False, "learned positions"),
    "lnv": ("origin", "another norm than LayerNorm"),
}
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "tanh": "tanh",
    "linear": "none",
}

METERS = ("AverageMeter", "StopwatchMeter", "TimeMeter")  # of fairseq.meters


def load(args: Any, state_dict: Mapping[str, Any]) -> tuple[EncoderDecoder, Variables]:
    """Returns module and variables of a checkpoint.

    Args:
      args: the checkpoint's ``args``: a mapping, or the namespace itself.
      state_dict: name -> array, the checkpoint's ``model``.

    Raises:
      ValueError: an argument has a value that is not built; names are missing or left over, or
        shapes differ (lists all of them).
    """
    if not isinstance(args, Mapping) and not hasattr(args, "__dict__"):
        raise ValueError(
            f"args={args!r}: give the checkpoint's arguments, a mapping or a namespace"
        )
    args = dict(args) if isinstance(args, Mapping) else vars(args)
    for side in ("encoder", "decoder"):
        if f"{side}.embed_tokens.weight" not in state_dict:
            raise ValueError(
                f"the state dict has no {side}.embed_tokens.weight: not a fairseq model"
            )
        version = np.asarray(state_dict.get(f"{side}.version", 2.0)).reshape(-1)[0]
        if version < 2:
            raise ValueError(
                f"{side}.version is {version:g}: give a checkpoint of version 2, with a last norm"
            )
    module = EncoderDecoder(
        source_vocab=len(state_dict["encoder.embed_tokens.weight"]),
        target_vocab=len(state_dict["decoder.embed_tokens.weight"]),
        **fields(args),
    )
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    template = jax.eval_shape(lambda s, t: module.init(jax.random.key(0), s, t), tokens, tokens)
    variables = weights.assemble(
        template, state_dict, _source(module), ignored=_ignored(module, args), what="MUSE"
    )
    if module.embeddings == "shared":
        source, target = (
            np.asarray(state_dict[f"{side}.embed_tokens.weight"]) for side in ("encoder", "decoder")
        )
        if not np.array_equal(source, target):
            raise ValueError("share_all_embeddings, but the two embed_tokens.weight differ")
    return module, variables


# ---------------------------------------------------------------------------- files


def read(
    path: pathlib.Path, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns arguments and state dict of a checkpoint file, for `fairseq.load`.

    `arguments` are added to those in the file, and win. Raises ValueError for a file that is not
    a checkpoint, holds other classes or no arguments, and if torch is not installed.
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
    except Exception as error:  # torch raises many types for damaged files
        other = re.search(r"GLOBAL (\S+)", str(error))
        if other is None:
            reason = str(error).split("\n")[0].split(". ")[0]
            raise ValueError(f"{path} is damaged, or not a torch file: {reason}") from error
        raise ValueError(
            f"{path} holds a {other[1]}, which is not loaded: only tensors, plain containers and "
            "the training arguments are. If you trust the file, save its weights as .safetensors "
            "and give its arguments with --args"
        ) from error
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    args, model = parts.get("args"), parts.get("model")
    if (
        not isinstance(args, argparse.Namespace | None)
        or not isinstance(model, Mapping)
        or not all(isinstance(x, torch.Tensor) for x in model.values())
    ):
        raise ValueError(
            f'{path} is not a checkpoint of fairseq 0.6: it should be a dict with "args" (a '
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
    """Returns a tensor as an array; half precision (NumPy has no bfloat16) becomes float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


# ---------------------------------------------------------------------------- arguments


def fields(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fairseq's arguments as fields of `EncoderDecoder`, except the sizes of vocabularies.

    Arguments of training, data and logging are ignored. Raises ValueError for values
    that are not built.
    """
    for name, (value, what) in FIXED.items():
        if (args.get(name, value) or None) != (value or None):
            raise ValueError(f"{name}={args[name]!r} ({what}) is not built: use {name}={value!r}")
    args = {**DEFAULTS, **{name: value for name, value in args.items() if value is not None}}
    for name in SIZES:
        args.setdefault(f"decoder_{name}", args[f"encoder_{name}"])
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if args.get(name, args["decoder_embed_dim"]) != args["decoder_embed_dim"]:
            raise ValueError(f"{name}={args[name]} is not built: it must be decoder_embed_dim")
    for name, default in (*DEFAULTS.items(), *((f"decoder_{n}", 0) for n in SIZES)):
        kind, what = numbers.Real, "a number"
        if isinstance(default, int):
            kind, what = numbers.Integral, "an integer"
        if not isinstance(default, str) and not isinstance(args[name], kind):
            raise ValueError(f"{name}={args[name]!r}: give {what}")
    if args["activation_fn"] not in ACTIVATIONS:
        raise ValueError(
            f"activation_fn={args['activation_fn']!r}: allowed are {', '.join(ACTIVATIONS)}"
        )
    embeddings = "separate"
    if args.get("share_all_embeddings"):
        embeddings = "shared"
    elif args.get("share_decoder_input_output_embed"):
        embeddings = "decoder"

    def both(name: str) -> tuple[Any, Any]:
        return args[f"encoder_{name}"], args[f"decoder_{name}"]

    depths = both("layers")
    options = {
        "windows": windows(args, max(depths)),
        "gate": bool(args["dynamic_gate"]),
        "input_dropout": float(args["input_dropout"]),
    }
    return {
        "embeddings": embeddings,
        "layout": "MM",
        "depths": depths,
        "widths": both("embed_dim"),
        "heads": both("attention_heads"),
        "hidden": both("ffn_embed_dim"),
        "pre_norm": tuple(
            bool(args.get(f"{side}_normalize_before", False)) for side in ("encoder", "decoder")
        ),
        "blocks": {"M": options},
        "positions": "none" if args.get("no_token_positional_embeddings") else "sinusoidal",
        "pad": PAD,
        "start": END,
        "end": END,
        "pad_values": "zero" if args["dynamic_padding"] else "keep",
        "target_padding": "attend",
        "activation": ACTIVATIONS[args["activation_fn"]],
        "dropout": float(args["dropout"]),
        "attention_dropout": float(args["attention_dropout"]),
        "activation_dropout": float(
            args.get("activation_dropout") or args.get("relu_dropout") or 0.0
        ),
    }


def windows(args: Mapping[str, Any], depth: int) -> tuple[Any, ...]:
    """Returns the kernel sizes: one tuple for all layers, or one tuple per layer."""
    kind = args["attn_dynamic_type"]
    if kind == 0 or not args["attn_dynamic_cat"]:
        return ()
    if kind == 2:
        layers = [tuple(_list(args, "attn_wide_kernels"))] * depth
    elif kind == 1 and args["kernel_size"]:
        layers = [(args["kernel_size"],)] * depth
    elif kind == 1:
        growing = _list(args, "dynamic_depth_kernels")
        if len(growing) < depth:
            raise ValueError(f"dynamic_depth_kernels={growing} for {depth} layers: give one each")
        layers = [(side,) for side in growing[:depth]]
    else:
        raise ValueError(f"attn_dynamic_type={kind}: allowed are 0, 1 and 2")
    for sides in layers:
        if any(side % 2 == 0 for side in sides) or len(set(sides)) < len(sides) or not sides:
            raise ValueError(f"kernels {list(sides)}: they must be odd, different, at least one")
        if args["dynamic_gate"] not in (0, 1) and len(sides) > 1:
            raise ValueError(
                f"dynamic_gate={args['dynamic_gate']} with kernels {list(sides)} fails in their "
                "code too: use 1 (softmax gate) or 0 (side by side)"
            )
    return tuple(layers) if kind == 1 and not args["kernel_size"] else layers[0]


def _list(args: Mapping[str, Any], name: str) -> list[int]:
    value = args.get(name)
    if isinstance(value, str):
        value = [int(part) for part in re.findall(r"\d+", value)]
    if not value:
        raise ValueError(f"{name} is not in the arguments, but attn_dynamic_type needs it")
    if not isinstance(value, Sequence) or not all(isinstance(n, numbers.Integral) for n in value):
        raise ValueError(f"{name}={value!r}: give a list of integers")
    return list(value)


# ---------------------------------------------------------------------------- names

TOP = {
    "embedding": "encoder.embed_tokens.weight",
    "source_embedding": "encoder.embed_tokens.weight",
    "target_embedding": "decoder.embed_tokens.weight",
    "output_embedding": "decoder.embed_out",
}
INSIDE = {
    "norm": "self_attn_layer_norm",
    "muse/qkv": "self_attn.in_proj_",
    "muse/output": "self_attn.out_proj",
    "muse/convolution": "self_attn.dynamic_gate_para",
    "muse/hidden": "fc1",
    "muse/pointwise": "fc2",
    "muse/cross/query": "encoder_attn.in_proj_",
    "muse/cross/key_value": "encoder_attn.in_proj_",
    "muse/cross/output": "encoder_attn.out_proj",
}


def _source(
    module: EncoderDecoder,
) -> Callable[[Path, tuple[int, ...]], tuple[str, Transform]]:
    """Returns a function: path and shape of our leaf -> fairseq's name, and the transform."""

    def source(path: Path, shape: tuple[int, ...]) -> tuple[str, Transform]:
        _, side, *middle, leaf = path
        if side in TOP:
            return TOP[side], weights.as_is
        suffix = "bias" if leaf == "bias" else "weight"
        if middle == ["norm"]:
            return f"{side}.layer_norm.{suffix}", weights.as_is
        layer = int(middle[0].removeprefix("layer")) - 1
        theirs = f"{side}.layers.{layer}"
        inside = "/".join(middle[1:])
        if inside.startswith("muse/convolution/kernel"):
            sides = layer_options(module.blocks["M"], layer)["windows"]
            number = sides.index(int(inside.removeprefix("muse/convolution/kernel")))
            name = f"{theirs}.self_attn.dynamics.{number}.weight_linear.weight"
            return name, _reshaped(shape)
        theirs = f"{theirs}.{INSIDE[inside]}"
        if inside == "muse/convolution":
            return theirs, weights.as_is
        theirs += suffix if theirs.endswith("_") else f".{suffix}"
        # their in_proj stacks query, key and value; cross-attention reads one part or two
        part = {"muse/cross/query": (0, 1), "muse/cross/key_value": (1, 3)}.get(inside)
        return theirs, _reshaped(shape, part)

    return source


def _reshaped(shape: tuple[int, ...], part: tuple[int, int] | None = None) -> Transform:
    """Returns the transform of (a part of) [out, in] to [in, *shape of the output]."""

    def transform(array: np.ndarray) -> np.ndarray:
        if part is not None:
            start, stop = (len(array) // 3 * n for n in part)
            array = array[start:stop]
        array = array.T
        if array.ndim == 2 and array.shape[0] != shape[0]:
            return array  # its shape goes into the error
        return array.reshape(shape)

    return transform


def _ignored(module: EncoderDecoder, args: Mapping[str, Any]) -> Callable[[str], bool]:
    """Returns a predicate for names of arrays that cannot change a result."""
    names = [r"(en|de)coder\.version", r"(en|de)coder\.embed_positions\._float_tensor"]
    names.append(r"decoder\.layers\.\d+\.encoder_attn_layer_norm\.(weight|bias)")
    if module.embeddings == "shared":
        names.append(r"decoder\.embed_tokens\.weight")  # the same array once more
    if not args.get("attn_dynamic_cat", DEFAULTS["attn_dynamic_cat"]):
        names.append(r"(en|de)coder\.layers\.\d+\.self_attn\.dynamics\..*")
    elif len(layer_options(module.blocks["M"], 0)["windows"]) == 1:
        names.append(r"(en|de)coder\.layers\.\d+\.self_attn\.dynamic_gate_para")
    pattern = re.compile("|".join(names))
    return lambda name: pattern.fullmatch(name) is not None
