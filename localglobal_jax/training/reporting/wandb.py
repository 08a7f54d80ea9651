# SPDX-License-Identifier: Apache-2.0
"""A run of Weights & Biases, for those who have it installed and ask for it (``log.wandb``)."""

import html
import importlib.util
import logging
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

log = logging.getLogger(__name__)
ALONE = ("offline", "disabled", "dryrun")  # values of WANDB_MODE that ask nobody


def check(project: str | None) -> None:
    """Raises ValueError if a project is asked for where nobody could report to it."""
    if not project:
        return
    if not importlib.util.find_spec("wandb"):
        raise ValueError(
            f"log.wandb={project}: wandb is not installed: pip install 'localglobal_jax[wandb]'"
        )
    import wandb  # noqa: PLC0415 # an extra

    if os.environ.get("WANDB_MODE") not in ALONE and not wandb.api.api_key:
        raise ValueError(
            f"log.wandb={project}: wandb knows no key: run `wandb login`, set WANDB_API_KEY, or "
            "WANDB_MODE=offline to keep everything here"
        )


def start(
    project: str, directory: pathlib.Path, config: Mapping[str, Any], name: str
) -> "WandbRun | None":
    """None, and a line that says so, where wandb cannot: training goes on without it."""
    try:
        return WandbRun(project, directory, config, name)
    except Exception as error:  # its own kinds, and those of the network below it
        log.error("log.wandb=%s: %s; training without it", project, error)
        return None


class WandbRun:
    """The run of a workdir: resumed, it goes on as the same one. `config` is shown beside it.

    Curves are drawn over our step, not over the number of calls, which must grow: what a run that
    died had written past its checkpoint is written again.
    """

    def __init__(self, project: str, directory: pathlib.Path, config: Mapping[str, Any], name: str):
        import wandb  # noqa: PLC0415 # an extra

        self._image, self._html = wandb.Image, wandb.Html
        file = directory / "wandb_id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=project,
            name=name,
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
        values = {
            name: self._html(f"<pre>{html.escape(value)}</pre>")
            if isinstance(value, str)
            else self._image(value)
            for name, value in shown.items()
        }
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """wandb writes by itself."""

    def close(self) -> None:
        """Ends the run; it waits until everything is uploaded, unless WANDB_MODE=offline."""
        self._run.finish()
