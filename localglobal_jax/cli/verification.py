# SPDX-License-Identifier: Apache-2.0
"""The files of a workdir beside its checkpoints: are they still what the run wrote?

Checkpoints check themselves (`stored.py`). `model_card.md` and `learning_curve.png` are made from
the files that are checked here; TensorBoard's files have a checksum in every record.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from localglobal_jax.checkpoints import workdir
from localglobal_jax.data.text import tokenizers
from localglobal_jax.training.reporting import metrics_log


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
