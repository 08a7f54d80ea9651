# SPDX-License-Identifier: Apache-2.0
"""The model card of a finished run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def model_card(
    *,
    name: str,
    summary: str,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    parameters: int,
    steps: int,
    metrics: Mapping[str, Mapping[str, float]],
    use: str,
    versions: Mapping[str, str],
    environment: Mapping[str, Any],
    command: str | None = None,
    curve: str | None = None,
) -> str:
    """Returns the model card in Markdown: the parts of arXiv 1810.03993 that a run can fill in.

    Args:
      metrics: final numbers by split, ``{"test": {"accuracy": 0.98, "count": 360}}``.
      use: Python that loads the model from "path/to/this/directory" and uses it.
      curve: the learning curve's path, relative to the card.
    """
    names = list(dict.fromkeys(key for numbers in metrics.values() for key in numbers))
    rows = [
        [split, *(_show(numbers[key]) if key in numbers else "" for key in names)]
        for split, numbers in metrics.items()
    ]
    parts = [
        f"# {name}",
        summary,
        f"{parameters:,} parameters, trained for {steps:,} steps.",
        "## Results",
        _table(["split", *names], rows) if rows else "No evaluation was run.",
        f"![learning curve]({curve})" if curve else "",
        "## Data",
        _table(["", ""], [[key, _show(value)] for key, value in data.items()]),
        "## How to use it",
        f"```python\nimport localglobal_jax as lg\n\n{use}\n```",
        f"## How it was trained\n\n```sh\n{command}\n```" if command else "",
        "## Config",
        f"```json\n{json.dumps(config, indent=2, default=str)}\n```",
        "## Versions and environment",
        _table(["", ""], [[key, _show(v)] for key, v in {**versions, **environment}.items()]),
        "## Limits",
        "Measured on the splits above and nowhere else. Intended for research; nothing is known "
        "about its behaviour on other data, nor about bias in the data it was trained on.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
