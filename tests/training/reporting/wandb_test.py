# SPDX-License-Identifier: Apache-2.0
"""The wandb run of a workdir, offline; a missing key or package is an error at the start."""

import math
import sys
import types

import numpy as np
import pytest

from localglobal_jax.training.reporting import metrics_log, wandb


def test_wandb_is_one_run_however_often_it_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        writer = metrics_log.Writer(
            tmp_path,
            resume_step=None,
            tensorboard=False,
            wandb="p",
            config={"seed": 3, "log": {"tags": ["a", "b"], "note": "why"}},
        )
        writer.write(1, "train", {"loss": 0.5, "bad": math.nan})
        writer.show(1, {"picture": np.zeros((4, 4, 3), np.uint8), "text": "<b>&"})
        writer.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2 and all(path.stat().st_size > 0 for path in runs)
    assert {path.stem for path in runs} == {f"run-{(tmp_path / 'wandb_id').read_text()}"}


def test_wandb_gets_the_note_and_the_tags_of_a_run(tmp_path, monkeypatch):
    given = {}
    started = types.SimpleNamespace(define_metric=lambda *names, **words: None)
    fake = types.SimpleNamespace(
        init=lambda **words: given.update(words) or started, Image=None, Html=None
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for log, expected in (
        ({"tags": ("a b", "c"), "note": "why so"}, (["a b", "c"], "why so")),
        ({"tags": (), "note": ""}, ([], None)),
        ({}, ([], None)),
    ):
        wandb.WandbRun("p", tmp_path, {"log": log}, "name")
        assert (given["tags"], given["notes"]) == expected


def test_wandb_without_a_key_is_refused_and_one_that_fails_is_left_out(
    tmp_path, monkeypatch, caplog
):
    fake = types.SimpleNamespace(api=types.SimpleNamespace(api_key=None), Image=None, Html=None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="WANDB_API_KEY"):
        wandb.check("p")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.check("p")
    writer = metrics_log.Writer(tmp_path, resume_step=None, tensorboard=False, wandb="p")
    assert writer.write(1, "train", {"loss": 0.5})
    writer.close()
    assert "training without it" in caplog.text


def test_wandb_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"localglobal_jax\[wandb\]"):
        wandb.check("project")
    wandb.check(None)
