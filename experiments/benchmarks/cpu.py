# SPDX-License-Identifier: Apache-2.0
"""This machine against timm and the published code of MUSE: one command, a line per row of cpu.csv.

    python experiments/benchmarks/cpu.py --theirs PYTHON [NAME ...]

`PYTHON`: of an environment with torch and timm (the project itself needs neither). The published
code of MUSE is not at hand: its figures were taken on a machine whose 2048^3 float32 product ran at
160 GFLOP/s, and are scaled by what that product takes here, in turns with what is measured.
"""

import argparse
import os
import pathlib
import sys

import pairs

HERE = pathlib.Path(__file__).parent
ROUNDS = 9

# name: (ours, theirs, goal); theirs is a command, another of ours, or a published rate
TIMM = {
    "coatnet_0 inference, eager": ("infer coatnet_0 8", "infer coatnet_0_224 8 eager", 1.7),
    "coatnet_0 inference, compiled": ("infer coatnet_0 8", "infer coatnet_0_224 8 compile", 1.2),
    "coatnet_0 training, eager": ("train coatnet_0 8", "train coatnet_0_224 8 eager", 1.2),
    "volo_d1 inference, eager": ("infer volo_d1 8", "infer volo_d1_224 8 eager", 1.5),
}
OURSELVES = {
    "MUSE decoding, batch 1, fused / not": (
        "decode muse_iwslt 1 blocks={'M':{'fused':True}}",
        "decode muse_iwslt 1",
        1.2,
    ),
}
# items of one piece of our work, what is counted, items/s of the published code at 160 GFLOP/s
PUBLISHED = {
    "MUSE training, 32 x 32 tokens": ("train muse_iwslt 32", 1024, "tokens", 340, 2),
    "MUSE decoding, beam 5, batch 1": ("decode muse_iwslt 1", 1, "sentences", 0.98, 5),
    "MUSE decoding, beam 5, batch 8": ("decode muse_iwslt 8", 8, "sentences", 3.0, 5),
}
PRODUCT = 2 * 2048**3  # FLOP


def ours(arguments):
    """A worker of ours."""
    command = [sys.executable, str(HERE / "ours.py"), *arguments.split()]
    return pairs.Worker(command, {"JAX_PLATFORMS": "cpu"})


def measure(name, python):
    """One row."""
    if name in PUBLISHED:
        work, items, what, rate, goal = PUBLISHED[name]
        sides = [ours(work), ours("matmul - 2048")]
        seconds = pairs.in_turns(sides, ROUNDS)
        speed = PRODUCT / seconds[:, 1]
        scaled = rate * speed / 160e9
        ratio = items / seconds[:, 0] / scaled
        about = f"published {rate} {what}/s, scaled to {speed.mean() / 1e9:.0f} GFLOP/s"
    else:
        if name in TIMM:
            work, other, goal = TIMM[name]
            them = pairs.Worker([python, str(HERE / "theirs.py"), *other.split()])
        else:
            work, other, goal = OURSELVES[name]
            them = ours(other)
        sides = [ours(work), them]
        seconds = pairs.in_turns(sides, ROUNDS)
        ratio, about = seconds[:, 1] / seconds[:, 0], them.about
    for side in sides:
        side.close()
    return {
        "name": name,
        "goal": goal,
        **{f"ratio_{k}": v for k, v in pairs.spread(ratio).items()},
        **{f"our_seconds_{k}": v for k, v in pairs.spread(seconds[:, 0]).items()},
        "their_seconds_median": pairs.spread(seconds[:, 1])["median"],
        "theirs": about,
        "load": round(os.getloadavg()[0], 1),
        **pairs.environment(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [*TIMM, *OURSELVES, *PUBLISHED]
    parser.add_argument("names", nargs="*", metavar="NAME", help="begins of rows; default: all")
    parser.add_argument("--theirs", metavar="PYTHON", help="has torch and timm; else no such rows")
    args = parser.parse_args()
    for name in everything:
        if args.names and not name.startswith(tuple(args.names)):
            continue
        if name in TIMM and not args.theirs:
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
