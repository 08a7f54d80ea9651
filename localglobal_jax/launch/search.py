# SPDX-License-Identifier: Apache-2.0
"""Searches: Optuna draws the overrides of each run from a space. Needs the extra ``search``.

A trial is an ordinary named run in the root of the sweep; the study's file is beside them. So the
same command goes on after a kill: trials that had started run to their end first.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from localglobal_jax.checkpoints import workdir
from localglobal_jax.checkpoints.workdir import absolute, is_remote
from localglobal_jax.config import loading, schema, sweeps, validation
from localglobal_jax.launch import expand, local, pool
from localglobal_jax.launch.exit_codes import ExitCode
from localglobal_jax.launch.expand import Description, Sweep
from localglobal_jax.training import metrics
from localglobal_jax.training.reporting import metrics_log

SAMPLERS = ("random", "tpe", "qmc")
FACTOR = 3  # of successive halving: a third of the runs goes on from rung to rung
WRONG = "wrong"  # attribute of a trial whose config is invalid: the reason


@dataclasses.dataclass(frozen=True)
class Space:
    """The space of a config file, and the parts that all trials share."""

    spec: str
    prefix: str
    root: str
    given: Mapping[str, str]
    base: schema.Run
    fields: sweeps.Space


def named(name: str) -> bool:
    """Returns whether a function of a config file is a search, by its name."""
    return name == "search" or name.startswith("search_")


def read_space(spec: str, root: str, sweep: str, given: Mapping[str, str]) -> Space:
    """Returns the space of ``search()`` or ``search_NAME()`` of a file. Raises ValueError."""
    if is_remote(root):
        raise ValueError(
            f"--workdir {root}: a search needs a local directory, for the study's file"
        )
    module, arg = loading.load_module(spec)
    function = "search" if sweep == "sweep" else sweep if named(sweep) else f"search_{sweep}"
    known = {name for name in vars(module) if named(name)}
    if not known:
        raise ValueError(
            f"{spec} has no search: write a function search() that returns a space (configs/"
            "sweeps.md), or leave out --sampler"
        )
    if function not in known:
        raise validation.unknown(f"search of {spec}:", function, known)
    with loading.beside(module):
        fields = expand.called(getattr(module, function), arg, f"{spec} {function}")
    parts = (sweeps.Range, sweeps.Choice)
    if not isinstance(fields, Mapping) or not fields:
        raise ValueError(
            f"{function} of {spec} returns {fields!r}: return {{'a.field': uniform(...)}}"
        )
    for field, part in fields.items():
        if not isinstance(part, parts):
            raise ValueError(f"{function} of {spec}: {field}: give uniform, integers or choice")
        if field in given:
            raise ValueError(f"--config.{field} is a field that the search draws")
    base = validation.check(loading.load(spec, given))
    root = str(absolute(root.rstrip("/") or "/"))
    return Space(spec, expand.prefix_of(spec, f"_{function}"), root, given, base, fields)


class Study:
    """The trials of a search, in a file of the root; `pool.Source` of their jobs.

    Args:
      sampler: one of `SAMPLERS`.
      trials: the number of trials, earlier ones included.
      halving: whether runs are stopped by successive halving, a rung at every evaluation.
      stored: False for a study that is forgotten, as of a dry run.
    """

    def __init__(
        self,
        space: Space,
        sampler: str = "random",
        trials: int = 0,
        *,
        halving: bool = False,
        stored: bool = True,
    ):
        if importlib.util.find_spec("optuna") is None:
            raise ValueError(
                "--sampler needs Optuna, which is not installed: "
                "pip install 'localglobal_jax[search]'"
            )
        import optuna  # noqa: PLC0415 # an extra, and a second

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._optuna, self._space, self._limit, self._halving = optuna, space, trials, halving
        best = space.base.checkpoint.best
        if not best:
            raise ValueError("a search needs config.checkpoint.best, the metric that it improves")
        if halving and not space.base.eval.every:
            raise ValueError("--halving compares evaluations: config.eval.every is 0")
        self._metric, self._smaller = metrics.direction(best)
        self._study = self._opened(sampler, stored)
        self._names: dict[str, int] = {}
        self._taken: set[int] = set()  # numbers of the trials whose jobs were returned
        self._refused: list[int] = []  # the newest ones, if they were refused for one reason
        self._reason = ""

    def _opened(self, sampler: str, stored: bool) -> Any:
        optuna, root = self._optuna, pathlib.Path(self._space.root)
        storage: Any = None
        file = root / f"{self._space.prefix}.optuna"
        if stored and (file.exists() or self._limit):
            root.mkdir(parents=True, exist_ok=True)
            lock = optuna.storages.journal.JournalFileSymlinkLock(str(file))
            _check_journal(file, lock if self._limit else None)
            backend = optuna.storages.journal.JournalFileBackend(str(file), lock_obj=lock)
            storage = optuna.storages.JournalStorage(backend)
            if not self._limit:  # only read, also where nothing may be written
                with contextlib.suppress(KeyError):
                    return optuna.load_study(study_name=self._space.prefix, storage=storage)
                storage = None
        every = self._space.base.eval.every or self._space.base.steps
        pruner: Any = optuna.pruners.NopPruner()
        if self._halving:
            pruner = optuna.pruners.SuccessiveHalvingPruner(every, FACTOR)
        study = optuna.create_study(
            storage=storage,
            study_name=self._space.prefix,
            load_if_exists=True,
            direction="minimize" if self._smaller else "maximize",
            pruner=pruner,
        )
        seed = self._space.base.seed + len(study.trials)  # not the same numbers after a restart
        study.sampler = {
            "random": optuna.samplers.RandomSampler,
            "tpe": optuna.samplers.TPESampler,
            "qmc": optuna.samplers.QMCSampler,
        }[sampler](seed=seed)
        return study

    def check(self) -> None:
        """Raises ValueError if the trials are of another space, or their runs of another config.

        The range of a field may change, its kind and its choices may not.
        """
        now = {field: _kind(part) for field, part in self._distributions().items()}
        for trial in self._study.trials:
            before = {field: _kind(part) for field, part in trial.distributions.items()}
            other = {f for f in before if before[f] != now.get(f)}
            other |= now.keys() - before.keys() if trial.state.is_finished() else set()
            if other:
                raise ValueError(
                    f"{', '.join(sorted(other))}: the trials there, in {self._space.root}, are of "
                    "another space: give another --workdir, or search() as it was"
                )
        for run in self.sweep().runs:
            workdir.refuse_other(run.run, pathlib.Path(run.workdir))

    # ------------------------------------------------------------------ trials as runs

    def sweep(self) -> Sweep:
        """Returns the runs of all trials so far, without those whose config is invalid."""
        runs = tuple(self._described(trial.number, trial.params) for trial in self._trials())
        return Sweep(self._space.prefix, self._space.base, runs)

    def states(self) -> list[str]:
        """Returns the states of all trials: "done", "pruned", "failed" or "running"."""
        names = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
        return [
            "failed" if trial.number in self._refused else names.get(trial.state.name, "running")
            for trial in self._trials()
        ]

    def left_out(self) -> list[str]:
        """Returns the reasons of the draws whose config is invalid."""
        found = (trial.user_attrs.get(WRONG, "") for trial in self._study.trials)
        return [reason for reason in found if reason]

    def _trials(self) -> list[Any]:
        """Returns the trials that are runs: without invalid ones, and those being drawn."""
        return [
            trial
            for trial in self._study.trials
            if WRONG not in trial.user_attrs and trial.params.keys() == self._space.fields.keys()
        ]

    def draw(self) -> Description | None:
        """Returns the run of a new trial; None once there are as many as asked for.

        A trial with an invalid config counts, and the next one is drawn.
        """
        while len(self._study.trials) < self._limit:
            trial = self._study.ask(self._distributions())
            try:
                if trial.number >= self._limit:
                    raise ValueError("another start has drawn the last trial at the same time")
                return self._described(trial.number, trial.params)
            except ValueError as error:
                trial.set_user_attr(WRONG, str(error))
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return None

    def _distributions(self) -> dict[str, Any]:
        kinds = self._optuna.distributions
        found: dict[str, Any] = {}
        for field, part in self._space.fields.items():
            if isinstance(part, sweeps.Choice):
                found[field] = kinds.CategoricalDistribution([repr(v) for v in part.values])
            elif part.whole:
                low, high = int(part.low), int(part.high)
                found[field] = kinds.IntDistribution(low, high, log=part.log)
            else:
                found[field] = kinds.FloatDistribution(part.low, part.high, log=part.log)
        return found

    def _described(self, number: int, params: Mapping[str, Any]) -> Description:
        space, overrides = self._space, {}
        for field, part in space.fields.items():
            value = params[field]
            if isinstance(part, sweeps.Choice):
                value = {repr(v): v for v in part.values}.get(value, value)
            elif isinstance(value, float):
                value = float(f"{value:.6g}")
            overrides[field] = value
        run, applied, texts = expand.apply(space.spec, space.given, overrides)
        folder = f"{space.root}/{sweeps.name(space.prefix, number, applied)}"
        texts = {**space.given, **texts}
        return expand.describe(space.spec, folder, number, texts, applied, run)

    # ------------------------------------------------------------------ `pool.Source`, and ends

    def next_job(self) -> pool.Job | None:
        """Returns the job of a trial that an earlier or another start has drawn, or of a new one.

        The pool waits for a run of another start, which then has the lock of its workdir.
        """
        run = None
        for trial in self._trials():
            if run is None and trial.number not in self._taken and not trial.state.is_finished():
                with contextlib.suppress(ValueError):  # the file has changed: see `--status`
                    run = self._described(trial.number, trial.params)
        run = run or self.draw()
        if run is None:
            return None
        self._taken.add(run.index)
        self._names[run.name] = run.index
        return local.job(run)

    def gives_up(self, job: pool.Job) -> bool:
        """Reports the new evaluations of a trial, in order; returns whether its pruner stops it."""
        known = self._study.trials[self._names[job.name]]
        trial = self._optuna.trial.Trial(self._study, known._trial_id)
        for step, value in self._values(job):
            if step in known.intermediate_values or known.state.is_finished():
                continue
            with contextlib.suppress(RuntimeError):  # another launcher ends it at this moment
                trial.report(value, step)
                if self._halving and trial.should_prune():
                    return True
        return False

    def ended(self, job: pool.Job, outcome: pool.JobResult) -> None:
        """Takes the outcome: the best value of the metric, or that there is none.

        A trial that was stopped goes on with the next start. So do trials that were refused when
        these end the pool (see `pool.ALIKE`), as before their data are prepared.
        """
        states, number = self._optuna.trial.TrialState, self._names[job.name]
        if outcome.state not in ("done", pool.PRUNED, "failed"):
            return
        if outcome.code != ExitCode.WRONG or outcome.reason != self._reason:
            self.give_up_refused()
        if outcome.code == ExitCode.WRONG:
            self._refused.append(number)
            self._reason = outcome.reason
            return
        self.gives_up(job)  # reports the evaluations since the last look
        found = [value for _, value in self._values(job) if math.isfinite(value)]
        if outcome.state == pool.PRUNED:
            self._tell(number, states.PRUNED)
        elif outcome.state == "failed" or not found:
            self._tell(number, states.FAIL)
        else:
            self._tell(number, states.COMPLETE, min(found) if self._smaller else max(found))

    def give_up_refused(self) -> None:
        """Tells that the refused trials failed, unless they are so many that they end the pool."""
        if len(self._refused) < pool.ALIKE:
            for number in self._refused:
                self._tell(number, self._optuna.trial.TrialState.FAIL)
            self._refused.clear()

    def _tell(self, number: int, state: Any, value: float | None = None) -> None:
        self._study.tell(number, value, state, skip_if_finished=True)

    def _values(self, job: pool.Job) -> list[tuple[int, float]]:
        """Returns step and value of every evaluation; the value may be NaN or infinite."""
        split, _, name = self._metric.rpartition("/")
        return [
            (line["step"], float(line[name]))
            for line in metrics_log.read_metrics(job.directory)
            if line["split"] == split and name in line
        ]


def _check_journal(file: pathlib.Path, lock: Any = None) -> None:
    """Raises ValueError for a damaged line of a study's file.

    With a `lock` of Optuna a torn last line, as of a full disk, is dropped: the next one would be
    appended to it.
    """
    with contextlib.ExitStack() as held:
        if lock:
            lock.acquire()
            held.callback(lock.release)
        text = file.read_bytes() if file.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                json.loads(line)
            except ValueError:
                raise ValueError(
                    f"{file}: line {number} is damaged: restore the file, or give another --workdir"
                ) from None
        if lock and whole != text:
            os.truncate(file, len(whole))


def _kind(distribution: Any) -> tuple[Any, ...]:
    """Returns the parts of an Optuna distribution that all trials of a study share."""
    parts = (getattr(distribution, name, None) for name in ("choices", "log"))
    return (type(distribution), *parts)
