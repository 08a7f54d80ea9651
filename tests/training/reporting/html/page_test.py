# SPDX-License-Identifier: Apache-2.0
"""The page of runs: what is on it, that it loads nothing and links to nothing that is not there,
that text stays text."""

import dataclasses
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess
import tarfile
import urllib.parse

import cv2
import jax
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax import load
from localglobal_jax.checkpoints import workdir as workdirs
from localglobal_jax.cli.main import main
from localglobal_jax.launch import expand, status
from localglobal_jax.training.reporting import provenance
from localglobal_jax.training.reporting.html import curves, gather, predictions, sweep
from localglobal_jax.training.reporting.html.facts import (
    Confusion,
    Picture,
    Run,
    Sample,
)
from localglobal_jax.training.reporting.html.page import page

CONFIGS = pathlib.Path(__file__).parents[4] / "configs"

PNG = cv2.imencode(".png", np.zeros((2, 2), np.uint8))[1].tobytes()

NASTY = [
    "<script>document.title='owned'</script>",
    "\"><img src=x onerror=document.title='owned'>",
    "' onmouseover='x",
    "</style></svg><h1>",
    "{{ 7 * 7 }}{% for %}",
    "&lt;b&gt; \u202e \x00 \ud7ff",
    "]]>--><!--",
    "javascript:alert(1)",
]

VOID = {"meta", "img"}

LOADED = {"src", "href", "action", "srcset", "data", "xlink:href", "poster", "ping", "background"}

ANYTHING = st.floats() | st.integers() | st.just(10**400) | st.text() | st.lists(st.none())


class Read(html.parser.HTMLParser):
    """Elements, attributes and text; complains of tags that do not fit."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(text, folder=None):
    """It is whole, nothing in it is fetched or executed, and every link leads to what is there.

    A link is to a section of the page or to a file; a relative one is seen from `folder`.
    """
    read = Read(text)
    assert not {"script", "link", "iframe", "object", "form", "base", "foreignobject"} & {
        *read.tags
    }
    for tag, name, value in read.attributes:
        assert not name.startswith("on") and name != "style", (tag, name, value)
        if (tag, name) == ("img", "src"):
            assert value.startswith("data:image/png;base64,"), value
        elif (tag, name) == ("a", "href"):
            url = urllib.parse.urlsplit(value)
            if value.startswith("#"):
                assert ("h2", "id", value[1:]) in read.attributes
            else:
                assert url.scheme in ("", "file") and not (url.netloc or url.query or url.fragment)
                assert pathlib.Path(folder or "/", urllib.parse.unquote(url.path)).is_file(), value
        else:  # would be loaded, or sent
            assert name not in LOADED, (tag, name, value)
    assert read.tags.count("h1") == 1
    assert all(dict_alt for tag, name, dict_alt in read.attributes if name in ("alt", "aria-label"))
    policies = [v for t, n, v in read.attributes if n == "content" and "default-src 'none'" in v]
    assert len(policies) == 1 and "unsafe" not in policies[0] and "http" not in policies[0]
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    return read


def run_of(words, **changes):
    """A run whose every text is one of `words`, in turn."""
    word = iter(words * 40)
    lines = [{"step": s, "split": next(word), "loss": 1.0 / (s + 1), words[0]: s} for s in range(3)]
    known = Run(
        name=next(word),
        workdir=next(word),
        state=next(word),
        config={
            "model": {"name": next(word)},
            "data": {"name": next(word)},
            next(word): next(word),
        },
        step=2,
        notes=[next(word)],
        metrics=[*lines, {"step": 3, "split": "train", "loss": next(word)}],
        leaves={
            f"variables/params/{words[0]}/x": {"shape": [2, 3], "dtype": "float32"},
            "optimizer/x": {"shape": [2], "dtype": "bfloat16"},
        },
        confusion=Confusion(
            next(word), "6 images", [next(word), next(word)], np.arange(4).reshape(2, 2)
        ),
        looks=[Picture(PNG, next(word), "photo")],
        samples=[Sample(next(word), next(word), next(word), Picture(PNG, next(word)))],
        environment={next(word): next(word), "config": next(word), "commit": next(word)},
        page=(next(word), pathlib.Path(__file__).as_uri()),
        attempts=[
            {"began": next(word), "start": "0", "last": "3", "lasted": "0:01", "ended": next(word)}
        ],
    )
    return dataclasses.replace(known, **changes)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("nasty", NASTY)
def test_text_stays_text(nasty, count):
    plain = check(page([run_of(["a"], name=f"a{i}") for i in range(count)], "now"))
    read = check(page([run_of([nasty], name=f"{nasty}{i}") for i in range(count)], "now"))
    assert read.tags == plain.tags  # no element more, none less
    assert "".join(read.text).count(nasty.replace("\x00", "")) >= 8 or "\x00" in nasty


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4)
)
def test_any_text_stays_text(words):
    check(page([run_of(words)], "now"))


def test_a_run_of_which_nothing_is_known():
    read = check(page([Run("a", "a", "step 0 of 3", {})], "now"))
    said = "".join(read.text)
    for missing in ("No metrics yet", "Nothing was measured", "No checkpoint yet", "Not recorded"):
        assert missing in said


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"step": st.integers(0, 2**62), "split": st.sampled_from("ab")},
            optional=dict.fromkeys(("loss", "images_per_second", "bleu_1-15"), ANYTHING),
        ),
        max_size=6,
    )
)
def test_any_numbers_make_a_page(lines):
    run = Run("a", "a", "", {}, metrics=lines)
    check(page([run, dataclasses.replace(run, name="b")], "now"))
    for chart in curves.charts([run]):
        for curve in chart.curves:
            places = [float(p) for p in re.findall(r"-?[\d.]+", curve.path)]
            assert all(0 <= x <= curves.BOX["width"] for x in places[::2]), curve.path
            assert all(0 <= y <= curves.BOX["height"] for y in places[1::2]), curve.path


def test_names_tell_runs_apart(tmp_path):
    assert gather.names(["x/a", "x/b/"]) == ["a", "b"]
    assert gather.names(["x/a", "y/a", "gs://bucket/z"]) == ["x/a", "y/a", "bucket/z"]
    assert gather.names([os.fsdecode(b"x/\xff")]) == ["?"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
    """A tiny run of digits."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    command = ["train", f"--config={CONFIGS / 'coatnet_digits.py'}:size=tiny"]
    command += [f"--workdir={directory}", f"--config.data.dir={data_dir}", "--config.steps=8"]
    command += ["--config.eval.every=4", "--config.log.every=2", "--config.checkpoint.every=4"]
    command += [f"--config.{field}={value}" for field, value in small.IMAGES.items()]
    assert main(command) == 0
    return directory


@pytest.fixture(scope="module")
def text_workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "text"
    command = ["train", f"--config={CONFIGS / 'muse_lohelp.py'}:size=tiny,data=mock"]
    command += [f"--workdir={directory}", "--config.steps=6", "--config.eval.every=0"]
    command += [f"--config.{field}={value}" for field, value in small.TEXT.items()]
    assert main(command) == 0
    return directory


def report(out, *workdirs, code=0):
    assert main(["report", *map(str, workdirs), f"--out={out}"]) == code
    return check(out.read_text(), out.parent)


def test_data_of_other_classes_is_a_note_and_no_matrix(workdir, tmp_path, monkeypatch, capsys):
    """As `evaluate` refuses them: the numbers of the classes would mean others."""

    original = workdirs.check_labels

    def as_trained_on_others(labels, metadata):
        return original(("ant", "cat"), {"labels": ["cat", "dog"]})

    monkeypatch.setattr(workdirs, "check_labels", as_trained_on_others)
    assert main(["report", str(workdir), f"--out={tmp_path / 'page.html'}", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["confusion"] is None
    assert any("the data has the classes ant, cat" in note for note in found["notes"])


def test_a_finished_run(workdir, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(workdir), f"--out={out}", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["state"] == "done" and found["step"] == 8 and found["notes"] == []
    counts = np.array(found["confusion"]["counts"])
    assert counts.sum() == 360 and found["confusion"]["classes"] == [str(i) for i in range(10)]
    # the matrix is of the very model that was evaluated
    assert np.trace(counts) / 360 == pytest.approx(found["results"]["test/accuracy"])
    params = jax.tree.leaves(load(workdir)[1]["params"])
    assert found["parameters"]["all parameters"]["numbers"] == sum(x.size for x in params)
    assert {"images_per_second", "input_wait"} <= found["speed"].keys()
    assert {"jax", "python", "devices"} <= found["environment"].keys()
    (attempt,) = found["attempts"]
    assert (attempt["start"], attempt["last"], attempt["ended"]) == ("0", "8", "at the last step")
    read = check(out.read_text())
    assert read.tags.count("img") == 3 and {"loss", "accuracy", "learning_rate"} <= {*read.text}


COMMIT = re.compile(r"[0-9a-f]{40}(-dirty)?")


def links(read):
    """The links of a page that lead out of it."""
    return [value for tag, name, value in read.attributes if name == "href" and value[0] != "#"]


def test_config_commit_and_page_of_a_run(workdir, tmp_path, monkeypatch):
    """On its own page, and in its model card. Without the page, as text alone."""
    config, commit = "configs/coatnet_digits.py:size=tiny", provenance.environment()["commit"]
    assert COMMIT.fullmatch(commit)
    recorded = status.environment(str(workdir))
    assert recorded["config"] == config and COMMIT.fullmatch(recorded["commit"])
    read = report(tmp_path / "page.html", workdir)
    page = (CONFIGS / "README.md").as_uri()
    assert links(read) == [page]
    said = "".join(read.text)
    assert f"digits: config {config}, page configs/README.md, commit {recorded['commit']}" in said
    card = (workdir / "model_card.md").read_text()
    assert f"| config | {config} |\n" in card and f"| commit | {recorded['commit']} |\n" in card
    assert f"| page | [configs/README.md]({page}) |\n" in card

    monkeypatch.setattr(provenance, "checkout", lambda: None)  # read by an installed package
    read = report(tmp_path / "page.html", workdir)
    assert links(read) == []
    assert f"digits: config {config}, commit {recorded['commit']}" in "".join(read.text)


STUDY = """
from localglobal_jax.config import loading

def get_config(arg=None):
    config = loading.load("coatnet_digits.py:size=tiny,data=mock")
    config.model.update(layout="T", depths=(1,), widths=(16,), strides=(1,))
    config.data.eval_splits = ("test[:8]",)
    config.batch_size, config.optim.warmup_steps, config.steps = 4, 1, 2
    config.checkpoint = dict(every=1, keep=2)
    config.log = dict(every=1, tensorboard=False)
    return config

def sweep():
    yield {"seed": 3}
"""


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_study_is_linked_from_the_page_of_its_runs(command, tmp_path, monkeypatch):
    """And a run goes on under another path of its config, which its page then names."""
    root, out = tmp_path / "checkout", tmp_path / "checkout" / "runs" / "page.html"
    study = root / "experiments" / "mine"
    study.mkdir(parents=True)
    (study / "sweep.py").write_text(STUDY)
    (study / "README.md").touch()
    monkeypatch.setattr(provenance, "checkout", lambda: root)
    monkeypatch.chdir(study)
    if command == "train":
        (workdir := root / "runs" / "mine").parent.mkdir()
        arguments = ["train", "--config", "sweep.py", "--workdir", str(workdir)]
    else:  # the words that every back end starts a run with
        (run,) = expand.expand("sweep.py:a", str(root / "runs" / "of")).runs
        arguments, workdir = list(run.arguments), pathlib.Path(run.workdir)
    assert main(arguments) == 0
    arg = ":a" * (command == "sweep")
    shown = workdir if command == "train" else workdir.parent
    read = report(out, shown)
    assert links(read) == ["../experiments/mine/README.md"]
    said = f"config experiments/mine/sweep.py{arg}, page experiments/mine/README.md"
    assert said in "".join(read.text)
    up = "../" * (2 if command == "train" else 3)
    assert f"({up}experiments/mine/README.md)" in (workdir / "model_card.md").read_text()
    (study / "README.md").unlink()
    read = report(out, shown)
    assert links(read) == [] and f"config experiments/mine/sweep.py{arg}" in "".join(read.text)

    if command == "train":
        shutil.rmtree(workdir / "checkpoints" / "2")
        shutil.copy(study / "sweep.py", tmp_path / "copy.py")
        assert main([*arguments[:2], "../../../copy.py", *arguments[3:]]) == 0
        assert status.environment(str(workdir))["config"] == "../../../copy.py"


def test_a_run_of_an_earlier_version_records_no_config(tmp_path):
    name = pathlib.Path(__file__).parents[3] / "golden" / "workdirs" / "4f09b88" / "coatnet.tar.gz"
    with tarfile.open(name) as archive:
        archive.extractall(tmp_path, filter="data")
    commit = status.environment(str(tmp_path / "coatnet")).get("commit", "")
    read = report(tmp_path / "page.html", tmp_path / "coatnet")
    said = "".join(read.text)
    assert links(read) == [] and "config configs" not in said
    assert commit == "" or f"coatnet: commit {commit}" in said


def test_origins_of_several_runs():
    def of(i, **environment):
        return Run(f"r{i}", "w", "done", {}, environment=environment)

    def said(*runs):
        return "".join(check(page(runs, "now")).text)

    one, two = {"config": "c.py", "commit": "1"}, {"config": "c.py", "commit": "2-dirty"}
    assert "all runs: config c.py, commit 1\n" in said(of(0, **one), of(1, **one))
    text = said(of(0, **one), of(1, **two), of(2, **one), of(3))
    assert "r0, r2: config c.py, commit 1\n" in text
    assert "r1: config c.py, commit 2-dirty\n" in text and "r3:" not in text
    assert "r0: config c.py\n" in said(of(0, config="c.py"))
    assert "r0: commit 1\n" in said(of(0, commit="1"))


def test_of_many_images_some_are_taken(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predictions, "MOST", 50)
    said = "".join(report(tmp_path / "page.html", workdir).text)
    assert "50 images of 360, evenly spread, of test" in said


def test_several_runs_of_several_kinds(workdir, text_workdir, tmp_path):
    read = report(tmp_path / "page.html", workdir, text_workdir)
    said = " ".join(read.text)
    assert "2 runs compared" in said and "0.002" in said
    assert read.tags.count("mark") > 10 and read.tags.count("img") == 3 + 2
    assert "cross-attention, mean of 1 layer and 2 heads" in said and "1-15 words" in said


@pytest.fixture(scope="module")
def root(workdir, tmp_path_factory):
    """The root of a sweep: two rates with two seeds, one more that failed, one that never began."""
    root = tmp_path_factory.mktemp("sweep") / "rates"
    config = json.loads((workdir / "config.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for number, (rate, seed, accuracy) in enumerate(
        [(2e-3, 0, 0.9), (2e-3, 1, 0.7), (8e-3, 0, 0.5), (8e-3, 1, 0.3), (8e-3, 2, None)]
    ):
        run = root / f"digits-{number:03d}-{number:08x}"
        if number == 0:
            shutil.copytree(workdir, run)
        else:
            run.mkdir(parents=True)
            (run / "checkpoints").mkdir()
        config["optim"]["learning_rate"], config["seed"] = rate, seed
        (run / "config.json").write_text(json.dumps(config))
        events = [{"event": "start", "time": 0}]
        if accuracy is not None:
            changed = [{**x, **({"accuracy": accuracy} if "accuracy" in x else {})} for x in lines]
            (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in changed))
        else:
            events.append({"event": "end", "code": 3, "reason": "NaN at step 4", "time": 9})
        (run / "attempts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        shutil.copytree(workdir / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    shutil.rmtree(root / f"digits-004-{4:08x}" / "checkpoints")
    wrong = root / f"digits-005-{5:08x}"
    wrong.mkdir()
    (wrong / "attempts.jsonl").write_text('{"event": "start", "time": 0}\n'
                                          '{"event": "end", "code": 2, "time": 1}\n')  # fmt: skip
    (wrong / "log.txt").write_text("localglobal train: there is no such data set\n")
    (root / "digits.sbatch").touch()
    (root / "notes").mkdir()
    return root


def test_a_sweep(root, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(root), f"--out={out}", "--json"]) == 0
    names = [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert names[0] == "000 learning_rate=0.002 seed=0" and len(names) == 5
    read = check(out.read_text())
    said = " ".join("".join(read.text).split())
    assert "6 runs, 4 done" in said
    # accuracies 0.9 and 0.7: 0.8 ± 12.706 * 0.1 (n = 2, sd 0.1414)
    assert re.search(r"learning_rate=0.002 ?2 ?2 ?0.8 ?0.1414 ?-0.4706 to 2.071", said), said
    assert "there is no such data set" in said and "NaN at step 4" in said
    labels = [v for t, n, v in read.attributes if n == "aria-label"]
    assert any("test/accuracy by optim.learning_rate" in label for label in labels)
    assert any("learning_rate=0.002, test" in label for label in labels)  # a group's curve
    best = [v for t, n, v in read.attributes if (t, n) == ("tr", "class") and v == "best"]
    assert len(best) == 1 and "000 best" in said
    # the matrix of the best is open; whatever the others have is behind a fold
    text = out.read_text()
    first = text.index('class="matrix')
    assert text.rfind("<details", 0, first) <= text.rfind("</details>", 0, first)


def test_a_sweep_compares_its_finished_runs():
    """Neither the best nor a chart has the value of a run that failed, is pruned or goes on."""
    runs = [
        Run(
            f"x-{i:03d}-0",
            "r",
            state,
            {"optim": {"learning_rate": 0.1 * i}, "checkpoint": {"best": "test/accuracy"}},
            metrics=[
                {"step": 1, "split": "test", "accuracy": 0.5},
                {"step": 2, "split": "test", "accuracy": last},
            ],
            reason=reason,
        )
        for i, (state, last, reason) in enumerate(
            [
                ("done", 0.6, ""),
                ("done", "nan", ""),
                ("diverged at step 2 of 9", 0.9, "exit code 3"),
                ("pruned at step 2 of 9", 0.8, ""),
                ("done", 0.4, ""),
            ]
        )
    ]
    found = sweep.gather("r/", runs, [])
    assert found.best is runs[0] and found.values[:2] == [(0.6, 0.6), (None, 0.5)]
    assert [group.last.n for group in found.groups] == [1, 0, 0, 0, 1] and found.root == "r"
    (chart,) = sweep.charts(found, runs)
    assert sum(len(curve.dots) for curve in chart.curves) == 2
    assert sweep.charts(sweep.gather("r", runs[:4], []), runs[:4]) == []  # one value
    assert sweep.gather("r", runs[2:4], []).best is runs[2]  # while none is finished


def test_notes_and_tags_are_on_the_page_of_a_run_and_of_a_sweep():
    """And a note of its own makes no run a setting of its own."""

    def noted(seed, note):
        log = {"tags": ["a b", "c"], "note": note}
        return run_of(["x"], name=f"x-{seed:03d}-0", config={"seed": seed, "log": log})

    assert "why so [a b, c]" in "".join(check(page([noted(0, "why so")], "now")).text)
    runs = [noted(0, "first"), noted(1, "second"), noted(2, "second")]
    found = sweep.gather("r", runs, [])
    said = " ".join("".join(check(page(runs, "now", found)).text).split())
    assert "000 seed=0: first [a b, c]" in said
    assert "001 seed=1, 002 seed=2: second [a b, c]" in said
    assert [len(group.runs) for group in found.groups] == [3]


def test_states_of_the_page(root, workdir, tmp_path, capsys):
    """A run that a search pruned says so; one that failed, and was finished by hand, is done."""
    for number, event in ((0, {"event": "end", "code": 1}), (1, {"event": "pruned", "step": 4})):
        run = tmp_path / f"digits-{number:03d}-{number:08x}"
        shutil.copytree(root / run.name, run)
        with open(run / "attempts.jsonl", "a") as file:
            file.write(json.dumps({**event, "time": 9}) + "\n")
    shutil.rmtree(run / "checkpoints")
    assert main(["report", str(tmp_path), f"--out={tmp_path / 'x.html'}"]) == 0
    said = capsys.readouterr().out
    assert "seed=0: done" in said and "seed=1: pruned at step 8 of 8" in said
    assert "Without a result" not in (tmp_path / "x.html").read_text()


def test_a_sweep_of_which_nothing_is_there_yet(tmp_path, capsys):
    (tmp_path / "r" / "digits-000-00000000").mkdir(parents=True)
    (tmp_path / "r" / "digits-000-00000000" / "log.txt").touch()
    assert main(["report", str(tmp_path / "r")]) == 2
    assert "digits-000-00000000" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(1e-9, 1e9), st.integers(), st.text(), st.booleans(), st.none()),
            st.sampled_from("ab"),
            st.floats(-1e9, 1e9),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_settings_make_a_chart(points):
    chart = curves.scatter("x", [(*point, "label") for point in points])
    for curve in chart.curves:
        for x, y, _ in curve.dots:
            assert 0 <= x <= curves.BOX["width"] and 0 <= y <= curves.BOX["height"]


def test_a_step_can_be_chosen(workdir, tmp_path, capsys):
    out = tmp_path / "page.html"
    for step, wanted in (("4", 4), ("best", None)):
        assert main(["report", str(workdir), f"--out={out}", f"--step={step}", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["runs"]
        assert found["step"] in ((4, 8) if wanted is None else (wanted,))
        assert found["state"] == "done"
    assert main(["report", str(workdir), "--step=5"]) == 2
    assert "no checkpoint of step 5" in capsys.readouterr().err


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(workdir, tmp_path):
    return pathlib.Path(shutil.copytree(workdir, tmp_path / "<b>run\n'\""))


def test_before_the_first_checkpoint(copied, tmp_path):
    shutil.rmtree(copied / "checkpoints")
    said = "".join(report(tmp_path / "page.html", copied).text)
    assert "step 8 of 8" in said and "No checkpoint yet" in said and "no checkpoint in" in said
    for name in ("metrics.jsonl", "model_card.md"):
        (copied / name).unlink()
    shutil.rmtree(copied / "tensorboard")
    said = "".join(report(tmp_path / "page.html", copied).text)
    assert "step 0 of 8" in said and "No metrics yet" in said


def test_damage_is_named(copied, tmp_path):
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    (copied / "metrics.jsonl").write_text(
        "\n".join([*lines[:2], '{"step": 3, "spl', "[]", *lines[2:], '{"step": -1, "split": "a"}'])
    )
    (copied / "diverged.json").write_text('{"step": 7}')
    for file in (copied / "checkpoints").glob("8/state/d/*"):
        file.write_bytes(b"x")
    for file in (copied / "tensorboard").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    said = "".join(report(tmp_path / "page.html", copied).text)
    assert f"damaged or half-written: line 3, 4, {len(lines) + 3}" in said
    assert "diverged at step 7 of 8" in said and "step 4" in said
    (copied / "diverged.json").unlink()
    assert "step 8 of 8, saved at step 4" in "".join(report(tmp_path / "page.html", copied).text)


def test_data_that_is_not_here(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["data"]["dir"] = str(tmp_path / "empty")
    (copied / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").write_text("a file")
    said = "".join(report(tmp_path / "page.html", copied).text)
    assert "Examples of digits/test:" in said and "all parameters" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["RUN/checkpoints"], "is not a workdir"),
        (["RUN", "RUN/"], "give every workdir once"),
        (["RUN", "--out=nowhere/page.html"], "a directory that can be written"),
        (["RUN", "--out=/dev/null"], "give a file"),
        (["RUN", "--out=."], "give a file"),
        (["RUN", "--step=last"], 'give a number, or "best"'),
        (["gs://bucket"], "gs://bucket/runs/one"),
        (["RUN", "--config.steps=3"], "report takes no --config.steps"),
    ],
)
def test_refused(workdir, options, message, capsys, inside):
    assert main(["report", *(option.replace("RUN", str(workdir)) for option in options)]) == 2
    assert message in capsys.readouterr().err
    assert not list(inside.iterdir())


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_in_a_browser(workdir, text_workdir, tmp_path, scheme):
    """It draws something, breaks its own policy nowhere, and runs nothing of what people wrote."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH")
    out, picture = tmp_path / "page.html", tmp_path / "page.png"
    report(out, workdir, text_workdir)
    nasty = tmp_path / "nasty.html"
    nasty.write_text(page([run_of(NASTY)], "now"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [
        f"--user-data-dir={tmp_path}/profile",
        f"--blink-settings=preferredColorScheme={scheme}",
    ]

    def browse(file, *options):
        done = subprocess.run(
            [*command, *options, file.as_uri()], capture_output=True, timeout=600, check=True
        )
        assert b":CONSOLE" not in done.stderr, done.stderr  # where breaches of the policy are told
        return done.stdout.decode()

    browse(out, f"--screenshot={picture}", "--window-size=1280,4000")
    pixels = cv2.imread(str(picture))
    back = pixels[2, 2].astype(int)
    assert pixels.shape == (4000, 1280, 3) and (
        back.max() < 60 if scheme == 0 else back.min() > 250
    )
    drawn = np.abs(pixels.astype(int) - back).max(-1) > 40
    assert 0.03 < drawn.mean() < 0.6
    assert "<title>owned" not in browse(nasty, "--dump-dom")
