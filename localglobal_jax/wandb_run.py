# SPDX-License-Identifier: Apache-2.0
"""A run of Weights & Biases, for those who have it installed and ask for it (``log.wandb``)."""

import importlib.util
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np


def check(project: str | None) -> None:
    """Raises ValueError if a project is asked for and the package is not there."""
    if project and not importlib.util.find_spec("wandb"):
        raise ValueError(
            f"log.wandb={project}: wandb is not installed: pip install 'localglobal_jax[wandb]'"
        )


class WandbRun:
    """The run of a workdir: resumed, it goes on as the same one. `config` is shown beside it.

    Curves are drawn over our step, not over the number of calls, which must grow: what a run that
    died had written past its checkpoint is written again.
    """

    def __init__(self, project: str, directory: pathlib.Path, config: Mapping[str, Any]):
        import wandb  # noqa: PLC0415 # an extra

        self._image, file = wandb.Image, directory / "wandb_id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            name=directory.name,
            id=file.read_text(),
            dir=str(directory),
            config=dict(config),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """A point of every curve."""
        self._run.log({"step": step, **numbers})

    def show(self, step: int, shown: Mapping[str, str | np.ndarray]) -> None:
        """Texts and pictures ([h, w, 3], uint8) by their names."""
        values = {k: v if isinstance(v, str) else self._image(v) for k, v in shown.items()}
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """wandb writes by itself."""

    def close(self) -> None:
        """Ends the run; it waits until everything is uploaded, unless WANDB_MODE=offline."""
        self._run.finish()
