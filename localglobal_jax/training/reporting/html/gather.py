# SPDX-License-Identifier: Apache-2.0
"""Gathers the facts of a run from its workdir, its checkpoint and its data, and writes the page.

Parts that are missing, damaged or not on this machine become notes on the page, so that unfinished
and crashed runs have a page too.
"""

import contextlib
import datetime
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from localglobal_jax import __version__
from localglobal_jax.checkpoints import gcs, reader, steps, workdir
from localglobal_jax.config import schema, values
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.text import tokenizers
from localglobal_jax.inference import load
from localglobal_jax.inference.translator import Translator
from localglobal_jax.models import registry
from localglobal_jax.training import divergence, early_stopping
from localglobal_jax.training.reporting import metrics_log, provenance
from localglobal_jax.training.reporting.html import sweep
from localglobal_jax.training.reporting.html.attempts import attempts, failure, is_pruned
from localglobal_jax.training.reporting.html.facts import Run
from localglobal_jax.training.reporting.html.page import page
from localglobal_jax.training.reporting.html.predictions import (
    add_classifications,
    add_translations,
)

log = logging.getLogger(__name__)


def write(paths: Sequence[str], out: pathlib.Path, step: int | str | None = None) -> list[Run]:
    """Writes the page of the workdirs `paths` to `out`; returns its facts.

    A single path may be the root of a sweep: the page then is that of its runs.

    Args:
      step: a number, "best", or None for the newest.

    Raises:
      ValueError: a path is not a workdir or is given twice, or `out` cannot be written; nothing has
        been computed.
    """
    if (out.exists() and not out.is_file()) or not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: give a file in a directory that can be written")
    inside = sweep.folders(paths[0]) if len(paths) == 1 else []
    failures = [failed for path in inside if (failed := sweep.without_config(path))]
    without = {failed.name for failed in failures}
    chosen = [path for path in inside if path.rpartition("/")[2] not in without]
    if inside and not chosen:
        reasons = "; ".join(f"{failed.name}: {failed.reason}" for failed in failures)
        raise ValueError(f"{paths[0]}: no run has written anything yet: {reasons}")
    chosen = chosen or list(paths)
    if len(set(map(_whole, chosen))) < len(chosen):
        raise ValueError(f"{' '.join(chosen)}: give every workdir once")
    known = [(path, gcs.LocalMirror(path)) for path in chosen]
    configs = [load.read_run(mirror.local) for _, mirror in known]
    runs = [
        gather(name, path, mirror, config, step)
        for name, (path, mirror), config in zip(names(chosen), known, configs, strict=True)
    ]
    for run in runs:
        run.page = provenance.page_of(str(run.environment.get("config", "")), out.parent)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = f"Made by localglobal_jax {__version__}, {now}"
    whole = sweep.gather(paths[0], runs, failures) if inside else None
    workdir.write_atomically(out, page(runs, made, whole))
    return runs


def _whole(path: str) -> str:
    return path.rstrip("/") if "://" in path else str(pathlib.Path(path).resolve())


def names(paths: Sequence[str]) -> list[str]:
    """Returns the shortest distinct endings of the paths, as text that can be encoded."""
    split = [_whole(path).split("/") for path in paths]
    for last in range(1, max(map(len, split)) + 1):
        found = ["/".join(parts[-last:]) for parts in split]
        if len(set(found)) == len(found):
            break
    return [name.encode("utf-8", "replace").decode() for name in found]


def gather(
    name: str, path: str, mirror: gcs.LocalMirror, config: schema.Run, step: int | str | None = None
) -> Run:
    """Returns the facts of the run in `path`. Raises ValueError if `step` does not exist."""
    run = Run(
        name=name,
        workdir=path.encode("utf-8", "replace").decode(),
        state="",
        config=config.model_dump(mode="json"),
        metrics=[_finite(line) for line in metrics_log.read_metrics(mirror.local)],
    )
    if damaged := metrics_log.damaged_lines(mirror.local):
        several = ", ".join(map(str, damaged[:10])) + ", ..." * (len(damaged) > 10)
        run.notes.append(f"metrics.jsonl: left out what is damaged or half-written: line {several}")
    found = None
    with _noted(run, "The checkpoint", (RuntimeError, OSError) if step else (Exception,)):
        found = load.read_variables(path, step)
    saved = [found[0] if found else 0, *(steps.scan(mirror.checkpoints) if step else ())]
    newest = found is not None and found[0] == max(saved)
    stopped = newest and found is not None and early_stopping.has_stopped(config, found[2])
    run.state = _state(mirror.local, config, run.metrics, max(saved), stopped)
    run.attempts = attempts(mirror.local, config.steps)
    run.reason = "" if run.finished else failure(mirror.local)
    if found is None:
        return run
    run.step, variables, metadata = found
    with _noted(run, "The list of parameters"):
        run.leaves = reader.document_of(mirror.checkpoints, run.step)["leaves"]
    run.environment = {**metadata.get("versions", {}), **metadata.get("environment", {})}
    log.info("%s: the checkpoint of step %d", name, run.step)
    if not config.data.eval_splits:
        run.notes.append("Examples: data.eval_splits names no split to take them from")
        return run
    with _noted(run, f"Examples of {config.data.name}/{config.data.eval_splits[0]}"):
        workdir.check_config(mirror.local, run.step, metadata)
        module = registry.create_model(**values.tuples(metadata["model"]))
        variables = jax.device_put(variables)
        if isinstance(config, schema.TranslationRun):
            vocabularies = tokenizers.load(mirror.local / tokenizers.DIRECTORY)
            if vocabularies is None:
                raise ValueError("the workdir has no tokenizer/tokenizer.json")
            add_translations(run, config, Translator(module, variables, vocabularies))
        elif isinstance(config, schema.ClassificationRun):
            workdir.check_labels(pipeline.class_names(config.data), metadata)
            add_classifications(run, config, module, variables)
    return run


@contextlib.contextmanager
def _noted(
    run: Run, what: str, kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Context manager that turns an error into a note of the page."""
    try:
        yield
    except kinds as error:
        run.notes.append(f"{what}: {str(error).strip() or type(error).__name__}")
        log.warning("%s: %s", run.name, run.notes[-1])


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """Turns NaN and infinity, which Python's JSON reader accepts, into text."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }


def _state(
    directory: pathlib.Path,
    config: schema.Run,
    lines: list[dict[str, Any]],
    saved: int,
    stopped: bool,
) -> str:
    step = max([saved, *(line["step"] for line in lines)])
    try:
        diverged = json.loads((directory / divergence.FILE).read_text(encoding="utf-8"))["step"]
        return f"diverged at step {diverged} of {config.steps}"
    except (OSError, ValueError, KeyError, TypeError):
        if stopped:
            return f"done: stopped early at step {saved:,} of {config.steps:,}"
        if saved >= config.steps:
            return "done"
        if is_pruned(directory):
            return f"pruned at step {step:,} of {config.steps:,}"
        unsaved = f", saved at step {saved:,}" if step > saved > 0 else ""
        return f"step {step:,} of {config.steps:,}{unsaved}"
