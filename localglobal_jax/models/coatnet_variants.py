# SPDX-License-Identifier: Apache-2.0
"""CoAtNet's named sizes, as fields of the module: the paper's, its layouts, timm's families.

Pure data. Where timm and the paper share a name (``coatnet_0``..``5``) the fields are the paper's;
they differ in ``coatnet_5`` only, whose heads are 64 wide in the paper and 32 in timm (the
converter knows).
"""

from typing import Any

Spec = dict[str, Any]


def _paper(stem: int, depths: tuple[int, ...], widths: tuple[int, ...], **other: Any) -> Spec:
    """Table 3; the tanh layer before the classifier is as wide as the last stage."""
    spec = {"stem": (stem, stem), "depths": depths, "widths": widths, "head_hidden": widths[-1]}
    return {**spec, **other}


def _heads(width: int) -> Spec:
    return {"blocks": {"T": {"head_width": width}}}


PAPER: dict[str, Spec] = {
    "coatnet_0": _paper(64, (2, 3, 5, 2), (96, 192, 384, 768)),
    "coatnet_1": _paper(64, (2, 6, 14, 2), (96, 192, 384, 768)),
    "coatnet_2": _paper(128, (2, 6, 14, 2), (128, 256, 512, 1024)),
    "coatnet_3": _paper(192, (2, 6, 14, 2), (192, 384, 768, 1536)),
    "coatnet_4": _paper(192, (2, 12, 28, 2), (192, 384, 768, 1536)),
    "coatnet_5": _paper(192, (2, 12, 28, 2), (256, 512, 1280, 2048), **_heads(64)),
    # S3 of these two is mixed: 8 MBConv blocks, then 42 attention blocks of twice the width.
    # Table 12 gives coatnet_6 an S4 of 2048 (so do two conversions of the paper and five codes),
    # with which it has 1.350 B parameters. Its own totals, 1.47 B and 1,521 G multiply-adds, fit an
    # S4 of 3072 (1,472.8 M and 1,510 G) as closely as coatnet_7's fit: most likely a slip in the
    # table. So coatnet_6 has 2048, and coatnet_6_3072 the other.
    "coatnet_6": _paper(
        192,
        (2, 4, 8, 42, 2),
        (192, 384, 768, 1536, 2048),
        layout="CCCTT",
        strides=(2, 2, 2, 1, 2),
        **_heads(128),
    ),
    "coatnet_6_3072": _paper(
        192,
        (2, 4, 8, 42, 2),
        (192, 384, 768, 1536, 3072),
        layout="CCCTT",
        strides=(2, 2, 2, 1, 2),
        **_heads(128),
    ),
    "coatnet_7": _paper(
        192,
        (2, 4, 8, 42, 2),
        (256, 512, 1024, 2048, 3072),
        layout="CCCTT",
        strides=(2, 2, 2, 1, 2),
        **_heads(128),
    ),
}

# Section 4.3 compares layouts of about 25 M parameters and gives no depths. These are
# coatnet_0's, with the third stage lengthened where an MBConv block is the smaller one.
LAYOUTS: dict[str, Spec] = {
    "coatnet_cccc": _paper(64, (2, 3, 8, 2), (96, 192, 384, 768), layout="CCCC"),
    "coatnet_ccct": _paper(64, (2, 3, 6, 2), (96, 192, 384, 768), layout="CCCT"),
    "coatnet_cctt": _paper(64, (2, 3, 5, 2), (96, 192, 384, 768), layout="CCTT"),
    "coatnet_cttt": _paper(64, (2, 3, 5, 2), (96, 192, 384, 768), layout="CTTT"),
    "coatnet_tttt": _paper(64, (2, 3, 5, 2), (96, 192, 384, 768), layout="TTTT"),
    "vit_rel": {  # patches of 16, then relative attention at one resolution
        "stem": (384,),
        "stem_stride": 16,
        "layout": "T",
        "depths": (14,),
        "widths": (384,),
        "strides": (1,),
    },
}


def _rw(size: str, depths: tuple[int, ...], letter: Spec, attention: Spec, **other: Any) -> Spec:
    """timm's ``_rw``: a stem of half the width, SiLU, attention that widens at its output."""
    widths = {
        "nano": (64, 128, 256, 512),
        "0": (96, 192, 384, 768),
        "2": (128, 256, 512, 1024),
        "3": (192, 384, 768, 1536),
    }[size]
    stem = {"nano": (32, 64), "0": (32, 64), "2": (64, 128), "3": (96, 192)}[size]
    spec = {
        "stem": stem,
        "stem_activation": "silu",
        "depths": depths,
        "widths": widths,
        "blocks": {"C": letter, "T": {"widen_at": "output", **attention}},
        "head_norm_first": True,
    }
    return {**spec, **other}


_COAT: Spec = {  # the MBConv of timm's first series
    "expand_from": "input",
    "pre_activation": True,
    "activation": "silu",
    "squeeze_activation": "relu",
    "use_bias": False,
}
_MAX: Spec = {"expand_from": "input", "activation": "silu"}  # of its MaxViT-like series
_POOL = {"stride_at": "pool"}
_EARLY = {"squeeze_early": True}
_SILU = {"squeeze_activation": "silu"}
_BARE = {"shortcut_bias": False}
_NANO, _ZERO_RW, _DEEP = (3, 4, 6, 3), (2, 3, 7, 2), (2, 6, 14, 2)


def _mlp(hidden: int) -> Spec:
    return {"bias": "mlp", "bias_hidden": hidden}


TIMM: dict[str, Spec] = {
    "coatnet_pico_rw": _rw("nano", (2, 3, 5, 2), _MAX, {}),
    "coatnet_nano_rw": _rw("nano", _NANO, _MAX | _POOL, {}),
    "coatnet_0_rw": _rw("0", _ZERO_RW, _COAT | _POOL | _EARLY, _BARE),
    "coatnet_1_rw": _rw("0", _DEEP, _COAT | _EARLY, _BARE),
    "coatnet_2_rw": _rw("2", _DEEP, _COAT | _SILU, {}),
    "coatnet_3_rw": _rw("3", _DEEP, _COAT | _SILU, {"layer_scale": 1e-6}),
    "coatnet_bn_0_rw": _rw(
        "0", _ZERO_RW, _COAT | _EARLY, _BARE | {"norm": "batch"}, head_norm="batch"
    ),
    "coatnet_rmlp_nano_rw": _rw("nano", _NANO, _MAX, _mlp(384)),
    "coatnet_rmlp_0_rw": _rw("0", _ZERO_RW, _COAT, _mlp(512)),
    "coatnet_rmlp_1_rw": _rw(
        "0",
        _DEEP,
        _COAT | _POOL | _EARLY | {"pool": "max"},
        _BARE | _mlp(384) | {"pool": "max"},
    ),
    "coatnet_rmlp_1_rw2": _rw("0", _DEEP, _COAT, _mlp(512)),
    "coatnet_rmlp_2_rw": _rw("2", _DEEP, _COAT | _SILU, _mlp(512) | {"layer_scale": 1e-6}),
    "coatnet_rmlp_3_rw": _rw("3", _DEEP, _COAT | _SILU, _mlp(512) | {"layer_scale": 1e-6}),
    "coatnet_nano_cc": _rw("nano", _NANO, _COAT | _POOL, {}, layout=("C", "C", "CTTTTT", "CTT")),
    "coatnext_nano_rw": _rw("nano", _NANO, {}, {})
    | {
        "layout": "NNTT",
        "stem_activation": "gelu",
        "stem_norm": "layer",
        "stem_norm_eps": 1e-6,
        "blocks": {"N": {"layer_scale": 1e-5}, "T": {"widen_at": "output"}},
    },
}

VARIANTS: dict[str, Spec] = {**PAPER, **LAYOUTS, **TIMM}

# Figures in the paper's tables: parameters, multiply-adds, and the image size of the latter. They
# are those of its formula, with the stride in the expansion; ours (and timm's) stride after it, in
# the depthwise convolution, and cost up to 8 % more. ``blocks={"C": {"stride_at": "expand"}}`` is
# the formula.
FIGURES: dict[str, tuple[float, float, int]] = {
    "coatnet_0": (25e6, 4.2e9, 224),
    "coatnet_1": (42e6, 8.4e9, 224),
    "coatnet_2": (75e6, 15.7e9, 224),
    "coatnet_3": (168e6, 34.7e9, 224),
    "coatnet_4": (275e6, 189.5e9, 384),
    "coatnet_5": (688e6, 812e9, 512),
    "coatnet_6": (1.47e9, 1521e9, 512),
    "coatnet_6_3072": (1.47e9, 1521e9, 512),
    "coatnet_7": (2.44e9, 2586e9, 512),
}
