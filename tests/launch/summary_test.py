# SPDX-License-Identifier: Apache-2.0
"""The table of a sweep: values in force, last and best, intervals, verdicts, formats."""

import csv
import io
import json
import os
import pathlib
import re
import shlex

import gcs_server
import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config import loading
from localglobal_jax.launch import expand, pool, status, summary

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"""
from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import chain, product

def get_config(arg=None):
    config = loading.load({str(ROOT / "configs/coatnet_digits.py")!r} + ":size=tiny,data=mock")
    config.steps = 20
    config.optim.learning_rate = 0.5
    return config

def sweep():
    rates = [{{}}, {{"optim.learning_rate": 0.25}}]
    yield from product({{"seed": range(3)}}, rates)
"""
# test accuracy at steps 10 and 20, by (seed, learning rate)
ACCURACY = {
    (0, 0.5): (0.80, 0.70), (1, 0.5): (0.60, 0.80), (2, 0.5): (0.70, 0.90),
    (0, 0.25): (0.50, 0.72), (1, 0.25): (0.50, 0.83), (2, 0.25): (0.50, 0.94),
}  # fmt: skip


@pytest.fixture
def sweep(tmp_path):
    """The command of a sweep whose six runs are done, and its runs."""
    (tmp_path / "c.py").write_text(CONFIG)
    root = tmp_path / "runs"
    runs = expand.expand(str(tmp_path / "c.py"), str(root)).runs
    for run in runs:
        make(run, *ACCURACY[run.run.seed, run.run.optim.learning_rate])
    return ["sweep", f"--config={tmp_path / 'c.py'}", f"--workdir={root}"], runs


def make(run, *accuracies, events=(0.0, 90.0)):
    folder, steps = pathlib.Path(run.workdir), run.run.steps
    metadata = folder / "checkpoints" / str(steps) / "metadata" / "metadata"
    metadata.parent.mkdir(parents=True)
    about = {"environment": {"devices": "1 x cpu (cpu), 1 host"}}
    metadata.write_text(json.dumps({"metadata": about}))
    (metadata.parents[1] / "files.json").touch()
    (folder / "config.json").write_text(loading.to_json(run.run))
    lines = [
        {"step": steps * i // len(accuracies), "split": split, **values}
        for i, accuracy in enumerate(accuracies, 1)
        for split, values in (
            ("train", {"loss": 1.0 / i, "learning_rate": 0.0, "images_per_second": 10.0}),
            ("test", {"accuracy": accuracy, "loss": 1 - accuracy, "count": 8}),
        )
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    begin, end = events
    kept = [{"event": "start", "time": begin}, {"event": "end", "code": 0, "time": end}]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))


def printed(capsys, command, *words):
    assert main([*command, "--summary", *words]) == 0
    return capsys.readouterr().out


def records(capsys, command, *words):
    return list(csv.DictReader(io.StringIO(printed(capsys, command, *words, "--format=csv"))))


def test_a_line_per_run(sweep, capsys):
    command, _ = sweep
    found = records(capsys, command, "--metric=test/accuracy")
    assert [(r["seed"], r["optim.learning_rate"]) for r in found] == [
        (str(seed), rate)
        for seed in range(3)
        for rate in ("0.5", "0.25")  # that in force
    ]
    first = found[0]
    assert (first["last test/accuracy"], first["best test/accuracy"]) == ("0.7", "0.8")
    assert (first["at step"], first["steps"], first["seconds"]) == ("10", "20/20", "90.0")
    assert first["state"] == "done" and int(first["disk"]) > 100
    best = records(capsys, command, "--metric=test/accuracy", "--sort=-best", "--top=2")
    assert [r["best test/accuracy"] for r in best] == ["0.94", "0.9"]
    lowest = records(capsys, command, "--metric=-test/loss", "--sort=best", "--top=1")
    assert float(lowest[0]["best test/loss"]) == pytest.approx(0.06)


def test_settings_with_intervals_and_verdicts(sweep, capsys):
    """Of 0.70, 0.80, 0.90: s = 0.1 and t(0.975, 2) = 4.3027, so ± 0.2484. The differences 0.02,
    0.03 and 0.04 have the interval 0.03 ± 0.0248."""
    command, _ = sweep
    words = ("--metric=test/accuracy", "--group", "seed")
    base, other = records(capsys, command, *words, "--baseline", "optim.learning_rate=0.5")
    assert (base["optim.learning_rate"], base["runs"], base["n"]) == ("0.5", "3/3", "3")
    numbers = {k: float(base[k]) for k in ("mean test/accuracy", "sd", "low", "high")}
    assert list(numbers.values()) == pytest.approx([0.8, 0.1, 0.5516, 1.0484], abs=1e-4)
    assert float(base["mean of best"]) == pytest.approx((0.8 + 0.8 + 0.9) / 3)
    assert (base["side"], other["side"], other["pairs"]) == ("baseline", "better", "3")
    difference = [float(other[k]) for k in ("difference", "diff low", "diff high")]
    assert difference == pytest.approx([0.03, 0.0052, 0.0548], abs=1e-4)
    of_loss = records(capsys, command, "--metric=test/loss", *words[1:], "--baseline",
                      "optim.learning_rate=0.25")  # fmt: skip
    assert [r["side"] for r in of_loss] == ["worse", "baseline"]


def test_a_baseline_is_named_by_value_number_or_name(sweep, capsys):
    command, runs = sweep
    for words in (["optim.learning_rate=5e-1"], ["0"], [runs[2].name], [runs[0].name, "4"]):
        found = records(capsys, command, "--group", "seed", "--baseline", *words)
        assert [g["side"] for g in found] == ["baseline", "better"], words


def test_the_last_value_may_be_no_number(sweep, capsys):
    """The value of an earlier step does not stand for it, and no mean has it."""
    command, runs = sweep
    with open(pathlib.Path(runs[0].workdir) / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "split": "test", "accuracy": "nan", "loss": "inf"}\n')
    words = ("--metric=test/accuracy", "--sort=last")
    found = records(capsys, command, *words)
    assert (found[-1]["last test/accuracy"], found[-1]["best test/accuracy"]) == ("nan", "0.8")
    base, _ = records(capsys, command, words[0], "--group", "seed")
    assert (base["runs"], base["n"]) == ("3/3", "2")
    assert float(base["mean test/accuracy"]) == pytest.approx(0.85)
    table = printed(capsys, command, "--metric=test/loss", "--format=markdown").splitlines()
    assert table[1].split("|")[5].strip() == "---:" and " inf " in table[2]


def test_a_note_makes_no_setting(tmp_path, capsys):
    text = CONFIG.replace(
        '{"seed": range(3)}', '[{"seed": s, "log.note": f"{s}"} for s in range(3)]'
    )
    (tmp_path / "c.py").write_text(text)
    command = ["sweep", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'runs'}"]
    assert [g["runs"] for g in records(capsys, command, "--group", "seed")] == ["0/3", "0/3"]
    assert [r["log.note"] for r in records(capsys, command)] == ["0", "0", "1", "1", "2", "2"]


def test_runs_that_differ_only_in_notes_all_count(sweep, capsys):
    of = summary.Metric("test/accuracy")
    values = {(0, "a"): 0.5, (0, "b"): 0.7, (1, "a"): 0.6, (1, "b"): 0.8}
    rows = [
        {
            "state": "done",
            "settings": {"seed": seed, "log.note": note},
            "extremes": {"test/accuracy": {"last": value, "max": value}},
        }
        for (seed, note), value in values.items()
    ]
    (group,) = summary.groups(rows, of, ["seed"])
    assert group["n"] == 2 and group["mean test/accuracy"] == pytest.approx(0.65)
    assert group["mean of best"] == pytest.approx(0.65)


def test_a_few_runs_of_one_seed_have_groups(sweep, capsys):
    command, _ = sweep
    found = records(capsys, command, "--only", "0-1", "--group", "seed")
    assert [(g["optim.learning_rate"], g["n"]) for g in found] == [("0.5", "1"), ("0.25", "1")]


def test_a_value_breaks_no_table():
    """LaTeX reads a "[" after the end of a line as an option of that line's end."""
    found = [{"model.depths": [1, 2], "log.note": "two\nlines"}]
    assert len(summary.shown(found, "text").splitlines()) == 2
    latex = summary.shown(found, "latex").splitlines()
    assert latex[4] == r"{[}1, 2] & two lines \\" and len(latex) == 7


def test_steps_are_sorted_as_numbers():
    found = [{"steps": f"{step}/100"} for step in (20, 100, 3)]
    assert [r["steps"] for r in summary.ordered(found, "steps", None)] == [
        "3/100",
        "20/100",
        "100/100",
    ]


def test_unfinished_and_failed_runs_are_named_and_left_out(sweep, capsys):
    command, runs = sweep
    folder = pathlib.Path(runs[1].workdir)
    (folder / "checkpoints" / "20" / "files.json").unlink()
    events = [{"event": "start", "time": 0}, {"event": "end", "code": 1, "reason": "no memory"}]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    found = records(capsys, command)
    assert found[1]["state"] == "failed" and "no memory" in found[1]["reason"]
    groups = records(capsys, command, "--group", "seed", "--baseline", runs[0].name)
    assert [(g["runs"], g["n"], g.get("pairs")) for g in groups] == [
        ("3/3", "3", ""),
        ("2/3", "2", "2"),
    ]


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "csv", "json"])
def test_formats(form, sweep, capsys):
    command, _ = sweep
    text = printed(capsys, command, "--metric=test/accuracy", f"--format={form}")
    assert text.count("0.94") == 2  # last and best
    lines = text.splitlines()
    if form == "markdown":
        assert len({line.count("|") for line in lines}) == 1 and len(lines) == 8
    elif form == "latex":
        assert lines[0].startswith(r"\begin{tabular}{rrrrr")
        assert text.count(r"\\") == 7 and r"optim.learning\_rate" in text
    elif form == "json":
        assert json.loads(text)[5]["best test/accuracy"] == 0.94
    elif form == "text":
        assert len(lines) == 7 and "1:30 min" in lines[1]


def test_the_help_of_mistakes(sweep, capsys):
    command, runs = sweep
    for words, named in (
        (("--summary", "--metric=test/acuracy"), "test/accuracy"),
        (("--summary", "--group", "sed"), '"seed"'),
        (("--summary", "--sort=bst"), "best"),
        (("--summary", "--top=0"), "--top"),
        (("--summary", "--group", "seed", "--baseline", "seed=0"), "--baseline"),
        (("--summary", "--group", "seed", "--baseline", "optim.learning_rate=9"), "0.25"),
        (("--summary", "--group", "seed", "--baseline", "c-000-0"), runs[0].name),
        (("--summary", "--group", "seed", "--baseline", "0", "seed=0"), "--baseline seed=0"),
        (("--summary", "--baseline", "seed=0"), "--group"),
        (("--sort=best",), "--summary"),
        (("--status", "--group", "seed"), "--summary"),
        (("--status", "--format=csv"), "--summary"),
        (("--collect=x.xlsx",), "in .csv .md"),
        (("--prune", "--summary"), "--summary"),
        (("--prune", "--collect=x.csv"), "--collect"),
        (("--prune", "--metric=test/loss"), "--metric"),
    ):
        assert main([*command, *words]) == 2, words
        assert named in capsys.readouterr().err
    assert all((pathlib.Path(run.workdir) / "config.json").exists() for run in runs)


def test_collect_has_the_values_in_force_and_no_decayed_rate(sweep, tmp_path, capsys):
    command, _ = sweep
    assert main([*command, f"--collect={tmp_path / 'x.csv'}"]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert [row["optim.learning_rate"] for row in rows] == ["0.5", "0.25"] * 3
    assert "train/learning_rate" not in rows[0] and rows[0]["train/last_learning_rate"] == "0.0"
    assert main([*command, f"--collect={tmp_path / 'x.md'}"]) == 0
    table = (tmp_path / "x.md").read_text().splitlines()
    assert len(table) == 8 and table[0].startswith("| name |") and table[1].startswith("| --- |")
    assert main([*command, f"--collect={tmp_path / 'x.json'}"]) == 0
    assert json.loads((tmp_path / "x.json").read_text())[1]["optim.learning_rate"] == 0.25
    capsys.readouterr()


def test_the_value_in_force_of_a_field_of_the_model(sweep):
    _, runs = sweep
    assert status.in_force(runs[0].run, "model.layout") == runs[0].run.model["layout"]
    assert status.in_force(runs[0].run, "model.head_hidden") is not None  # the module's
    assert status.in_force(runs[0].run, "optim.b1") == 0.9
    assert status.in_force(runs[0].run, "model.none") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parallel.mesh", {"data": 1}),
        ("data.class_weights", {"0": 2.0}),
        ("model.blocks", {"T": {"head_width": 8}}),
    ],
)
def test_the_value_in_force_of_a_mapping(field, value, tmp_path):
    (tmp_path / "c.py").write_text(
        f"{CONFIG}\ndef sweep_maps():\n    return [{{}}, {{{field!r}: {value!r}}}]\n"
    )
    runs = expand.expand(str(tmp_path / "c.py"), str(tmp_path / "r"), "maps").runs
    found = [status.in_force(run.run, field) for run in runs]
    assert found[1] == value != found[0]
    json.dumps(found)


def test_seconds_without_recorded_attempts(sweep, capsys):
    """As on machines that no pool watches: 20 steps at 10 images/s."""
    command, runs = sweep
    (pathlib.Path(runs[0].workdir) / "attempts.jsonl").unlink()
    found = records(capsys, command)[0]
    assert float(found["seconds"]) == pytest.approx(20 * runs[0].run.batch_size / 10)


def test_before_anything_has_started(tmp_path, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    command = ["sweep", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'runs'}"]
    found = records(capsys, command)
    assert [r["state"] for r in found] == ["not started"] * 6 and found[0]["steps"] == "0/20"
    groups = records(capsys, command, "--group", "seed")
    assert [(g["runs"], g["n"]) for g in groups] == [("0/3", "0")] * 2
    assert not (tmp_path / "runs").exists()


def page_commands(root):
    """The commands of the page's example, by their first words, and the text around them."""
    text = (ROOT / "configs/sweeps.md").read_text()
    section = text[text.index("## From a sweep to a conclusion") : text.index("## Searches")]
    blocks = re.findall(r"```sh\n(localglobal .*?)```", section, re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " "))[1:] for block in blocks]
    swap = {"runs/layouts": str(root), "layouts.html": f"{root}.html"}
    return [[swap.get(word, word) for word in words] for words in commands], section


def test_the_tables_of_the_page_have_the_columns_that_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (start, by_run, by_setting, _), section = page_commands(tmp_path / "r")
    given = dict(w.removeprefix("--config.").split("=") for w in start if w.startswith("--config."))
    for run in expand.expand(start[2], str(tmp_path / "r"), "layouts", given).runs:
        better = (run.run.model["layout"] == "CC") / 10 + run.run.optim.learning_rate
        make(run, *(better + 0.01 * run.run.seed + 0.1 * i for i in range(4)))
    assert main(by_run) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.sub(" {2,}", "  ", printed[0].strip()) in re.sub(" {2,}", "  ", section)
    assert len(printed) == 4 and printed[1].split()[:2] == ["5", "CC"]
    assert main(by_setting) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "\n".join(printed[:2]) in section and len(printed) == 6
    assert [line.split("|")[-2].strip() for line in printed[2:]] == [
        *("worse", "baseline", "worse", "worse")
    ]


@pytest.mark.slow
def test_the_example_of_the_page(tmp_path, monkeypatch, capsys):
    """From the config to the page of the sweep, in fewer steps."""
    monkeypatch.chdir(ROOT)
    commands, section = page_commands(tmp_path / "r")
    less = {
        "--config.steps=200": "--config.steps=6",
        "--config.eval.every=50": "--config.eval.every=3",
    }
    less |= {"--config.checkpoint.every=50": "--config.checkpoint.every=3"}
    for words in commands:
        assert main([less.get(word, word) for word in words]) == 0, words
    said = capsys.readouterr()
    assert "12 of 12 done, 0 failed" in said.err and "| --- | ---: |" in section
    assert said.out.count("| CC |") == said.out.count("| CT |") == 2
    assert "12 runs, 12 done" in " ".join((tmp_path / "r.html").read_text().split())


def test_in_a_bucket(sweep, gcs, tmp_path, capsys, monkeypatch):
    command, runs = sweep
    bucket = gcs_server.new_bucket(gcs)
    for key, value in gcs_server.environment(gcs).items():
        monkeypatch.setenv(key, value)
    from etils import epath

    for file in pathlib.Path(runs[0].workdir).parent.rglob("*"):
        if file.is_file() and file.name != "attempts.jsonl":
            name = file.relative_to(tmp_path / "runs").as_posix()
            epath.Path(f"gs://{bucket}/r/{name}").write_bytes(file.read_bytes())
    found = records(capsys, [*command[:2], f"--workdir=gs://{bucket}/r"], "--metric=test/accuracy")
    here = records(capsys, command, "--metric=test/accuracy")
    kept = [c for c in here[0] if c not in ("seconds", "disk")]
    assert [{c: r[c] for c in kept} for r in found] == [{c: r[c] for c in kept} for r in here]


def test_one_run_and_no_metric(tmp_path):
    row = {"settings": {}, "extremes": {}, "index": 0, "seconds": None, "devices": "", "disk": 0,
           "step": 0, "steps": 1, "state": "done", "note": ""}  # fmt: skip
    metric = summary.metric([row], None, None, "test")
    assert summary.runs([row], metric)[0]["last test/loss"] is None
    assert pool.events(tmp_path / "none") == [] and os.path.isdir(tmp_path)
