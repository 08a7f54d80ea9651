# SPDX-License-Identifier: Apache-2.0
"""Verifies that the files of a workdir are those of its newest checkpoint."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from localglobal_jax.checkpoints import workdir
from localglobal_jax.data.text import tokenizers
from localglobal_jax.training.reporting import metrics_log


def check_files(path: pathlib.Path, steps: list[Mapping[str, Any]]) -> list[dict[str, str | None]]:
    """Returns ``[{"file", "error"}]`` for the workdir `path`; the error of a good file is None.

    `steps` is the list that `reader.inspect` returns; the newest step without an error is the
    reference. Returns an empty list without such a step, and for converted weights.
    """
    good = [entry for entry in steps if not entry["error"]]
    if not good or "config" not in good[-1]["metadata"]:
        return []
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
