# SPDX-License-Identifier: Apache-2.0
"""This machine against timm and against MUSE in eager PyTorch: a line of cpu.csv per row.

    python experiments/benchmarks/cpu.py --theirs PYTHON [NAME ...]

`PYTHON`: of an environment with torch and timm (the project itself needs neither).
"""

import argparse
import os
import pathlib
import sys

import pairs

HERE = pathlib.Path(__file__).parent
ROUNDS = 5

# name: (work of ours.py, script of theirs, its work, goal for how many times as fast)
ROWS = {
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
        ("train muse_iwslt 32", "theirs_muse.py", "train 32", 2.0),
    "MUSE decoding, beam 5, batch 1 / PyTorch eager":
        ("decode muse_iwslt 1", "theirs_muse.py", "decode 1", 5.0),
    "MUSE decoding, beam 5, batch 8 / PyTorch eager":
        ("decode muse_iwslt 8", "theirs_muse.py", "decode 8", 5.0),
    "MUSE decoding, batch 1, projections fused / not":
        ("decode muse_iwslt 1 blocks={'M':{'fused':True}}", "ours.py", "decode muse_iwslt 1", 1.2),
}  # fmt: skip


def measure(name, python):
    """One row."""
    work, script, other, goal = ROWS[name]
    python = sys.executable if script == "ours.py" else python
    sides = [
        pairs.Worker([sys.executable, str(HERE / "ours.py"), *work.split()]),
        pairs.Worker([python, str(HERE / script), *other.split()]),
    ]
    seconds = pairs.in_turns(sides, ROUNDS)
    for side in sides:
        side.close()
    return {
        "name": name,
        "goal": goal,
        **{f"ratio_{k}": v for k, v in pairs.spread(seconds[:, 1] / seconds[:, 0]).items()},
        "our_seconds": pairs.spread(seconds[:, 0])["median"],
        "their_seconds": pairs.spread(seconds[:, 1])["median"],
        "theirs": sides[1].about,
        "load": round(os.getloadavg()[0], 1),
        **pairs.environment(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings; default: all rows")
    parser.add_argument("--theirs", required=True, metavar="PYTHON", help="has torch and timm")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in ROWS:
        if args.names and not name.startswith(tuple(args.names)):
            continue
        row = measure(name, args.theirs)
        pairs.write(HERE / "cpu.csv", [row])
        print(
            f"{name}: {row['ratio_median']:.2f} times as fast "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}; goal {row['goal']})",
            flush=True,
        )


if __name__ == "__main__":
    main()
