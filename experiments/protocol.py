# SPDX-License-Identifier: Apache-2.0
"""The protocol of a comparison (PROTOCOL.md): grid, choice on validation, final runs.

Pure functions of overrides and of rows of CSV files. A study's ``sweep.py`` yields `grid`, `warmup`
and `final`; its ``make.py`` prints `table`. The three sweeps are collected into grid.csv,
warmup.csv and final.csv beside the study.
"""

import ast
import csv
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, str]
Overrides = dict[str, Any]

PAGE = ("laptop", "real")  # size and data of the runs of a page
STAGES = ("grid", "warmup", "final")  # in their order
CHOICE = 10  # the seed of the grid; no reported run has it
SEEDS = (0, 1, 2)  # of the reported runs
FACTORS = (1.0, 2.0, 0.5)  # of the study's learning rate
WARMUPS = (0.5, 2.0)  # of the study's warm-up, tried at the best norm and rate
NORM, RATE, WARMUP = "model.pre_norm", "optim.learning_rate", "optim.warmup_steps"
ENDED = ("done", "failed")  # states; a run that diverges fails
NORMS = ((True, True), (False, False))  # of encoder and decoder; images: the blocks' own norms


class Kind(NamedTuple):
    """A kind of study: the norms and the metric of its choice.

    Attributes:
      norms: placements of the norm in the grid; () if the models have no choice of them.
      choice: overrides of the runs of the choice, which keep the test set out of it.
      metric: column of the collected sweep that chooses.
    """

    norms: Sequence[Any]
    choice: Overrides
    metric: str
    smaller_is_better: bool


# A BLEU of ten varies more between seeds than the loss
TEXT = Kind(NORMS, {"data.eval_splits": ("validation",), "task.beam": 0}, "validation/nll", True)
HELD_OUT = "train[90%:]"  # image sets of TFDS have no validation split: a tenth of the training set
IMAGES = Kind(
    (),
    {"data.train_split": "train[:90%]", "data.eval_splits": (HELD_OUT,)},
    f"{HELD_OUT}/accuracy",
    False,
)


class Cell(NamedTuple):
    """A setting of the grid. `norm` is "pre", "post" or, if the study has no choice, ""."""

    norm: str
    rate: float
    warmup: int


# ------------------------------------------------------------------------------- runs of a sweep


def grid(
    models: Sequence[Overrides],
    common: Overrides,
    *,
    rate: float,
    warmup: int,
    norms: Sequence[Any] = NORMS,
    factors: Sequence[float] = FACTORS,
) -> Iterator[Overrides]:
    """Yields every model with every norm placement and rate, so that a part treats models alike.

    Args:
      models: overrides of each model, of equal parameters.
      common: overrides of all runs of the grid, such as the split for the choice.
      rate, warmup: learning rate and warm-up steps of the study.
      norms: () if the study's models have no choice of norm placement.
    """
    placed = [{NORM: norm} for norm in norms] or [{}]
    for factor, norm, model in itertools.product(factors, placed, models):
        yield {
            "seed": CHOICE,
            **common,
            **model,
            **norm,
            RATE: round(factor * rate, 10),
            WARMUP: warmup,
        }


def warmup(
    models: Mapping[str, Overrides],
    common: Overrides,
    best: Mapping[str, Cell],
    steps: Iterable[int],
) -> Iterator[Overrides]:
    """Yields every model at its best norm and rate of the grid with each of the warm-ups."""
    for number, (name, model) in itertools.product(steps, models.items()):
        yield {"seed": CHOICE, **common, **model, **_of(best[name]._replace(warmup=number))}


def final(models: Mapping[str, Overrides], best: Mapping[str, Cell]) -> Iterator[Overrides]:
    """Yields every model at its chosen setting with every reported seed."""
    for seed, (name, model) in itertools.product(SEEDS, models.items()):
        yield {"seed": seed, **model, **_of(best[name])}


def sweeps(
    kind: Kind,
    folder: pathlib.Path,
    config_of: Callable[[str | None], Any],
    models_of: Callable[[str | None], Mapping[str, Overrides]],
) -> tuple[Callable[..., Iterator[Overrides]], ...]:
    """Returns ``sweep_grid``, ``sweep_warmup`` and ``sweep_final`` of a study.

    Args:
      kind: `TEXT` or `IMAGES`.
      folder: of the study, which holds the CSV files of the runs so far.
      config_of: ``get_config`` of the study.
      models_of: the overrides of each model by its name; the argument is that of ``get_config``.
    """

    def best(arg: str | None, *stages: str) -> Mapping[str, Cell]:
        rows = [row for stage in stages for row in read(stage_file(folder, stage, arg))]
        return chosen(rows, models_of(arg), kind.metric, smaller_is_better=kind.smaller_is_better)

    def rates(arg: str | None) -> tuple[list[float], list[float]]:
        """Returns the rates of grid.csv, and those that rule 3 adds to a complete one."""
        rows = read(stage_file(folder, "grid", arg))
        known = [cell(row).rate for row in rows]
        if not is_tried(rows):
            return known, []
        return known, extension([each.rate for each in best(arg, "grid").values()], known)

    def warmups(arg: str | None) -> tuple[list[int], list[int]]:
        """Returns the warm-ups of warmup.csv, and those that it lacks, of rule 3 too."""
        rows, longest = read(stage_file(folder, "warmup", arg)), config_of(arg).steps // 2
        known = [cell(row).warmup for row in rows]
        study = {each.warmup for each in best(arg, "grid").values()}
        wanted = [max(1, round(factor * steps)) for factor in WARMUPS for steps in study]
        if is_tried(rows):
            taken = [each.warmup for each in best(arg, "grid", "warmup").values()]
            wanted += [round(steps) for steps in extension(taken, [*known, *study])]
        lacking = [steps for steps in wanted if steps not in known and 1 <= steps <= longest]
        return list(dict.fromkeys(known)), lacking

    def refuse(stage: str, missing: Sequence[float]) -> None:
        if missing:
            raise ValueError(
                f"{folder.name}: {stage}.csv lacks the runs of {sorted(missing)} (PROTOCOL.md, "
                f"rules 2 and 3): start --sweep {stage} again, and collect it"
            )

    def sweep_grid(arg: str | None = None) -> Iterator[Overrides]:
        optim, models = config_of(arg).optim, list(models_of(arg).values())
        rate, steps = optim.learning_rate, optim.warmup_steps
        run = functools.partial(grid, models, kind.choice, warmup=steps, norms=kind.norms)
        yield from run(rate=rate)
        first = {round(factor * rate, 10) for factor in FACTORS}
        for added in dict.fromkeys(itertools.chain(*rates(arg))):
            if added not in first:
                yield from run(rate=added, factors=(1.0,))

    def sweep_warmup(arg: str | None = None) -> Iterator[Overrides]:
        refuse("grid", rates(arg)[1])
        steps = itertools.chain(*warmups(arg))
        yield from warmup(models_of(arg), kind.choice, best(arg, "grid"), steps)

    def sweep_final(arg: str | None = None) -> Iterator[Overrides]:
        refuse("warmup", warmups(arg)[1])
        yield from final(models_of(arg), best(arg, "grid", "warmup"))

    return sweep_grid, sweep_warmup, sweep_final


def _of(cell: Cell) -> Overrides:
    norm = {"pre": (True, True), "post": (False, False)}.get(cell.norm)
    return {**({} if norm is None else {NORM: norm}), RATE: cell.rate, WARMUP: cell.warmup}


# ---------------------------------------------------------------------------------- rows of a CSV


def cell(row: Row) -> Cell:
    """Returns the setting of a row of a collected sweep."""
    norm = row.get(NORM, "")
    placed = "" if not norm else "pre" if ast.literal_eval(norm)[0] else "post"
    return Cell(placed, float(row[RATE]), int(row[WARMUP]))


def read(file: pathlib.Path) -> list[Row]:
    """Returns all rows of a CSV file, unfinished runs too; none if there is no such file."""
    if not file.exists():
        return []
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def stage_file(folder: pathlib.Path, stage: str, arg: str | None = None) -> pathlib.Path:
    """Returns the CSV file of a stage: grid.csv, and grid_paper.csv for ``:size=paper``.

    Runs of another size, or of mock data, choose for themselves.
    """
    given = dict(part.partition("=")[::2] for part in (arg or "").split(","))
    words = [given.get(name, "") for name in ("size", "data")]
    return folder / f"{'_'.join([stage, *(w for w in words if w not in ('', *PAGE))])}.csv"


def is_complete(rows: Sequence[Row]) -> bool:
    """Whether there are rows and all runs of them are done (`sweep --collect` writes all runs)."""
    return bool(rows) and all(row["state"] == "done" for row in rows)


def is_tried(rows: Sequence[Row]) -> bool:
    """Whether there are rows and all runs of them have ended."""
    return bool(rows) and all(row["state"] in ENDED for row in rows)


def reported(folder: pathlib.Path) -> list[Row]:
    """Returns the rows of a study's reported runs: the tuned ones, if all of them are done."""
    final = read(folder / "final.csv")
    rows = final if is_complete(final) else read(folder / "results.csv")
    return [row for row in rows if row["state"] == "done"]


def model_of(row: Row, models: Mapping[str, Overrides]) -> str:
    """Returns the name of the model whose overrides the row has. Raises ValueError without one."""
    for name, overrides in models.items():
        if all(row.get(field) == str(value) for field, value in overrides.items()):
            return name
    raise ValueError(f"run {row['name']} is of none of the models {', '.join(models)}")


def scores(
    rows: Iterable[Row], models: Mapping[str, Overrides], metric: str
) -> dict[str, dict[Cell, float]]:
    """Returns the metric of the runs that ended, nan if they failed: {model: {cell: number}}."""
    found: dict[str, dict[Cell, float]] = {name: {} for name in models}
    for row in rows:
        if row["state"] in ENDED:
            done = row["state"] == "done"
            found[model_of(row, models)][cell(row)] = float(row[metric]) if done else math.nan
    return found


def chosen(
    rows: Sequence[Row], models: Mapping[str, Overrides], metric: str, *, smaller_is_better: bool
) -> dict[str, Cell]:
    """Returns the best cell of each model; of equal ones, the first. Failed runs are the worst.

    Raises ValueError for an unfinished grid, if models do not have the same number of cells, or if
    all runs of one failed.
    """
    if not is_tried(rows):
        done = sum(row["state"] in ENDED for row in rows)
        raise ValueError(
            f"{done} of {len(rows)} runs of the grid have ended: the choice needs all of them. "
            "Start the sweep again (it goes on), and collect it into the CSV file"
        )
    found = scores(rows, models, metric)
    sizes = {model: len(cells) for model, cells in found.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the tuning budgets differ: {sizes} runs. Give all models the same grid")
    if failed := [model for model, own in found.items() if all(map(math.isnan, own.values()))]:
        raise ValueError(f"no run of {', '.join(failed)} is done: nothing can be chosen")
    sign = 1 if smaller_is_better else -1

    def cost(score: float) -> float:
        return math.inf if math.isnan(score) else sign * score

    return {
        model: min(own, key=lambda each, own=own: cost(own[each])) for model, own in found.items()
    }


def extension(taken: Iterable[float], tried: Iterable[float]) -> list[float]:
    """Returns the values that a grid lacks: a factor 2 beyond each end that a model chose.

    All models get them, so that the tuning budgets stay equal.

    Args:
      taken: the value that each model chose.
      tried: all values of the grid.
    """
    low, high = min(tried := list(tried)), max(tried)
    taken = set(taken)
    below = [round(low / 2, 10)] if low in taken else []
    return below + ([round(high * 2, 10)] if high in taken else [])


# ---------------------------------------------------------------------------- state on the pages

TUNED, ONE_SETTING, NOT_RUN = "tuned", "one setting", "not run"
UNTRAINED = "nothing is trained"
# Studies that read the runs of another one, and the one that trains nothing
RUNS_OF = {"attention_dispersion": "muse_results", "bleu_by_length": "muse_results"}
WITHOUT_TRAINING = ("operator_properties",)


def state(folder: pathlib.Path) -> str:
    """Returns the state of a study: "tuned" if its final runs are done, "not run" without results.

    A study of `RUNS_OF` is tuned if each run that it measured is a final one of the other study.
    """
    if folder.name in WITHOUT_TRAINING:
        return UNTRAINED
    if other := RUNS_OF.get(folder.name):
        final = {row["name"] for row in reported(folder.parent / other)}
        own = {row["name"] for row in read(folder / "results.csv")}
        tuned = own and own <= final and state(folder.parent / other) == TUNED
        return TUNED if tuned else ONE_SETTING
    if is_complete(read(folder / "final.csv")):
        return TUNED
    return ONE_SETTING if read(folder / "results.csv") else NOT_RUN


def state_lines(folder: pathlib.Path) -> list[str]:
    """Returns the sentences about the protocol on the page of a study."""
    found = state(folder)
    if found == UNTRAINED:
        return ["Nothing is trained here, so no [protocol](../PROTOCOL.md) of tuning applies."]
    name = RUNS_OF.get(folder.name)
    source = [f"The models are those of [{name}](../{name}/README.md)."] if name else []
    if found == TUNED:
        tuned = "**Tuned**: the comparison was run under the [protocol](../PROTOCOL.md)."
        return [tuned, *source]
    if found == NOT_RUN:
        lines = [
            "**Not run**: designed under the [protocol](../PROTOCOL.md); no model is reported yet."
        ]
    else:
        lines = ["**One setting**, not run under the [protocol](../PROTOCOL.md) yet.", *source]
        only = "The verdicts hold for this setting only: tuned models may be in another order."
        lines.append(only)
    stages = {"grid": ("grid", "warmup"), "reported models": ("final",)}
    for name, files in stages.items():
        if rows := [row for file in files for row in read(folder / f"{file}.csv")]:
            done = sum(row["state"] == "done" for row in rows)
            counted = f"{done} of the {len(rows)} runs of the {name} are done"
            lines.append(f"{counted}; no verdict is drawn from them.")
    return lines
