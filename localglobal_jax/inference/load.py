# SPDX-License-Identifier: Apache-2.0
"""Loads trained models: from workdirs, checkpoints, and as a start for fine-tuning."""

import functools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax import convert
from localglobal_jax.checkpoints import gcs, manager, reader
from localglobal_jax.checkpoints.workdir import in_one_form, shown, without_config
from localglobal_jax.config import loading, preprocessing, schema, values
from localglobal_jax.inference import hub
from localglobal_jax.models.registry import Variables, create_model

log = logging.getLogger(__name__)
ATTEMPTS = 5  # of a read while the run that writes there deletes old steps


def find_step(path: str | os.PathLike[str], step: int | str | None) -> int | None:
    """Returns the step named by a number or "best" (of a workdir); None for None: the newest."""
    if step is None or str(step).isdecimal():
        return None if step is None else int(step)
    if step != "best":
        raise ValueError(f'step="{step}": give a number, or "best"')
    copy = gcs.LocalMirror(path)
    best = manager.Checkpoints(copy.checkpoints, read_run(copy.local).checkpoint).best()
    if best is None:
        raise ValueError(f"no step of {path} has the metric that its checkpoint.best names")
    return best


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the metadata of the newest step of any `path` that `load` reads, without arrays."""
    folder = hub.local(path)
    return dict(hub.describe(folder) or reader.read_metadata(folder))


def has_run(workdir: pathlib.Path) -> bool:
    """Returns whether `workdir`, or an exported folder, has the config of a run.

    A converted checkpoint has none, also beside the ``config.json`` of the hub's weights.
    """
    if described := hub.describe(workdir):
        return "config" in described
    file = workdir / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return file.is_file()  # damaged: `read_run` names it
    return isinstance(found, dict) and "model" in found


def read_run(workdir: pathlib.Path) -> schema.Run:
    """Reads the config that `workdir`, or an exported folder, was trained with."""
    file = workdir / "config.json"
    if described := hub.describe(workdir):
        if "config" not in described:
            raise ValueError(f"{shown(file)} has no config of a run: the weights were converted")
        return loading.from_saved(described["config"])
    if not file.is_file():
        raise without_config(workdir)
    return loading.read_json(file, name=shown(file))


def load(
    path: str | os.PathLike[str],
    step: int | str | None = None,
    average: int = 1,
    *,
    only: str | None = None,
    dtype: Any = None,
    sharding: jax.sharding.Sharding
    | Callable[[str, jax.Array], jax.sharding.Sharding]
    | None = None,
) -> tuple[nn.Module, Variables]:
    """Loads a trained model: ``(module, variables)``, ready for ``module.apply``.

    Args:
      path: a workdir, its checkpoints folder, or one step's folder; a folder that `localglobal
        export --format safetensors` wrote, or ``hf://owner/name[@revision]`` of the hub.
      step: a number, "best" (of a workdir), or None: the newest.
      average: number of checkpoints to average, this one and those before it.
      only: a module, such as "encoder" or "stage1/block1": only its variables are read; they are at
        their places in the tree.
      dtype: of the floating-point variables, such as ``jnp.bfloat16``; None: as saved.
      sharding: of every variable, or a function of its path ("params/head/kernel") and the NumPy
        array; None: on the default device.

    Returns the moving average of the variables if the run kept one. Needs neither the data set
    nor the config.

    >>> module, variables = lg.load("runs/digits")
    >>> type(module).__name__, sorted(variables)
    ('CoAtNet', ['batch_stats', 'params'])
    >>> _, variables = lg.load("runs/digits", only="stem", dtype=jnp.bfloat16)
    >>> list(variables["params"])
    ['stem']
    """
    _, variables, metadata = read_variables(path, step, average, only)
    spec: dict[str, Any] = values.tuples(metadata["model"])
    if dtype is not None:
        variables = jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, variables
        )
    if callable(sharding):
        at = sharding
        sharding = jax.tree_util.tree_map_with_path(
            lambda p, x: at(jax.tree_util.keystr(p, simple=True, separator="/"), x), variables
        )
    return create_model(**spec), jax.device_put(variables, sharding)


def read_variables(
    path: str | os.PathLike[str],
    step: int | str | None = None,
    average: int = 1,
    only: str | None = None,
) -> tuple[int, Variables, dict[str, Any]]:
    """Reads ``(step, variables, metadata)``, with NumPy arrays; the arguments are those of `load`.

    Checkpoint averaging as in arXiv 1706.03762, section 6.1; logs the steps that are averaged.
    Raises ValueError if fewer than `average` checkpoints are kept, or if steps between them were
    deleted (see `check_neighbours`).
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return _read_variables(path, step, average, only)
        except reader.Deleted as error:
            if str(step).isdecimal():
                raise
            log.info("%s; reading again", error)
    return _read_variables(path, step, average, only)


def _read_variables(
    path: str | os.PathLike[str], step: int | str | None, average: int, only: str | None
) -> tuple[int, Variables, dict[str, Any]]:
    """Reads the variables once; raises Deleted if the run that writes there deleted a step."""
    select = functools.partial(_inside, only) if only else None
    path = hub.local(path)
    if described := hub.describe(path):
        if average != 1:
            raise ValueError(f"average={average}: {path} has one step: give average=1")
        found, state, metadata = hub.read(path, described, step, select)
        return found, state["variables"], metadata

    def read(number: int) -> tuple[int, dict, dict]:
        try:
            return reader.read(path, number, select)
        except ValueError as error:
            if number in reader.steps(path):
                raise
            raise reader.Deleted(str(error)) from error

    last, state, metadata = reader.read(path, find_step(path, step), select)
    steps = reader.steps(path)
    kept = [n for n in steps if n <= last][-average:]
    if average < 1 or len(kept) < average:
        named = reader.locate(path)[1] is not None
        if step is None and not named and max(steps, default=last) > last:
            raise reader.Deleted(f"{path}: steps before {last} were deleted while it was read")
        raise ValueError(
            f"average={average}: {path} has {len(kept)} checkpoints up to step {last}. "
            f"Give a number from 1 to {len(kept)}, or keep more (checkpoint.keep)"
        )
    variables = state.get("average") or state["variables"]
    if average > 1:
        before = [read(earlier) for earlier in kept[:-1]]
        check_neighbours(kept, [*(saved for *_, saved in before), metadata], f"average={average}")
        log.info("average  of the steps %s", ", ".join(map(str, kept)))
        total = jax.tree.map(np.float64, variables)
        for _, state, _ in before:
            total = jax.tree.map(np.add, total, state.get("average") or state["variables"])
        variables = jax.tree.map(lambda t, v: (t / average).astype(v.dtype), total, variables)
    return last, variables, metadata


def _inside(module: str, leaves: Collection[str]) -> list[str]:
    """Returns the paths in `leaves` of the variables of `module`, of their average if there is one.

    Raises ValueError, with the modules beside it, if there are none.
    """
    root = "average" if any(path.startswith("average/") for path in leaves) else "variables"
    inside = [path.split("/", 2) for path in leaves if path.startswith(f"{root}/")]
    name = module.strip("/")
    found = ["/".join(words) for words in inside if f"{words[2]}/".startswith(f"{name}/")]
    if not found:
        around = name.rpartition("/")[0]
        start = f"{around}/" if any(w[2].startswith(f"{around}/") for w in inside) else ""
        beside = {
            start + w[2][len(start) :].split("/")[0] for w in inside if w[2].startswith(start)
        }
        raise ValueError(f"only={module!r}: the model has {', '.join(sorted(beside))}")
    return found


def check_neighbours(
    steps: Sequence[int], metadata: Sequence[Mapping[str, Any]], option: str
) -> None:
    """Raises ValueError unless `steps` were saved one after the other, at the end of a training.

    Retention keeps the best step, and multiples of ``checkpoint.keep_every``, long after those
    between it and the newest are deleted. An average over such a gap is worse than any of its
    parts. Steps that are all multiples of ``checkpoint.keep_every``, one after the other, are
    averaged. `metadata` holds the metadata of each step; `option` begins the error.
    """
    saving = [(saved.get("config") or {}).get("checkpoint") or {} for saved in metadata]
    every = [options.get("every", 0) for options in saving]
    kept_every = saving[-1].get("keep_every", 0)
    if kept_every and all(b - a == kept_every for a, b in pairwise(steps)):
        return
    for i, (a, b) in reversed([*enumerate(pairwise(steps))]):
        if (most := max(every[i : i + 2])) and b - a > most:
            raise ValueError(
                f"{option} would take the steps {', '.join(map(str, steps))}, but those between "
                f"{a} and {b} were deleted (checkpoint.every={most}). Give at most "
                f"{len(steps) - 1 - i} (--average), or keep more checkpoints (checkpoint.keep)"
            )


def pretrained(
    path: str,
    module: nn.Module,
    inputs: tuple[jax.ShapeDtypeStruct, ...],
    labels: Sequence[str] = (),
    data: schema.Images | schema.Text | None = None,
) -> Variables:
    """Reads the variables of the checkpoint `path` and fits them to `module` on `inputs`.

    Position tables are resized. A classifier is kept where its classes are those of the data, by
    their names (`labels`); its rows are put into the data's order, or chosen, if all of them are
    known. Otherwise it is replaced by zeros. What was done is logged, and so is a preprocessing of
    `data` other than that of the checkpoint. Raises ValueError if anything else differs.
    """
    try:
        _, found, metadata = read_variables(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"init={path}: {error}") from error
    old, variables = create_model(**values.tuples(metadata["model"])), jax.device_put(found)
    if type(old) is not type(module):
        raise ValueError(
            f"init={path} is a {type(old).__name__}, but this run trains a {type(module).__name__}"
        )
    done = ""
    if (classes := getattr(module, "classes", None)) is not None:
        names = map(in_one_form, (labels, metadata.get("labels") or ()))
        if old.classes:
            old, variables, done = fit_classifier(old, variables, classes, *names)
        else:
            old, variables = convert.adapt.add_classifier(old, variables, classes, *inputs)
            done = f"; it has no classifier: a new one for {classes} classes"
    if "nearest" in variables:  # of a converted Focal Transformer; a state in training has none
        variables = {name: part for name, part in variables.items() if name != "nearest"}
        done += "; its choice among equally near keys is ours"
    if inputs[0].ndim == 4:
        variables, change = convert.adapt.recolour(variables, inputs[0].shape[3])
        done += change and f"; {change}"
    if isinstance(data, schema.Images):
        note_preprocessing(
            data, preprocessing.of_checkpoint(metadata), f"init={path} was trained with"
        )
    try:
        fitted = convert.adapt.fit(module, variables, *inputs)
    except ValueError as error:
        raise ValueError(f"init={path}: {error}") from error
    log.info("weights  of %s%s", path, done)
    return fitted


def fit_classifier(
    module: nn.Module,
    variables: Variables,
    classes: int,
    labels: Sequence[str],
    known: Sequence[str],
) -> tuple[nn.Module, Variables, str]:
    """Returns a module and its variables for so many classes, and a note of what was done.

    `labels` are the names of the data, `known` those of the checkpoint; () where there are none.
    """
    if labels and known and set(labels) <= set(known) and len(labels) == classes:
        if tuple(labels) == tuple(known):
            return module, variables, "; its classifier is kept: the classes have the same names"
        rows = [list(known).index(label) for label in labels]
        module, variables = convert.adapt.choose_classes(module, variables, rows)
        what = f"of {len(known)} classes" if len(rows) < len(known) else "in another order"
        return module, variables, f"; its classifier is kept by the names of the classes, {what}"
    if module.classes == classes and not (labels and known):
        side = "the checkpoint" if labels or not known else "the data"
        note = f"; its classifier of {classes} classes is kept: {side} has no names to compare"
        return module, variables, note
    new = sorted(set(labels) - set(known)) if known else []
    reason = f" (not among its classes: {named(new)})" if new else ""
    module, variables = convert.adapt.reclassify(module, variables, classes)
    return module, variables, f"; its classifier is replaced by one for {classes} classes{reason}"


def named(labels: Sequence[str], at_most: int = 10) -> str:
    """Returns names of classes for a message, the first of many."""
    more = f" and {len(labels) - at_most} more" * (len(labels) > at_most)
    return ", ".join(labels[:at_most]) + more


def note_preprocessing(
    data: schema.Images,
    found: Mapping[str, Any],
    source: str,
    fields: Sequence[str] = ("mean", "std", "eval_crop", "interpolation"),
) -> None:
    """Warns where images are prepared in another way than `found`, that of a checkpoint.

    `source` begins the warning. Without a mean in `found`, warns that it is not known.
    """
    if "mean" not in found:
        log.warning(
            "%s images whose mean and std are not known; now data.mean=%s data.std=%s",
            *(source, data.mean, data.std),
        )
        return
    now = preprocessing.of_checkpoint({"config": {"data": data.model_dump()}})
    for field in fields:
        if field in found and _spread(found[field]) != _spread(now[field]):
            log.warning("%s data.%s=%s; now it is %s", source, field, found[field], now[field])


def _spread(value: Any) -> Any:
    """Returns one value for all channels as it is for one channel."""
    return value[:1] if isinstance(value, tuple) and len(set(value)) == 1 else value
