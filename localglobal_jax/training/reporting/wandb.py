# SPDX-License-Identifier: Apache-2.0
"""Writer of a Weights & Biases run (``log.wandb``); needs the extra ``wandb``."""

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
OFFLINE = ("offline", "disabled", "dryrun")  # values of WANDB_MODE that need no key


def check(project: str | None) -> None:
    """Raises ValueError if `project` is given but wandb is not installed or has no key."""
    if not project:
        return
    if not importlib.util.find_spec("wandb"):
        raise ValueError(
            f"log.wandb={project}: wandb is not installed: pip install 'localglobal_jax[wandb]'"
        )
    import wandb  # noqa: PLC0415 # an extra

    if os.environ.get("WANDB_MODE") not in OFFLINE and not wandb.api.api_key:
        raise ValueError(
            f"log.wandb={project}: wandb has no key: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to keep everything on this machine"
        )


def start(
    project: str, directory: pathlib.Path, config: Mapping[str, Any], name: str
) -> "WandbRun | None":
    """Starts or resumes a run; logs an error and returns None if wandb fails."""
    try:
        return WandbRun(project, directory, config, name)
    except Exception as error:  # errors of wandb and of the network
        log.error("log.wandb=%s: %s; training without it", project, error)
        return None


class WandbRun:
    """The wandb run of a workdir; a resumed workdir continues the same run.

    Curves are drawn over our step, not over wandb's own, which must grow: a resumed run writes the
    steps after its checkpoint again.
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
            tags=list(config.get("log", {}).get("tags") or ()),
            notes=config.get("log", {}).get("note") or None,
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point to the curve of every name."""
        self._run.log({"step": step, **numbers})

    def show(self, step: int, shown: Mapping[str, str | np.ndarray]) -> None:
        """Adds texts and pictures (uint8 [h, w, 3]) by name."""
        values = {
            name: self._html(f"<pre>{html.escape(value)}</pre>")
            if isinstance(value, str)
            else self._image(value)
            for name, value in shown.items()
        }
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """No-op: wandb flushes by itself."""

    def close(self) -> None:
        """Ends the run; waits for the upload, unless WANDB_MODE=offline."""
        self._run.finish()
