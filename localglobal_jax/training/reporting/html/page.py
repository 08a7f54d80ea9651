# SPDX-License-Identifier: Apache-2.0
"""Renders the page of ``localglobal report`` as one HTML string.

The page loads nothing: style, curves and pictures are in the file, there is no script, and its
Content-Security-Policy forbids everything else. It links to its own sections, and to the README.md
beside the config of a run. The template escapes all text of users (paths, names of classes,
sentences, values of a config).
"""

import base64
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from localglobal_jax.config import values
from localglobal_jax.training.reporting import metrics_log
from localglobal_jax.training.reporting.html import curves, sweep
from localglobal_jax.training.reporting.html.facts import BESIDE, TOTAL, Run, shown, size

HERE = pathlib.Path(__file__).parent
MATRIX = 30  # classes; larger matrices are not drawn


def page(runs: Sequence[Run], made: str, whole: sweep.Sweep | None = None) -> str:
    """Returns the HTML of one run, or of several side by side.

    Args:
      made: the line of origin.
      whole: the sweep that the runs belong to, which gives the page its tables and groups.
    """
    style = _templates().get_template("page.css").render()
    policy = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    sizes = _table([run.parameters() for run in runs])
    configs = [values.flatten(run.config) for run in runs]
    fields = sorted({field for config in configs for field in config})
    rows = {field: [_json(config, field) for config in configs] for field in fields}
    groups = [[run] for run in runs] if whole is None else [group.runs for group in whole.groups]
    hues = {run.name: i for i, members in enumerate(groups) for run in members}
    return (
        _templates()
        .get_template("page.html")
        .render(
            runs=runs,
            made=made,
            policy=policy,
            sweep=whole,
            hues=hues,
            origins=_origins(runs),
            abouts=_abouts(runs),
            ordered=sorted(runs, key=lambda run: whole is not None and run is not whole.best),
            scatters=sweep.charts(whole, runs) if whole else [],
            charts=curves.charts(runs, [(g.name, g.runs) for g in whole.groups] if whole else None),
            box=curves.BOX,
            matrix=MATRIX,
            results=_table([run.last() for run in runs], leave_out=r".*/bleu_.*"),
            lengths=_table([_by_length(run) for run in runs]),
            speed=_table([run.speed() for run in runs]),
            # submodules first, also those of the other runs
            parameters={
                k: sizes[k] for k in sorted(sizes, key=lambda k: (k.startswith(BESIDE), k == TOTAL))
            },
            total=TOTAL,
            environments=_table([run.environment for run in runs]),
            differs={field: row for field, row in rows.items() if len(set(row)) > 1},
            same={field: row[0] for field, row in rows.items() if len(set(row)) == 1},
        )
    )


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "shown": shown}
    environment.filters |= {"text": sweep.text, "interval": sweep.interval}
    return environment


def _abouts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Returns notes and tags of the runs, and the names of the runs that have them."""
    found: dict[str, list[str]] = {}
    for run in runs:
        about = metrics_log.about_run(run.config)
        if about:
            tags = f" [{about['tags']}]" if "tags" in about else ""
            found.setdefault((about.get("note", "") + tags).strip(), []).append(run.name)
    return [(text, _together(names, runs)) for text, names in found.items()]


def _origins(runs: Sequence[Run]) -> list[tuple[str, str, tuple[str, str] | None, str]]:
    """Returns config, commit and page of the runs that have any, and the names of these runs."""
    found: dict[Any, list[str]] = {}
    for run in runs:
        config, commit = (str(run.environment.get(name, "")) for name in ("config", "commit"))
        if config or commit:
            found.setdefault((config, commit, run.page), []).append(run.name)
    return [(*origin, _together(names, runs)) for origin, names in found.items()]


def _together(names: Sequence[str], runs: Sequence[Run]) -> str:
    return "all runs" if 1 < len(names) == len(runs) else ", ".join(names)


def _json(config: Mapping[str, Any], field: str) -> str:
    return json.dumps(config[field], ensure_ascii=False) if field in config else "(not set)"


def _by_length(run: Run) -> dict[str, Any]:
    """Returns BLEU by source length, of the last evaluation."""
    found = {}
    for name, value in run.last().items():
        split, _, words = name.partition("/bleu_")
        if words:
            found[f"{split}, {words.replace('over_', 'over ')} words"] = value
    return found


def _table(columns: Sequence[Mapping[str, Any]], leave_out: str = "") -> dict[str, list[Any]]:
    """Turns columns of named values into rows by name, None where a column lacks the name."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {
        name: [column.get(name) for column in columns]
        for name in names
        if not re.fullmatch(leave_out, name)
    }
