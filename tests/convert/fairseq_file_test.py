# SPDX-License-Identifier: Apache-2.0
"""Reading .pt files. Most of it needs torch (the extra), which the suite can do without."""

import argparse
import builtins
import collections
import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest

from localglobal_jax.convert import fairseq, weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ARGS = json.loads((GOLDEN / "muse_post.json").read_text())["args"]
STATE = {
    k: np.array(v) for k, v in weights.read_safetensors(GOLDEN / "muse_post.safetensors").items()
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


class AverageMeter:
    """As fairseq's: what a checkpoint of a training run holds beside its weights."""

    def __init__(self):
        self.sum, self.count = 3.5, 2


def checkpoint(torch, monkeypatch, **changed):
    monkeypatch.setattr(AverageMeter, "__module__", "fairseq.meters")
    meters = types.SimpleNamespace(AverageMeter=AverageMeter)
    monkeypatch.setitem(sys.modules, "fairseq", types.SimpleNamespace(meters=meters))
    monkeypatch.setitem(sys.modules, "fairseq.meters", meters)
    return {
        "args": argparse.Namespace(**ARGS),
        "model": collections.OrderedDict((k, torch.tensor(v)) for k, v in STATE.items()),
        "optimizer_history": [{"criterion_name": "x", "lr_scheduler_state": {"best": 3.2}}],
        "extra_state": {"epoch": 3, "train_meters": collections.OrderedDict(loss=AverageMeter())},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        **changed,
    }


@pytest.mark.parametrize("new_format", [True, False])
def test_a_checkpoint_as_fairseq_writes_it(torch, monkeypatch, tmp_path, new_format):
    file = tmp_path / "checkpoint_best.pt"
    torch.save(checkpoint(torch, monkeypatch), file, _use_new_zipfile_serialization=new_format)
    for name in ("fairseq", "fairseq.meters"):
        monkeypatch.delitem(sys.modules, name)
    args, state = fairseq.read(file, {"dynamic_padding": 1})
    assert args == {**ARGS, "dynamic_padding": 1}
    assert state.keys() == STATE.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(array, STATE[name])
    assert fairseq.load(args, state)[0].pad_values == "zero"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(torch, monkeypatch, tmp_path, dtype):
    whole = checkpoint(torch, monkeypatch)
    half = {k: v.to(getattr(torch, dtype)) for k, v in whole["model"].items()}
    torch.save({"args": whole["args"], "model": half}, tmp_path / "half.pt")
    _, state = fairseq.read(tmp_path / "half.pt", {})
    for name, array in state.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, half[name].float())


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_else_is_unpickled(torch, monkeypatch, tmp_path):
    whole = checkpoint(torch, monkeypatch, evil=Evil(tmp_path / "harm"))
    torch.save(whole, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt holds a \w+\.mkdir, which is not loaded"):
        fairseq.read(tmp_path / "evil.pt", {})
    assert not (tmp_path / "harm").exists()


def test_files_that_are_no_checkpoints(torch, monkeypatch, tmp_path):
    file = tmp_path / "x.pt"
    whole = checkpoint(torch, monkeypatch)
    for content in (
        {"model": whole["model"], "args": {"a": 1}},
        whole["model"],
        [1],
        {"args": None},
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match="no checkpoint of fairseq"):
            fairseq.read(file, {})
    torch.save({"model": whole["model"], "args": None}, file)
    with pytest.raises(ValueError, match="holds no training arguments"):
        fairseq.read(file, {})
    assert fairseq.read(file, ARGS)[0] == ARGS
    for damage in (b"", b"\x80\x02garbage", file.read_bytes()[:999]):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            fairseq.read(file, ARGS)


def test_safetensors_need_arguments_and_no_torch():
    args, state = fairseq.read(GOLDEN / "muse_post.safetensors", ARGS)
    assert args == ARGS and state.keys() == STATE.keys()
    with pytest.raises(ValueError, match="give them"):
        fairseq.read(GOLDEN / "muse_post.safetensors", {})


@pytest.mark.parametrize("version", [None, "2.5.1", "1.13.0+cpu"])
def test_a_missing_or_unsafe_torch_is_named(monkeypatch, version):
    real = builtins.__import__

    def instead(name, *args, **kwargs):
        if name == "torch":
            if version is None:
                raise ImportError(name)
            return types.SimpleNamespace(__version__=version)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", instead)
    with pytest.raises(ValueError, match=r"pip install 'localglobal_jax\[torch\]'"):
        fairseq.read(pathlib.Path("checkpoint_best.pt"), {})
