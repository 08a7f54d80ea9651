# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal inspect`: options, and what it prints."""

import argparse
import json


def add_options(sub: argparse.ArgumentParser) -> None:
    """All but ``--json``."""
    sub.add_argument("path", metavar="PATH", help="a workdir, or a checkpoint in it")
    sub.add_argument(
        "--verify",
        action="store_true",
        help="re-check the digest of every leaf, and the files of the workdir",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if anything is damaged."""
    from etils import epath

    from localglobal_jax.checkpoints import gcs, reader
    from localglobal_jax.cli import verification

    found = reader.inspect(args.path, verify=args.verify)
    bad = [step for step in found["steps"] if step["error"]]
    path = str(epath.Path(args.path).expanduser().absolute())
    if args.verify and found["directory"] == f"{path}/checkpoints":  # a workdir, no part of one
        copy = gcs.Copy(path)
        found["files"] = verification.files(copy.local, found["steps"])
        bad += [file for file in found["files"] if file["error"]]
    if args.json:
        print(json.dumps(found))
        return 1 if bad else 0
    print(found["directory"])
    for file in found.get("files", []):
        print(f"{file['file']}: " + (f"DAMAGED: {file['error']}" if file["error"] else "verified"))
    for step in found["steps"]:
        if step["error"]:
            print(f"step {step['step']}: DAMAGED: {step['error']}")
            continue
        metrics = "  ".join(f"{k} {v:.5g}" for k, v in step["metrics"].items())
        verified = "  digests verified" if step["verified"] else ""
        print(
            f"step {step['step']}: {len(step['leaves'])} arrays, {step['bytes']:,} bytes{verified}"
        )
        print(f"  {metrics}" if metrics else "  (no metrics)")
    if not bad and found["steps"]:
        last = found["steps"][-1]
        print("\n".join(f"  {k}  {v['dtype']}{v['shape']}" for k, v in last["leaves"].items()))
    return 1 if bad else 0
