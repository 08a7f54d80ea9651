# SPDX-License-Identifier: Apache-2.0
"""Compares this machine with timm and with MUSE in PyTorch: a line of cpu.csv, or gpu.csv, per row.

    python experiments/benchmarks/machine.py --theirs PYTHON [--gpu] [NAME ...]

`PYTHON`: an environment with torch and timm (the project itself needs neither). On CPU both
sides compute in float32, on a GPU in bfloat16, theirs by autocast and compiled. A row that fails,
e.g. because memory is short, says so in the table, and the others go on (exit code 1). The same
command goes on with the rows that this machine has not measured.
"""

import argparse
import contextlib
import csv
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


# For --check: the same rows on any CPU, in a minute.
SMALL = {
    "coatnet_0": "depths=(1,1,1,1) widths=(8,8,32,32) stem=(8,8) image=32",
    "volo_d1": "depths=(1,1,1,1) widths=(8,16,16,16) heads=(2,2,2,2) stem=8 image=32",
    "muse_iwslt": "depths=(1,1) widths=(16,16) heads=(2,2) hidden=(16,16)",
}


def small(work):
    """Returns the work of `ours.py` at batch 2 with a small model."""
    kind, name, _, *options = work.split()
    return " ".join([kind, name, "2", *options, SMALL[name]])


def measure(row, python, rounds):
    """Returns ratios and seconds of one row. Raises `pairs.Failed`."""
    work, script, other, goal = row
    python = sys.executable if script == "ours.py" else python
    with contextlib.ExitStack() as stack:

        def start(*command):
            worker = pairs.Worker(command)
            stack.callback(worker.close)
            return worker

        theirs = start(python, str(HERE / script), *other.split())  # first: it fails at once
        ours = start(sys.executable, str(HERE / "ours.py"), *work.split())
        seconds = pairs.in_turns([ours, theirs], rounds)
    return {
        "goal": goal,
        "rounds": rounds,
        **{f"ratio_{k}": v for k, v in pairs.spread(seconds[:, 1] / seconds[:, 0]).items()},
        "our_seconds": pairs.spread(seconds[:, 0])["median"],
        "their_seconds": pairs.spread(seconds[:, 1])["median"],
        "ours": ours.about,
        "theirs": theirs.about,
    }


def measured(path, about):
    """Returns the names of the rows of a table that this machine has measured."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    same = [k for k in about if k not in ("date", "load")]
    return {
        row["name"]
        for row in rows
        if not row.get("failed") and all(row.get(k, "") == str(about[k]) for k in same)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings; default: all rows")
    parser.add_argument("--theirs", required=True, metavar="PYTHON", help="has torch and timm")
    parser.add_argument("--gpu", action="store_true", help="the rows for a GPU, into gpu.csv")
    parser.add_argument("--again", action="store_true", help="also rows that this machine has")
    parser.add_argument("--check", metavar="FILE",
        help="with --gpu: try all rows on the CPU with small models, into FILE")  # fmt: skip
    args = parser.parse_args()
    rows = GPU if args.gpu else CPU
    path = HERE / ("gpu.csv" if args.gpu else "cpu.csv")
    rounds = ROUNDS
    if args.check:
        if not args.gpu:
            parser.error("--check is for --gpu: the rows without it run on any CPU")
        rows = {name: (small(row[0]), *row[1:]) for name, row in GPU.items()}
        path, rounds = pathlib.Path(args.check), 1
    if args.gpu and not args.check:
        os.environ.update(
            DEVICE="cuda",
            JAX_PLATFORMS="cuda",
            XLA_PYTHON_CLIENT_PREALLOCATE="false",  # both sides are in its memory at once
            # both sides on one GPU: the first of those that are allowed
            CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        )
    else:
        os.environ.update(DEVICE="cpu", JAX_PLATFORMS="cpu")
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # what `localglobal` sets for itself
    about = {**pairs.environment(), **({"gpu": pairs.gpu()} if args.gpu else {})}
    done = set() if args.again else measured(path, about)
    failed = False
    for name, row in rows.items():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        if name in done:
            print(f"{name}: measured before; --again measures it anew", flush=True)
            continue
        load = round(os.getloadavg()[0], 1)
        try:
            found = measure(row, args.theirs, rounds)
            said = (
                f"{found['ratio_median']:.2f} times as fast "
                f"({found['ratio_low']:.2f} to {found['ratio_high']:.2f}; goal {found['goal']})"
            )
        except (pairs.Failed, OSError) as error:  # e.g. out of memory: the other rows go on
            failed, said = True, f"failed: {error}"
            found = {"goal": row[3], "failed": str(error)}
        pairs.write(path, [{"name": name, **found, "load": load, **about}])
        print(f"{name}: {said}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
