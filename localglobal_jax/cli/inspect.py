# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal inspect`: options, and what it prints."""

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from localglobal_jax.checkpoints import workdir
from localglobal_jax.data.text import tokenizers
from localglobal_jax.training.reporting import metrics_log


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

    pass

    found = reader.inspect(args.path, verify=args.verify)
    bad = [step for step in found["steps"] if step["error"]]
    path = str(epath.Path(args.path).expanduser().absolute())
    if args.verify and found["directory"] == f"{path}/checkpoints":  # a workdir, no part of one
        copy = gcs.LocalMirror(path)
        found["files"] = files(copy.local, found["steps"])
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


def files(path: pathlib.Path, steps: list[Mapping[str, Any]]) -> list[dict[str, str | None]]:
    """``[{"file", "error"}]`` of the workdir `path`; an error of None is a file that is right.

    `steps`: as `stored.inspect` gives them; the newest without an error says what should be there.
    """
    good = [entry for entry in steps if not entry["error"]]
    if not good or "config" not in good[-1]["metadata"]:
        return []  # nobody knows; or converted weights, which have none of these
    step, metadata = good[-1]["step"], good[-1]["metadata"]
    checks: dict[str, Callable[[], None]] = {
        "config.json": lambda: _config(path, step, metadata),
        "metrics.jsonl": lambda: _metrics(path, step, metadata),
    }
    if metadata["config"]["task"]["name"] == "translation":
        checks[tokenizers.DIRECTORY] = lambda: _tokenizer(path)
    return [{"file": name, "error": _error(check)} for name, check in checks.items()]


def _error(check: Callable[[], None]) -> str | None:
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _config(path: pathlib.Path, step: int, metadata: Mapping[str, Any]) -> None:
    if not (path / "config.json").exists():
        raise ValueError("config.json is missing")
    workdir.check_config(path, step, metadata)


def _metrics(path: pathlib.Path, step: int, metadata: Mapping[str, Any]) -> None:
    written = metadata.get("metrics_crc32")
    if written is not None and written != metrics_log.checksum(path, step):
        raise ValueError(f"metrics.jsonl has other lines up to step {step} than when it was saved")


def _tokenizer(path: pathlib.Path) -> None:
    if tokenizers.load(path / tokenizers.DIRECTORY) is None:
        raise ValueError(f"{tokenizers.DIRECTORY}/{tokenizers.INDEX} is missing")
