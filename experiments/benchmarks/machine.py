# SPDX-License-Identifier: Apache-2.0
"""Compares this machine with timm and with MUSE in PyTorch: a line of cpu.csv, or gpu.csv, per row.

    python experiments/benchmarks/machine.py --theirs PYTHON [--gpu] [NAME ...]

`PYTHON`: an environment with torch and timm (the project itself needs neither). On CPU both
sides compute in float32, on a GPU in bfloat16, theirs by autocast and compiled.
"""

import argparse
import os
import pathlib
import sys

import pairs

HERE = pathlib.Path(__file__).parent
ROUNDS = 5

# name: (work of ours.py, script of theirs, its work, goal for how many times as fast)
CPU = {
    "coatnet_0 inference / timm eager":
        ("infer coatnet_0 8", "theirs.py", "infer coatnet_0_224 8 eager", 1.7),
    "coatnet_0 inference / timm compiled":
        ("infer coatnet_0 8", "theirs.py", "infer coatnet_0_224 8 compile", 1.2),
    "coatnet_0 training / timm eager":
        ("train coatnet_0 8", "theirs.py", "train coatnet_0_224 8 eager", 1.2),
    "volo_d1 inference / timm eager":
        ("infer volo_d1 8", "theirs.py", "infer volo_d1_224 8 eager", 1.5),
    "focal_tiny inference / its plain formulation":
        ("infer focal_tiny 8", "ours.py", "infer focal_tiny 8 plain", 1.5),
    "MUSE training, 32 x 32 tokens / PyTorch eager":
        ("train muse_iwslt 32", "theirs_muse.py", "train 32 eager", 2.0),
    "MUSE decoding, beam 5, batch 1 / PyTorch eager":
        ("decode muse_iwslt 1", "theirs_muse.py", "decode 1 eager", 5.0),
    "MUSE decoding, beam 5, batch 8 / PyTorch eager":
        ("decode muse_iwslt 8", "theirs_muse.py", "decode 8 eager", 5.0),
    "MUSE decoding, batch 1, projections fused / not":
        ("decode muse_iwslt 1 blocks={'M':{'fused':True}}", "ours.py", "decode muse_iwslt 1", 1.2),
}  # fmt: skip
BF16 = "dtype='bfloat16'"
GPU = {
    "coatnet_0 training / timm compiled":
        (f"train coatnet_0 64 {BF16}", "theirs.py", "train coatnet_0_224 64 compile", 1.3),
    "coatnet_0 inference / timm compiled":
        (f"infer coatnet_0 64 {BF16}", "theirs.py", "infer coatnet_0_224 64 compile", 1.2),
    "volo_d1 inference / timm compiled":
        (f"infer volo_d1 64 {BF16}", "theirs.py", "infer volo_d1_224 64 compile", 1.2),
    "MUSE training, 128 x 32 tokens / PyTorch compiled":
        (f"train muse_iwslt 128 {BF16}", "theirs_muse.py", "train 128 compile", 1.3),
    "MUSE decoding, beam 5, batch 32 / PyTorch eager":
        (f"decode muse_iwslt 32 {BF16}", "theirs_muse.py", "decode 32 eager", 2.0),
}  # fmt: skip


def measure(row, python):
    """Returns ratios and seconds of one row."""
    work, script, other, goal = row
    python = sys.executable if script == "ours.py" else python
    sides = [
        pairs.Worker([sys.executable, str(HERE / "ours.py"), *work.split()]),
        pairs.Worker([python, str(HERE / script), *other.split()]),
    ]
    seconds = pairs.in_turns(sides, ROUNDS)
    for side in sides:
        side.close()
    return {
        "goal": goal,
        "rounds": ROUNDS,
        **{f"ratio_{k}": v for k, v in pairs.spread(seconds[:, 1] / seconds[:, 0]).items()},
        "our_seconds": pairs.spread(seconds[:, 0])["median"],
        "their_seconds": pairs.spread(seconds[:, 1])["median"],
        "ours": sides[0].about,
        "theirs": sides[1].about,
        "load": round(os.getloadavg()[0], 1),
        **pairs.environment(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings; default: all rows")
    parser.add_argument("--theirs", required=True, metavar="PYTHON", help="has torch and timm")
    parser.add_argument("--gpu", action="store_true", help="the rows for a GPU, into gpu.csv")
    args = parser.parse_args()
    if args.gpu:  # both sides have to be in its memory at once
        os.environ.update(
            DEVICE="cuda", JAX_PLATFORMS="cuda", XLA_PYTHON_CLIENT_PREALLOCATE="false"
        )
    else:
        os.environ.update(DEVICE="cpu", JAX_PLATFORMS="cpu")
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # what `localglobal` sets for itself
    for name, row in (GPU if args.gpu else CPU).items():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        found = {"name": name, **measure(row, args.theirs)}
        pairs.write(HERE / ("gpu.csv" if args.gpu else "cpu.csv"), [found])
        print(
            f"{name}: {found['ratio_median']:.2f} times as fast "
            f"({found['ratio_low']:.2f} to {found['ratio_high']:.2f}; goal {found['goal']})",
            flush=True,
        )


if __name__ == "__main__":
    main()
