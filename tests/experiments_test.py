# SPDX-License-Identifier: Apache-2.0
"""Committed tables equal those that make.py draws from results.csv; every sweep is valid."""

import collections
import csv
import functools
import importlib
import math
import os
import pathlib
import re
import shutil
import subprocess
import types

import jax
import numpy as np
import pytest
import small

import localglobal_jax as lg
from experiments import protocol, study, tune
from experiments.benchmarks import make as benchmarks
from experiments.beyond import make as beyond
from experiments.beyond import measure_kernels
from localglobal_jax.cli import main as command_line
from localglobal_jax.config import loading
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline
from localglobal_jax.launch import expand, status, summary

FOLDER = pathlib.Path(study.__file__).parent
STUDIES = sorted(
    file.parent.name for file in FOLDER.glob("*/make.py") if "study.main" in file.read_text()
)
LIST = (FOLDER / "README.md").read_text()
SWEEPS = sorted(str(file.relative_to(FOLDER)) for file in FOLDER.glob("*/sweep*.py"))


@pytest.mark.parametrize("name", STUDIES)
def test_committed_tables_equal_those_of_make(name, tmp_path):
    made = importlib.import_module(f"experiments.{name}.make")
    study.main(made.__file__, made.tables, made.draw, tmp_path)
    for file in ("table.md", "README.md"):
        assert (tmp_path / file).read_text() == (FOLDER / name / file).read_text(), file
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_has_no_verdict_but_the_one_from_its_csv(name):
    if name in protocol.WITHOUT_TRAINING:
        pytest.skip("compares no trained models")
    text = (FOLDER / name / "README.md").read_text()
    found = text.partition("## Verdict\n")[2].partition("\n## ")[0]
    outside, blocks = re.subn(r"<!-- verdict.*?<!-- end -->", "", found, flags=re.DOTALL)
    assert blocks > 0
    # how to read the lines; no number, no list and no emphasis of its own
    assert len(outside) < 400
    assert not re.search(r"\d\.\d|\*\*|^- ", outside, re.MULTILINE), outside


def test_the_summary_of_a_sweep_gives_the_numbers_of_the_page():
    """Study pages and ``sweep --summary`` have one mean, one interval and one verdict."""
    rows = [
        {
            "name": row["name"],
            "state": "done",
            "settings": {"seed": row["seed"], "model.layout": row["model.layout"]},
            "extremes": {"test/accuracy": {"last": 100 * float(row["test/accuracy"])}},
        }
        for row in protocol.reported(FOLDER / "beyond")
    ]
    metric = summary.Metric("test/accuracy")
    found = summary.groups(rows, metric, ["seed"], ["model.layout=CCTT"])
    page = (FOLDER / "beyond" / "README.md").read_text()
    for line in found:
        half = (line["high"] - line["low"]) / 2
        mean = f"{line['mean test/accuracy']:.2f} ± {half:.2f}"
        assert f"| {line['model.layout']} | {mean} |" in page
        if line["side"] != "baseline":
            ends = (line["difference"], line["diff low"], line["diff high"])
            shown = "{:+.2f} ({:+.2f} to {:+.2f}, 3 pairs): **{}**".format(*ends, line["side"])
            assert f"- {line['model.layout']} against CCTT, test accuracy, points: {shown}" in page
    assert len(found) == 4


def test_benchmarks_show_what_was_measured():
    page = FOLDER / "benchmarks" / "README.md"
    assert study.document(page.read_text(), benchmarks.tables()) == page.read_text()


@pytest.mark.parametrize("size", ["laptop", "paper", "tiny"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_every_sweep_is_right(name, size, tmp_path):
    runs = expand.expand(f"{FOLDER / name}:size={size}", str(tmp_path), "sweep", {})
    assert len({run.name for run in runs.runs}) == len(runs.runs) > 1


TRIED = (protocol.NORM, protocol.RATE, protocol.WARMUP)
TUNED = [name for name in SWEEPS if "sweep_grid" in (FOLDER / name).read_text()]


@pytest.mark.parametrize("name", TUNED)
def test_every_run_of_every_grid_is_right(name, tmp_path):
    spec = f"{FOLDER / name}:size=tiny"
    found = collections.Counter()
    for run in expand.expand(spec, str(tmp_path), "grid", {}).runs:
        found[str(sorted((k, v) for k, v in run.overrides.items() if k not in TRIED))] += 1
    assert len(found) >= 2  # models
    assert len(set(found.values())) == 1  # of equal budgets


def test_the_reported_translations_have_both_lengths(monkeypatch):
    sweep = loading.import_file(FOLDER / "beyond_text" / "sweep.py")
    chosen = [{"seed": seed, protocol.RATE: 1e-3} for seed in protocol.SEEDS]
    monkeypatch.setattr(sweep, "_final", lambda arg: iter(chosen))
    found = [(run["seed"], run["data.max_length"]) for run in sweep.sweep_final()]
    assert found == [(seed, length) for seed in protocol.SEEDS for length in (96, 24)]
    assert sweep.get_config().data.max_length == 96  # of the choice


def test_the_reported_layouts_have_all_parts_of_the_training_set(monkeypatch):
    sweep = loading.import_file(FOLDER / "coatnet_layouts" / "sweep.py")
    assert all(run["data.train_split"] == "train[:90%]" for run in sweep.sweep_grid())
    chosen = [{"seed": seed, protocol.RATE: 1e-3} for seed in protocol.SEEDS]
    monkeypatch.setattr(sweep, "_final", lambda arg: iter(chosen))
    found = [(run["seed"], run["data.train_split"]) for run in sweep.sweep_final()]
    parts = ("train[:1%]", "train[:10%]", "train")
    assert found == [(seed, part) for seed in protocol.SEEDS for part in parts]


def test_the_reported_models_of_images_have_equal_steps_and_equal_time(monkeypatch):
    sweep = loading.import_file(FOLDER / "vision_comparison" / "sweep.py")
    models = sweep.models_of(None)
    cell = protocol.Cell("", 1e-3, 30)
    chosen = list(protocol.final(models, dict.fromkeys(models, cell)))
    monkeypatch.setattr(sweep, "_final", lambda arg: iter(chosen))

    def settings(runs):
        names = (protocol.RATE, protocol.WARMUP)
        return [sorted((k, str(v)) for k, v in run.items() if k not in names) for run in runs]

    runs = list(sweep.sweep_final())
    assert {protocol.cell(run) for run in runs} == {cell}
    assert sorted(settings(runs)) == sorted(settings([*sweep.sweep(), *sweep.sweep_time()]))


def test_the_choice_of_a_transfer_sees_no_test_image_and_no_reported_pre_training(monkeypatch):
    sweep = loading.import_file(FOLDER / "coatnet_transfer" / "sweep.py")
    models = sweep.models_of(None)
    runs = list(sweep.sweep_grid())
    assert all(sweep.KIND.choice.items() <= run.items() for run in runs)
    chosen = protocol.final(models, dict.fromkeys(models, protocol.Cell("", 1e-3, 5)))
    monkeypatch.setattr(sweep, "_final", lambda arg: chosen)
    final = list(sweep.sweep_final())
    assert len(final) == 12
    assert not any("data.eval_splits" in run for run in final)  # that of the config
    for run in final:
        seed = run["seed"]
        assert run["data.train_split"] == f"train[{10 * seed}%:{10 * seed + 10}%]"
    tuned, reported = ({run["init"] for run in part if "init" in run} for part in (runs, final))
    assert (len(tuned), len(reported)) == (2, 6)
    assert not tuned & reported
    one_setting = {run["init"] for run in sweep.sweep() if "init" in run}
    assert reported == one_setting
    for run in final:  # as a row of a CSV file
        name = protocol.model_of({"init": "", **{k: str(v) for k, v in run.items()}}, models)
        assert ("init" in run) == name.endswith("pre-trained")
        assert name.startswith(run["model.layout"])


def test_one_command_makes_every_study():
    script = (FOLDER / "reproduce.sh").read_text()
    steps = [path for path in FOLDER.glob("*/measure*.py") if path.parent.name in STUDIES]
    steps += [path for path in FOLDER.glob("*/sweep*.py") if path.parent.name in STUDIES]
    for path in steps:
        name = path.parent.name
        said = (f"measure {name}.{path.stem}", f"sweep {name} {path.name}", f"{name}/{path.name}")
        said += (f"tune {name} ",)
        assert any(words in script.replace('"', "") for words in said), path
    assert set(STUDIES) <= set(script.partition("for study in")[2].replace(";", " ").split())
    subprocess.run(["bash", "-n", FOLDER / "reproduce.sh"], check=True)


def test_every_page_and_the_list_show_the_state_under_the_protocol():
    listed = dict(re.findall(r"\| \[(\w+)\]\(\1/README.md\) \| ([a-z ]+) \|", LIST))
    assert set(listed) == set(STUDIES)
    for name in STUDIES:
        assert listed[name] == protocol.state(FOLDER / name), name
        page = (FOLDER / name / "README.md").read_text()
        assert "\n".join(protocol.state_lines(FOLDER / name)) in page, name
        if protocol.state(FOLDER / name) == protocol.ONE_SETTING:
            assert "one setting" in page.lower() and "**Counter-evidence.**" in page, name


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_names_the_commits_of_its_rows(name):
    page = (FOLDER / name / "README.md").read_text()
    block = page.partition("<!-- protocol -->")[2].partition("<!-- end -->")[0]
    named = set(re.findall(r"\b[0-9a-f]{7}\b", block))
    rows = [row for file in (FOLDER / name).glob("*.csv") for row in protocol.read(file)]
    if other := protocol.RUNS_OF.get(name):
        measured = {row["name"] for row in rows if "name" in row}
        rows += [row for row in protocol.reported(FOLDER / other) if row["name"] in measured]
    assert named == {row["commit"][:7] for row in rows if row.get("commit")}
    for file in (FOLDER / name).glob("*.csv"):
        known = protocol.read(file)
        if known and "state" in known[0] and "commit" not in known[0]:
            assert file.name in block


def test_commits_of_rows(tmp_path):
    one, two = "1" * 40, "2" * 40
    assert study.commit_lines(tmp_path) == []
    (tmp_path / "lengths.csv").write_text("name,bleu\na,1\n")  # measured on the runs
    (tmp_path / "results.csv").write_text("name,state,commit\n")
    assert study.commit_lines(tmp_path) == []
    (tmp_path / "results.csv").write_text("name,state\na,done\n")
    assert study.commit_lines(tmp_path) == [
        "The rows of results.csv name no commit: they were collected before rows had one."
    ]
    (tmp_path / "final.csv").write_text(f"name,state,commit\na,done,{one}-dirty\nb,failed,\n")
    (tmp_path / "grid.csv").write_text(
        f"name,state,commit\na,done,{two}\nb,done,{one}\nc,done,{two}\n"
    )
    (tmp_path / "earlier.csv").write_text(f"verdict,side,commit\nx,better,{two}\n")
    assert study.commit_lines(tmp_path) == [
        "Runs of commit 2222222 and 1111111 (grid), 1111111-dirty (final).",
        "The rows of results.csv name no commit: they were collected before rows had one.",
        "Earlier verdicts of commit 2222222.",
    ]


@pytest.mark.parametrize("name", ["grid.csv", "warmup.csv", "final.csv", "length"])
def test_numbers_under_the_protocol_carry_their_commit(name):
    files = FOLDER.glob(f"*/{name}")
    if name == "length":
        files = FOLDER.glob("length_or_difficulty/results.csv")
    for file in files:
        for row in protocol.read(file):
            if row.get("state", "done") == "done":
                assert re.fullmatch("[0-9a-f]{40}", row["commit"]), (file, row["name"])


STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$LOG"
[ "$(wc -l < "$LOG")" != "$STOP" ] || exit 42
"""


PARTS = ["laptop", "length", "protocol", "lohelp", "kernels", "images", "large"]


@pytest.mark.parametrize("what", PARTS)
def test_one_script_stops_with_a_stopped_command_and_goes_on(what, tmp_path):
    for name in ("localglobal", "python"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    command = ["bash", str(FOLDER / "reproduce.sh"), what, str(tmp_path / "runs")]
    assert subprocess.run(command, env={**env, "STOP": "2"}, check=False).returncode == 42
    stopped = log.read_text().splitlines()
    assert len(stopped) == 2
    log.unlink()
    assert subprocess.run(command, env={**env, "STOP": "none"}, check=False).returncode == 0
    whole = log.read_text().splitlines()
    assert whole[:2] == stopped  # the same commands, which go on where they stopped
    assert len(whole) >= 3
    assert whole[-1].startswith("python -m experiments.") and whole[-1].endswith(".make")


SMALL_SWEEP = """
from localglobal_jax.config import loading

def get_config(arg=None):
    return loading.load({config!r} + ":size=tiny,data=mock", {fields!r})

def sweep():
    for seed in range(2):
        yield {{"seed": seed}}
"""


def test_runs_in_the_csv_file_are_not_trained_again(tmp_path):
    config, file, runs = (tmp_path / name for name in ("c.py", "rows.csv", "runs"))
    fields = {**small.IMAGES, "steps": "1", "optim.warmup_steps": "1", "eval.every": "0"}
    digits = str(FOLDER.parent / "configs" / "coatnet_digits.py")
    config.write_text(SMALL_SWEEP.format(config=digits, fields=fields))
    words = ["--config", str(config), "--workdir", str(runs), "--slots", "1"]
    assert command_line.main(["sweep", *words, "--only", "0"]) == 0
    assert tune.run_stage(str(config), "sweep", str(runs), file, slots=None) == 0
    first, second = protocol.read(file)
    assert (first["state"], second["state"]) == ("done", "not started")
    shutil.rmtree(runs)  # as on another machine
    assert tune.run_stage(str(config), "sweep", str(runs), file, slots="1") == 0
    kept, other = protocol.read(file)
    assert kept == first
    assert (other["name"], other["state"]) == (second["name"], "done")
    assert [folder.name for folder in runs.iterdir()] == [second["name"]]


@pytest.mark.parametrize("name", [n for n in STUDIES if (FOLDER / n / "grid.csv").exists()])
def test_tuning_goes_on_from_the_committed_rows(name, tmp_path):
    """Each run of the stages so far is known by its name: a tuned study has nothing left."""
    spec = str(FOLDER / name / "sweep.py")
    for stage in protocol.STAGES:
        rows = protocol.read(FOLDER / name / f"{stage}.csv")
        if not rows:
            break  # of a part
        names = [run.name for run in expand.expand(spec, str(tmp_path), stage).runs]
        done = sum(row["state"] == "done" for row in rows)
        assert len(tune.left(names, rows)) == len(names) - done, stage


def test_measured_kernels_stay_where_their_runs_are_not(tmp_path):
    (tmp_path / "kernels.csv").write_text("kept")
    measure_kernels.main(str(tmp_path / "nothing"), tmp_path)
    assert (tmp_path / "kernels.csv").read_text() == "kept"
    (tmp_path / "kernels.csv").unlink()
    with pytest.raises(ValueError, match="train it first"):
        measure_kernels.main(str(tmp_path / "nothing"), tmp_path)


def test_tuning_runs_a_stage_until_it_does_not_grow_and_then_the_next(tmp_path, monkeypatch):
    folder = shutil.copytree(FOLDER / "lohelp", tmp_path / "experiments" / "lohelp")
    for stage in protocol.STAGES:
        (folder / f"{stage}.csv").unlink(missing_ok=True)
    (folder.parent / "protocol.py").symlink_to(FOLDER / "protocol.py")
    (tmp_path / "configs").symlink_to(FOLDER.parent / "configs")
    words = ["--config", str(folder / "sweep.py"), "--workdir", str(tmp_path / "runs")]
    trained = []

    def stand_in(given):
        """In place of a sweep: all runs of pre-norm end, best at the highest rate of three."""
        spec, stage, root = (
            given[given.index(f"--{n}") + 1] for n in ("config", "sweep", "workdir")
        )
        if "--collect" not in given:
            trained.append((stage, given[given.index("--only") + 1 : given.index("--slots")]))
            return 1 if stage == "grid" else 0
        names = given[given.index("--only") + 1 : given.index("--collect")]
        runs = [run for run in expand.expand(spec, root, stage).runs if run.name in names]
        overrides = [{**run.overrides} for run in runs]
        rows = collected(
            protocol.TEXT, overrides, [abs(o[protocol.RATE] - 4e-3) for o in overrides]
        )
        for row, run in zip(rows, runs, strict=True):
            failed = run.overrides.get(protocol.NORM) == (False, False)
            row.update(name=run.name, state="failed" if failed else "done")
        write(pathlib.Path(given[-1]), rows)
        return 0

    monkeypatch.setattr(command_line, "main", stand_in)
    assert tune.main(words) == 0
    assert [stage for stage, _ in trained] == ["grid", "grid", "warmup", "final"]
    first, more, warmups, reported = (len(names) for _, names in trained)
    assert (first, more, warmups, reported) == (12, 4, 4, 6)
    assert protocol.is_complete(protocol.read(folder / "final.csv"))
    trained.clear()
    assert tune.main(words) == 0  # again: the failed runs of the grid, each once
    assert [(stage, len(names)) for stage, names in trained] == [("grid", 8)]
    trained.clear()
    kept = (folder / "final.csv").read_text()
    (folder / "final.csv").unlink()
    assert tune.main([*words, "--collect"]) == 0
    assert not trained and (folder / "final.csv").read_text() == kept


def test_cells_have_the_interval_if_there_is_one():
    assert study.shown([]) == "not run"
    assert study.shown([1.5]) == "1.50"
    assert study.shown([1.0, 2.0, 3.0], 1) == "2.0 ± 2.5"  # 4.303 / sqrt(3)


def test_verdict_lines_give_difference_interval_and_side():
    low, high = {"0": 1.0, "1": 1.1, "2": 0.9}, {"0": 3.0, "1": 3.1, "2": 3.0}
    scores = {"a": low, "b": high, "c": {"0": 1.0, "1": 1.2, "2": 0.7}, "d": {"0": 5.0}}
    better, open_, none = study.verdict_lines(
        scores, "BLEU", [("b", "a"), ("c", "a"), ("d", "a")], digits=1
    )
    assert better == "- b against a, BLEU: +2.0 (+1.9 to +2.2, 3 pairs): **better**"
    assert open_.endswith("3 pairs): **undecided**")
    assert none == "- d against a, BLEU: no verdict (1 pairs)"
    (loss,) = study.verdict_lines(scores, "loss", [("b", "a")], smaller_is_better=True)
    assert loss.endswith("**worse**")
    assert len(study.verdict_lines(scores, "BLEU")) == 6


# ------------------------------------------------------------------------------------ the protocol

MODELS = {"x": {"model.layout": "SS"}, "y": {"model.layout": "MM"}}
KINDS = {"text": (protocol.TEXT, 2), "images": (protocol.IMAGES, 1)}  # and their norm placements
both_kinds = pytest.mark.parametrize(("kind", "norms"), KINDS.values(), ids=KINDS)


def collected(kind, runs, costs, state="done"):
    """Rows of a CSV file, as `sweep --collect` writes them; the lowest cost is the best score."""
    sign = 1 if kind.smaller_is_better else -1
    return [
        {"name": f"run{i}", "state": state, kind.metric: str(sign * cost)}
        | {field: str(value) for field, value in run.items()}
        for i, (run, cost) in enumerate(zip(runs, costs, strict=True))
    ]


def write(file, rows):
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, list(dict.fromkeys(c for row in rows for c in row)))
        writer.writeheader()
        writer.writerows(rows)


def choose(kind, rows):
    return protocol.chosen(rows, MODELS, kind.metric, smaller_is_better=kind.smaller_is_better)


@both_kinds
def test_the_grid_gives_every_model_the_same_budget(kind, norms):
    runs = list(protocol.grid(list(MODELS.values()), {}, rate=2e-3, warmup=100, norms=kind.norms))
    settings = {
        name: [{k: v for k, v in run.items() if k != "model.layout"} for run in runs
               if run["model.layout"] == model["model.layout"]]
        for name, model in MODELS.items()
    }  # fmt: skip
    assert settings["x"] == settings["y"]
    assert len(settings["x"]) == 3 * norms
    assert sorted({run["optim.learning_rate"] for run in runs}) == [1e-3, 2e-3, 4e-3]
    assert {run["seed"] for run in runs} == {protocol.CHOICE}


@both_kinds
def test_the_choice_is_the_best_of_validation_and_needs_the_whole_grid(kind, norms):
    runs = list(protocol.grid(list(MODELS.values()), {}, rate=2e-3, warmup=100, norms=kind.norms))
    costs = [3] * len(runs)
    costs[2 * norms - 2 : 2 * norms + 2] = (2, 3, 3, 1)  # pairs of x and y
    rows = collected(kind, runs, costs)
    best = choose(kind, rows)
    x, y = {1: ("", ""), 2: ("post", "pre")}[norms]
    assert best == {"x": protocol.Cell(x, 2e-3, 100), "y": protocol.Cell(y, 4e-3, 100)}
    assert protocol.extension([2e-3, 4e-3], [1e-3, 2e-3, 4e-3]) == [8e-3]
    assert protocol.extension([150, 300], [300, 150, 600]) == [75]
    with pytest.raises(ValueError, match=f"0 of {len(runs)}"):
        choose(kind, collected(kind, runs, [1] * len(runs), "running"))
    with pytest.raises(ValueError, match=f"'x': {3 * norms}, 'y': {3 * norms - 1}"):
        choose(kind, rows[:-1])
    more = list(protocol.warmup(MODELS, {}, best, (50, 200)))
    assert {run["optim.warmup_steps"] for run in more} == {50, 200}
    assert [run["optim.learning_rate"] for run in more] == [2e-3, 4e-3] * 2
    last = list(protocol.final(MODELS, best))
    assert len(last) == 6
    assert protocol.CHOICE not in {run["seed"] for run in last}


@both_kinds
def test_a_grid_grows_for_all_models_until_none_chooses_its_end(kind, norms, tmp_path):
    optim = types.SimpleNamespace(learning_rate=2e-3, warmup_steps=100)
    grid, warmup, final = protocol.sweeps(
        kind,
        tmp_path,
        lambda arg: types.SimpleNamespace(optim=optim, steps=900),
        lambda arg: MODELS,
    )

    def collect(name, sweep, cost):
        runs = list(sweep())
        write(tmp_path / f"{name}.csv", collected(kind, runs, [cost(run) for run in runs]))
        return runs

    def distance(run):  # x is best at 9e-3 with a long warm-up, y at 2e-3 with one of 100
        first = run["model.layout"] == "SS"
        apart = abs(math.log(run["optim.learning_rate"] / (9e-3 if first else 2e-3)))
        return apart + abs(math.log(run["optim.warmup_steps"] / (2000 if first else 100))) / 99

    first = collect("grid", grid, distance)
    assert len(first) == 6 * norms
    with pytest.raises(ValueError, match=r"0\.008"):
        list(warmup())
    second = collect("grid", grid, distance)
    assert second[: len(first)] == first
    assert [run["optim.learning_rate"] for run in second[len(first) :]] == [8e-3] * 2 * norms
    third = collect("grid", grid, distance)
    assert {run["optim.learning_rate"] for run in third[len(second) :]} == {16e-3}
    assert list(grid()) == third  # 8e-3 is better than 16e-3
    with pytest.raises(ValueError, match=r"warmup\.csv"):
        list(final())
    tried = collect("warmup", warmup, distance)
    assert {run["optim.learning_rate"] for run in tried} == {8e-3, 2e-3}
    assert {run["optim.warmup_steps"] for run in tried} == {50, 200}
    with pytest.raises(ValueError, match=r"warmup\.csv.*400"):
        list(final())
    more = collect("warmup", warmup, distance)
    assert more[: len(tried)] == tried
    assert [run["optim.warmup_steps"] for run in more[len(tried) :]] == [400] * 2
    assert list(warmup()) == more  # 800 would be more than half of the steps
    reported = list(final())
    assert {run["optim.warmup_steps"] for run in reported} == {400, 100}
    # The test set is seen by the reported runs only, which train on the whole training set
    assert all(kind.choice.items() <= run.items() for run in third + tried)
    assert not any(kind.choice.keys() & run.keys() for run in reported)


# All but length_or_difficulty, whose verdicts are of measured checkpoints only
COMPARISONS = [n for n in STUDIES if f"{n}/sweep.py" in TUNED and n != "length_or_difficulty"]


@pytest.mark.parametrize("name", COMPARISONS)
def test_make_writes_the_page_of_a_study_that_becomes_tuned(name, tmp_path):
    """Also of one whose runs nobody has made yet: the CSV files are made up from its sweeps."""
    (tmp_path / "configs").symlink_to(FOLDER.parent / "configs")
    folder = shutil.copytree(FOLDER, tmp_path / "experiments", symlinks=True) / name
    committed = protocol.read(folder / "final.csv") or protocol.read(folder / "results.csv")
    columns = [n for n in committed[0] if "/" in n] if committed else ["test/accuracy"]
    for stage in protocol.STAGES:
        (folder / f"{stage}.csv").unlink(missing_ok=True)
    spec = folder / "sweep.py"
    kind = protocol.TEXT if "protocol.TEXT" in spec.read_text() else protocol.IMAGES
    kind = getattr(loading.import_file(spec), "KIND", kind)
    sign, middle, numbers = 1 if kind.smaller_is_better else -1, {}, np.random.default_rng(0)
    for stage in protocol.STAGES:
        runs = expand.expand(str(spec), str(tmp_path / "runs"), stage).runs
        fields = status.override_fields(runs)
        rows = status.records([status.read(run, fields=fields) for run in runs])
        for field in (protocol.RATE, protocol.WARMUP):  # the best of all is no end of the grid
            values = sorted({row[field] for row in rows})
            middle.setdefault(field, values[len(values) // 2])
        for row in rows:
            cost = sum(abs(math.log(row[field] / best)) for field, best in middle.items())
            row.update({kind.metric: sign * cost, "state": "done", "step": row["steps"]})
            if stage == "final":
                row.update({n: numbers.uniform(0.1, 0.9) for n in columns})
        (folder / f"{stage}.csv").write_text(summary.shown(rows, "csv") + "\n")
    if name == "beyond_large":  # has no shifts before it is measured
        shifts = [(row["model.layout"], row["seed"], n) for row in rows for n in range(5)]
        keys = ("layout", "seed", "shift", "accuracy", "agreement")
        measured = [(*each, *numbers.uniform(0.1, 0.9, 2)) for each in shifts]
        write(folder / "final_shifts.csv", [dict(zip(keys, m, strict=True)) for m in measured])
    made = loading.import_file(folder / "make.py")
    study.main(made.__file__, made.tables, made.draw)
    page = (folder / "README.md").read_text()
    assert "**Tuned**" in page

    def block(name):
        return page.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]

    assert "3 pairs" in block("verdict") and "no verdict" not in block("verdict")
    assert "not run" not in page.replace(block("gates"), "")  # gates are of the checkpoints
    assert ("verdicts differ" in block("changed")) == ("<!-- changed -->" in page)


@both_kinds
def test_a_run_that_failed_is_the_worst_of_its_model(kind, norms, tmp_path):
    runs = list(protocol.grid(list(MODELS.values()), {}, rate=2e-3, warmup=9, norms=kind.norms))
    rows = collected(kind, runs, range(len(runs)))  # the first two are the best
    rows[0] |= {"state": "failed", kind.metric: ""}
    best = protocol.chosen(rows, MODELS, kind.metric, smaller_is_better=kind.smaller_is_better)
    assert [cell.rate for cell in best.values()] == [2e-3 if norms == 2 else 4e-3, 2e-3]
    assert best["x"] == protocol.cell(rows[2])
    write(tmp_path / "grid.csv", rows)
    assert "| failed | " in "".join(study.grid(tmp_path, MODELS, kind))
    for row in rows[::2]:
        row |= {"state": "failed", kind.metric: ""}
    with pytest.raises(ValueError, match="x"):
        protocol.chosen(rows, MODELS, kind.metric, smaller_is_better=kind.smaller_is_better)


@both_kinds
def test_the_table_of_the_grid_has_a_line_for_each_setting(kind, norms, tmp_path):
    runs = list(protocol.grid(list(MODELS.values()), {}, rate=2e-3, warmup=9, norms=kind.norms))
    rows = collected(kind, runs[:-1], [0.25] * (len(runs) - 1))
    assert study.grid(tmp_path, MODELS, kind)[-1].startswith("| not run | ")
    write(tmp_path / "grid.csv", rows)
    head, _, *body = study.grid(tmp_path, MODELS, kind, scale=100, digits=1)
    own = ["norm", "learning rate", "warm-up", "x", "y"]
    assert head == f"| {' | '.join(own[norms == 1 :])} |"
    score = "25.0" if kind.smaller_is_better else "-25.0"
    first = ["pre-norm", "0.002", "9", score, score][norms == 1 :]
    assert body[0] == f"| {' | '.join(first)} |"
    assert body[-1].endswith(f"| 0.001 | 9 | {score} |  |")
    assert len(body) == 3 * norms


def test_the_choice_looks_at_pictures_that_it_does_not_train_on(tmp_path):
    spec = f"{FOLDER / 'beyond' / 'sweep.py'}:size=tiny"
    data = expand.expand(spec, str(tmp_path), "grid", {}).runs[0].run.data
    (held,) = data.eval_splits
    assert protocol.IMAGES.metric == f"{held}/accuracy"

    def pictures(split):
        source = pipeline.open_split(data, split, train=False)
        batches = list(loader.eval_batches(source, batch_size=512))
        return np.concatenate([batch["image"][batch["mask"] > 0] for batch in batches])

    trained, whole = pictures(data.train_split), pictures("train")
    assert 0.89 < len(trained) / len(whole) < 0.91
    np.testing.assert_array_equal(np.concatenate([trained, pictures(held)]), whole)


@pytest.mark.parametrize("name", ["muse_results", "coatnet_layouts", "beyond"])
def test_another_size_chooses_for_itself(name):
    """The rows of the page are none of its runs, and its rates are no ends of the page's grid."""
    spec = f"{FOLDER / name / 'sweep.py'}:size=paper,data=mock"
    assert protocol.stage_file(FOLDER / name, "grid").name == "grid.csv"
    assert protocol.stage_file(FOLDER, "grid", "size=laptop,data=real").name == "grid.csv"
    assert protocol.stage_file(FOLDER, "grid", "size=paper,data=mock").name == "grid_paper_mock.csv"
    base = loading.load(spec).optim.learning_rate
    runs = expand.expand(spec, "runs/x", "grid").runs
    rates = {run.run.optim.learning_rate for run in runs}
    assert rates == {base * factor for factor in protocol.FACTORS}
    with pytest.raises(ValueError, match="of the grid have ended"):
        expand.expand(spec, "runs/x", "warmup")


def test_a_part_of_a_grid_gives_no_state_but_its_number_of_runs(tmp_path):
    (tmp_path / "grid.csv").write_text("name,state\na,done\nb,running\n")
    assert protocol.state(tmp_path) == protocol.NOT_RUN
    (tmp_path / "results.csv").write_text("name,state\na,done\n")
    assert protocol.state(tmp_path) == protocol.ONE_SETTING
    assert "1 of the 2 runs" in " ".join(protocol.state_lines(tmp_path))
    (tmp_path / "final.csv").write_text("name,state\na,done\nb,failed\n")
    assert protocol.state(tmp_path) == protocol.ONE_SETTING
    (tmp_path / "final.csv").write_text("name,state\na,done\nb,done\n")
    assert protocol.state(tmp_path) == protocol.TUNED


def test_a_study_of_another_ones_runs_is_tuned_if_it_measured_the_final_ones(tmp_path):
    folder, other = tmp_path / "bleu_by_length", tmp_path / "muse_results"
    for each in (folder, other):
        each.mkdir()
    (other / "results.csv").write_text("name,state\none,done\n")
    (folder / "results.csv").write_text("name,bleu\none,1\none,2\n")
    assert protocol.state(folder) == protocol.ONE_SETTING
    assert [row["name"] for row in protocol.reported(other)] == ["one"]
    (other / "final.csv").write_text("name,state\ntuned,done\nlast,running\n")
    (folder / "results.csv").write_text("name,bleu\ntuned,1\n")
    assert protocol.state(folder) == protocol.ONE_SETTING
    assert [row["name"] for row in protocol.reported(other)] == ["one"]
    (other / "final.csv").write_text("name,state\ntuned,done\nlast,done\n")
    assert protocol.state(folder) == protocol.TUNED
    assert [row["name"] for row in protocol.reported(other)] == ["tuned", "last"]
    for rows in ("tuned,1\none,1\n", ""):
        (folder / "results.csv").write_text("name,bleu\n" + rows)
        assert protocol.state(folder) == protocol.ONE_SETTING


@pytest.mark.parametrize(
    "name",
    ["coatnet_layouts", "coatnet_transfer", "lohelp", "muse_kernels", "vision_comparison"],
)
def test_the_page_of_a_tuned_study_reports_the_final_runs(name, tmp_path, monkeypatch):
    made = importlib.import_module(f"experiments.{name}.make")
    folder = tmp_path / name
    folder.mkdir()
    for file in ("results.csv", "time_results.csv", "pretrain.csv"):
        if (FOLDER / name / file).exists():
            shutil.copy(FOLDER / name / file, folder)
    one_setting = study.read(folder / "results.csv")
    monkeypatch.setattr(made, "HERE", folder)
    before = made.tables(one_setting)
    assert before["changed"] == ["not run"]
    chosen = {protocol.NORM: "(True, True)", protocol.RATE: "0.004", protocol.WARMUP: "30"}
    rows = [*one_setting, *study.read(folder / "time_results.csv")]
    rows = [row for row in rows if row.get(protocol.RATE) != ""]  # transfer: those at 2e-3
    columns = dict.fromkeys(column for row in rows for column in row)
    write(folder / "final.csv", [{**dict.fromkeys(columns, ""), **row, **chosen} for row in rows])
    after = made.tables(one_setting)
    lines = [line for line in before["verdict"] if " at 5e-4" not in line]
    assert after["verdict"] == [line.replace(" at 2e-3", "") for line in lines]
    assert after["changed"][0].startswith("0 of ")
    assert all("| 0.004 | 30 |" in line for line in after["setting"][2:])
    fewer = [row for row in protocol.read(folder / "final.csv") if row["seed"] != "2"]
    write(folder / "final.csv", fewer)
    found = made.tables(one_setting)
    assert all(", 2 pairs)" in line for line in found["verdict"] if "before" not in line)
    assert found.get("one setting") == before.get("one setting")
    made.draw(one_setting)


def test_verdicts_that_changed_are_named(tmp_path):
    before = {"a against b": "better", "c against d": "worse", "gone": "worse"}
    after = {"a against b": "undecided", "c against d": "worse", "new": "better"}
    assert study.changed(tmp_path, before, after) == ["not run"]
    (tmp_path / "final.csv").write_text("name,state\na,done\n")
    count, _, *lines = study.changed(tmp_path, before, after)
    assert count.startswith("1 of 2 ")
    assert lines == ["- a against b: better, tuned undecided"]
    assert len(study.changed(tmp_path, before, before)) == 1


def test_ranked_says_what_is_certain():
    near, far = {"0": 1.0, "1": 1.1, "2": 0.9}, {"0": 3.0, "1": 3.1, "2": 2.9}
    same = {"0": 1.0, "1": 1.0, "2": 1.1}
    assert study.ranked({"a": near, "b": far, "c": same, "d": {}}) == "b > c ≈ a"
    assert (study.sign(near, far), study.sign(far, near)) == ("<", ">")
    assert study.ranked({"a": near, "b": {}}) == "not run"


def test_shifted_images_move_into_four_directions():
    shifted = importlib.import_module("experiments.beyond.measure").shifted
    image = np.zeros((5, 4, 6, 1), np.uint8)
    image[:, 1, 2] = 7
    np.testing.assert_array_equal(shifted(image, 0), image)
    found = [tuple(int(n) for n in np.argwhere(one)[0]) for one in shifted(image, 1)]
    assert found == [(2, 2, 0), (0, 2, 0), (1, 3, 0), (1, 1, 0), (2, 2, 0)]
    assert shifted(image, 2)[1].max() == 0  # over the edge, and not in again


def test_a_kernel_moves_only_if_it_depends_on_the_image():
    module = lg.create_model("coatnet", classes=2, layout="CA", depths=(1, 1), widths=(16, 16),
                             strides=(1, 2), stem=(8, 8), stem_stride=2,
                             blocks={"A": {"head_width": 8, "window": 3}})  # fmt: skip
    image = jax.random.normal(jax.random.key(0), (4, 16, 16, 1))
    variables = jax.jit(module.init)(jax.random.key(1), image)
    kernels = jax.jit(functools.partial(measure_kernels.kernels, module))
    (block, kernel), = kernels(variables, image).items()  # fmt: skip
    assert (block, kernel.shape) == ("stage2/block1", (4, 4, 4, 2, 9))
    np.testing.assert_allclose(kernel.sum(-1), 1, rtol=1e-5)
    assert (np.asarray(kernel)[:, 0, :, :, :3] == 0).all()  # beyond the upper border
    own = measure_kernels.described(np.asarray(kernel))
    assert own["moved"] > 0.01
    qkv = variables["params"]["stage2"]["block1"]["attention"]["qkv"]
    qkv["kernel"] *= 0  # only the bias of the displacement is left
    (fixed,) = kernels(variables, image).values()
    found = measure_kernels.described(np.asarray(fixed))
    assert found["moved"] < 1e-6
    assert found["effective"] == pytest.approx((4 * 9 + 8 * 6 + 4 * 4) / 16, rel=0.01)


def test_a_mosaic_has_every_kernel_at_its_position():
    rows = [
        {"row": str(i // 2), "column": str(i % 2), "kernel": " ".join(map(str, kernel))}
        for i, kernel in enumerate(np.arange(36).reshape(4, 9))
    ]  # fmt: skip
    found = beyond.mosaic(rows)
    assert found.shape == (7, 7)
    np.testing.assert_array_equal(found[4:, :3], np.arange(18, 27).reshape(3, 3))
    assert np.isnan(found[3]).all() and np.isnan(found[:, 3]).all()


def test_document_needs_its_marks():
    text = "a\n<!-- t -->\nold\n<!-- end -->\nb"
    assert study.document(text, {"t": ["new"]}) == "a\n<!-- t -->\nnew\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="no <!-- u -->"):
        study.document(text, {"u": []})
