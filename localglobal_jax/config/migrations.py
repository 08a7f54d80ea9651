# SPDX-License-Identifier: Apache-2.0
"""Configs that earlier versions saved: `config.json`, and the config beside a checkpoint.

`SCHEMA` counts the changes that a saved config needs. A field that is new, with a default that
means the former behaviour, needs none. One with another default has its former value in `FORMER`.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class Renamed(NamedTuple):
    """A field of one section with a new name, ``section.name``, and the new names of its values."""

    before: str
    now: str
    values: Mapping[str, str] = {}


# RENAMED[n] leads from schema n to n + 1. A saved config has its number under "schema", or none: 0.
RENAMED: tuple[tuple[Renamed, ...], ...] = (
    (
        Renamed("optim.warmup_from", "optim.init_learning_rate"),
        Renamed(
            "parallel.formulation",
            "parallel.implementation",
            {"plain": "reference", "tuned": "fused"},
        ),
    ),
)
SCHEMA = len(RENAMED)

# Values of fields of `schema.Images` in runs that began before these fields existed, where they are
# not today's defaults.
FORMER: dict[str, Any] = {"exif_orientation": None}


def migrate(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved config, nested dicts, with the names of today; logs those that it replaces.

    Raises ValueError for the config of a later version.
    """
    tree = {k: dict(v) if isinstance(v, Mapping) else v for k, v in saved.items()}
    schema = tree.pop("schema", 0)
    if not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
        raise ValueError(
            f"its schema is {schema!r}, and this version of localglobal_jax reads 0 to {SCHEMA}. "
            "Install the version that wrote it, or a newer one"
        )
    for renamed in (one for step in RENAMED[schema:] for one in step):
        section, _, name = renamed.before.partition(".")
        former = tree.get(section)
        if isinstance(former, dict) and name in former:
            value = former.pop(name)
            former[renamed.now.partition(".")[2]] = renamed.values.get(value, value)
            _say(renamed.before, renamed.now)
    task = tree.get("task")
    if not isinstance(task, Mapping) or task.get("name", "classification") == "classification":
        tree["data"] = {**FORMER, **tree.get("data", {})}
    return tree


@functools.cache  # a command reads the config of each checkpoint
def _say(before: str, now: str) -> None:
    log.info("config   %s of an earlier version is read as %s", before, now)
