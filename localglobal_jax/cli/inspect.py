# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal inspect`: lists the checkpoints of a workdir, and verifies them."""

import argparse
import json

from localglobal_jax.launch.exit_codes import ExitCode

NAME = "inspect"
HELP = "what is in a checkpoint"
EXAMPLE = "runs/digits --verify"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("path", metavar="PATH", help="a workdir, or a checkpoint in it")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="re-check the digest of every leaf, and the files of the workdir",
    )


def run(args: argparse.Namespace) -> int:
    """Prints one paragraph per checkpoint; returns 1 if anything is damaged."""
    from localglobal_jax.checkpoints import workdir

    workdir.check_exists(args.path, workdir.without_checkpoint)
    from localglobal_jax.checkpoints import gcs, reader, store
    from localglobal_jax.training import verification
    from localglobal_jax.training.reporting.run import short

    with store.final_is_wrong():
        found = reader.inspect(args.path, verify=args.verify)
    bad = [step for step in found["steps"] if step["error"]]
    path = str(workdir.absolute(args.path))
    if (
        args.verify and found["directory"] == f"{path}/checkpoints"
    ):  # a workdir, not a checkpoint in it
        copy = gcs.LocalMirror(path)
        found["files"] = verification.check_files(copy.local, found["steps"])
        bad += [file for file in found["files"] if file["error"]]
    code = ExitCode.FAILED if bad else ExitCode.DONE
    if args.json:
        print(json.dumps(found))
        return code
    print(found["directory"])
    for file in found.get("files", []):
        print(f"{file['file']}: " + (f"DAMAGED: {file['error']}" if file["error"] else "verified"))
    for step in found["steps"]:
        if step["error"]:
            print(f"step {step['step']}: DAMAGED: {step['error']}")
            continue
        metrics = "  ".join(f"{k} {short(v)}" for k, v in step["metrics"].items())
        verified = "  digests verified" if step["verified"] else ""
        print(
            f"step {step['step']}: {len(step['leaves'])} arrays, {step['bytes']:,} bytes{verified}"
        )
        print(f"  {metrics}" if metrics else "  (no metrics)")
    if not bad and found["steps"]:
        last = found["steps"][-1]
        print("\n".join(f"  {k}  {v['dtype']}{v['shape']}" for k, v in last["leaves"].items()))
    return code
