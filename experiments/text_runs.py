# SPDX-License-Identifier: Apache-2.0
"""Shared by the studies of translation: the finished runs of a sweep, their test set, their names.

A measurement continues where it was stopped: it appends the rows of a run when they are complete.
"""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import localglobal_jax as lg
from localglobal_jax.data.text import pairs, pipeline
from localglobal_jax.data.text.bucketing import Budget
from localglobal_jax.inference import load
from localglobal_jax.inference.translator import Translator
from localglobal_jax.inference.translator import load as load_translator
from localglobal_jax.launch import status
from localglobal_jax.training import losses

NAMES = {"SS": "Transformer", "DD": "DynamicConv", "TT": "relative", "AA": "A", "EE": "E"}
MODELS = ("Transformer", "MUSE-simple", "MUSE", "DynamicConv")


def model_name(layout: str, windows: Any = (3, 15)) -> str:
    """Returns the name of a run of a layout; `windows` are MUSE's, also as a CSV has them."""
    simple = windows in ((), "()", [])
    return NAMES.get(layout) or ("MUSE-simple" if simple else "MUSE")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run."""

    name: str
    model: str
    workdir: pathlib.Path
    run: Any

    @property
    def seed(self) -> int:
        return self.run.seed

    @functools.cached_property
    def translator(self) -> Translator:
        return load_translator(self.workdir)

    def source(self, split: str = "test", edges: tuple[int, ...] = (16, 24, 32, 48, 64, 96)) -> Any:
        """Returns the pairs of a split as this run's tokens."""
        return pipeline.open_eval(self.run.data, split, self.translator.tokenizers, edges)


def finished(root: str | pathlib.Path) -> Iterator[Trained]:
    """Returns the finished runs below `root`, in the order of their names."""
    for file in sorted(pathlib.Path(root).glob("*/config.json")):
        run = load.read_run(file.parent)
        if status.latest_step(file.parent) == run.steps:
            windows = run.model.get("blocks", {}).get("M", {}).get("windows", (3, 15))
            name = model_name(run.model["layout"], windows)
            yield Trained(file.parent.name, name, file.parent, run)


def measured(
    runs: Iterable[Trained],
    file: pathlib.Path,
    columns: Sequence[str],
    measure: Callable[[Trained], Iterable[Mapping[str, Any]]],
) -> None:
    """Appends the result of `measure` for every missing run to `file`, column "name" first."""
    columns = ("name", *columns)
    done: set[str] = set()
    if file.exists():
        with open(file, newline="") as opened:
            done = {row["name"] for row in csv.DictReader(opened)}
    else:
        with open(file, "w", newline="") as out:
            csv.writer(out, lineterminator="\n").writerow(columns)
    for trained in runs:
        if trained.name in done:
            continue
        rows = [{"name": trained.name, **row} for row in measure(trained)]
        with open(file, "a", newline="") as out:
            csv.DictWriter(out, columns, lineterminator="\n").writerows(rows)
        print(f"{trained.name}: {trained.model}, {len(rows)} rows", flush=True)


@functools.partial(jax.jit, static_argnums=0)
def _token_losses(module: Any, variables: Any, batch: Mapping[str, Any]) -> jax.Array:
    with lg.implementation("fused"):  # as in training
        logits, _ = module.apply(variables, batch["source"], batch["target_input"], train=False)
    return losses.cross_entropy(logits, batch["target"])


def token_losses(
    trained: Trained, source: Any, tokens: int = 8192
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields batches of a `TextSource`, each with the loss [b, l] of every target token (nats)."""
    module, variables = trained.translator.module, trained.translator.variables
    for batch in pipeline.eval_batches(source, budget=Budget(tokens, 8)):
        given = {k: jnp.asarray(v) for k, v in batch.items()}
        yield batch, np.asarray(_token_losses(module, variables, given))


def sentence_losses(
    trained: Trained,
    groups: Sequence[Sequence[tuple[str, str]]],
    edges: tuple[int, ...] = (16, 24, 48, 96),
) -> list[np.ndarray]:
    """Returns the losses by sentence where the pairs of a group are one input (teacher forcing).

    Returns:
      For each group [sentences, (sum, first token, tokens)]. The end of the sequence, which only
      the last sentence of a group has, is left out.
    """
    target = trained.translator.tokenizers.target
    texts = [[" ".join(side) for side in zip(*group, strict=True)] for group in groups]
    sizes = [[len(ids) for ids in target.encode([t for _, t in group])] for group in groups]
    sources, targets = zip(*texts, strict=True)
    joined = pairs.Pairs(list(sources), list(targets), {})
    data = pipeline.TextSource(trained.translator.tokenizers, joined, edges=edges)
    found = [np.zeros((len(group), 3)) for group in groups]
    for batch, loss in token_losses(trained, data):
        for row, number in enumerate(batch["index"]):
            if batch["mask"][row].any():
                own = sizes[number]
                if sum(own) + 1 != batch["mask"][row].sum():
                    raise RuntimeError("sentences put together have other tokens than alone")
                for i, part in enumerate(np.split(loss[row, : sum(own)], np.cumsum(own)[:-1])):
                    found[number][i] = part.sum(), part[0], len(part)
    return found
