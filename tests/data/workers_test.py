# SPDX-License-Identifier: Apache-2.0
"""Real processes make batches, die and are killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from localglobal_jax.config.schema import Images, Text
from localglobal_jax.data import loader, workers
from localglobal_jax.data.images import pipeline as images
from localglobal_jax.data.text import pipeline as text
from localglobal_jax.data.text.bucketing import Budget
from localglobal_jax.data.tfds.records import BadRecord

COUNTS = ((0, 1), (0, 3), (2, 2))  # workers, threads


def same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], strict=True)


class Facts:
    """Batches that tell about the process that makes them."""

    def __len__(self):
        return 1000

    def admit(self, index):
        raise AssertionError(index)

    def batch(self, index, draws):
        if 13 in index.tolist():
            raise ValueError("unlucky 13")
        return {
            "mask": np.ones(len(index), np.float32),
            "pid": np.array([os.getpid()]),
            "jax": np.array(["jax" in sys.modules]),
            "ignored": np.array([signal.getsignal(n) == signal.SIG_IGN for n in workers.IGNORED]),
        }


def ask(source, count, size=100):
    requests = ((np.array([n]), None) for n in range(20, 20 + size))
    return workers.answers(source, requests, count)


def ended(pid, seconds=10):
    """Whether a process ends in time; a zombie has ended."""
    for _ in range(10 * seconds):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


# ------------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("in_memory", [True, False])
def test_workers_and_threads_change_no_image(data_dir, in_memory):
    options = Images(
        dir=data_dir, in_memory=in_memory, crop="resized", flip=True, randaugment_layers=2
    )
    found = []
    for count, threads in COUNTS:
        chosen = options.model_copy(update={"threads": threads})
        source = images.open_split(chosen, "train[:100]", train=True)
        held_out = images.open_split(chosen, "test[:70]", train=False)
        train = loader.train_batches(
            source, batch_size=16, seed=3, start=2, stop=9, shard=(1, 2), workers=count
        )
        found.append([*train, *loader.eval_batches(held_out, batch_size=32, workers=count)])
    for other in found[1:]:
        same(found[0], other)


def test_workers_and_threads_change_no_sentence(tmp_path):
    options = Text(mock=True, name="lohelp_translate/en-de", buckets=3)
    source = text.open_train(options)
    held_out = text.open_eval(options, "validation", source.tokenizers, source.edges)
    found = []
    for count, threads in COUNTS:
        common = {"threads": threads, "workers": count}
        train = text.train_batches(
            source, tokens=1024, multiple=8, seed=3, start=2, stop=9, shard=(1, 2), **common
        )
        held_out_batches = text.eval_batches(held_out, budget=Budget(1024, 8), **common)
        found.append([*train, *held_out_batches])
    for other in found[1:]:
        same(found[0], other)


def test_bad_records_count_once_in_all_workers(tmp_path, make_tfds):
    image = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    examples = [(image if i > 1 else b"no image", 0) for i in range(12)]
    make_tfds(tmp_path, "photos", examples, channels=3)

    def masks(allowed, count):
        options = Images(name="photos", dir=str(tmp_path), in_memory=False, max_bad_records=allowed)
        source = images.open_split(options, "train", train=False)
        found = list(loader.eval_batches(source, batch_size=4, workers=count))
        return [*np.concatenate([batch["mask"] for batch in found]), len(source.bad)]

    assert masks(2, 2) == masks(2, 0)
    assert masks(2, 2)[-1] == 2 and sum(masks(2, 2)) == 12
    with pytest.raises(BadRecord, match=r"max_bad_records"):
        masks(1, 2)


def test_large_arrays_are_shared_and_may_be_written():
    class Copy:
        def batch(self, x):
            return {"x": x, "transposed": x.T[1:], "empty": x[:0], "text": ["a"]}

    wanted = np.arange(3_000_000).reshape(3, -1)
    memory = workers._pack(Copy().batch(wanted))
    try:
        found = workers._unpack(memory, workers.mmap.ACCESS_WRITE)
    finally:
        os.close(memory)
    np.testing.assert_array_equal(found["x"], wanted, strict=True)
    np.testing.assert_array_equal(found["transposed"], wanted.T[1:], strict=True)
    assert found["empty"].shape == (0, 1_000_000) and found["text"] == ["a"]
    assert found["x"].ctypes.data % workers.ALIGNMENT == 0
    found["x"] += 1


# ------------------------------------------------------------------------------------------- ends


def test_workers_know_no_jax_and_leave_signals_to_the_parent():
    pids = set()
    for _, batch in ask(Facts(), 2, 8):
        pids.add(int(batch["pid"][0]))
        assert not batch["jax"].any() and batch["ignored"].all()
    assert len(pids) == 2 and os.getpid() not in pids
    assert all(ended(pid) for pid in pids)


def test_an_early_end_leaves_no_process():
    asked = ask(Facts(), 2)
    pids = [int(next(asked)[1]["pid"][0]) for _ in range(2)]
    asked.close()
    assert all(ended(pid) for pid in pids)


def test_an_error_in_a_worker_is_raised_in_its_turn():
    requests = ((np.array([n]), None) for n in range(11, 20))
    asked = workers.answers(Facts(), requests, 2)
    assert len([next(asked) for _ in range(2)]) == 2
    with pytest.raises(ValueError, match="unlucky 13") as found:
        next(asked)
    assert "raise ValueError" in found.value.__notes__[0]


def test_a_killed_worker_is_one_error_at_once():
    asked = ask(Facts(), 2)
    pid = int(next(asked)[1]["pid"][0])
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(workers.WorkerDied, match=r"data\.workers.*SIGKILL"):
        list(asked)
    assert time.monotonic() - began < 100


def test_a_worker_ignores_sigterm_and_sigint():
    asked = ask(Facts(), 1)
    pid = int(next(asked)[1]["pid"][0])
    for number in workers.IGNORED:
        os.kill(pid, number)
    assert len(list(asked)) == 99


PARENT = """
import time
import numpy as np
from tests_data_workers import Facts, ask
asked = ask(Facts(), 2)
print(*[int(next(asked)[1]["pid"][0]) for _ in range(2)], flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("time.sleep(60)", -signal.SIGKILL), ("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)],
)
def test_no_worker_outlives_its_parent(tmp_path, end, code):
    (tmp_path / "tests_data_workers.py").write_text(pathlib.Path(__file__).read_text())
    script = tmp_path / "script.py"  # without `if __name__`: workers do not run it
    script.write_text(PARENT.format(end=end))
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if code == -signal.SIGKILL:
        parent.kill()
    _, errors = parent.communicate(timeout=600)
    assert parent.returncode == code
    assert all(ended(pid) for pid in pids)
    assert errors.count("Traceback") == (code == 1) and "leaked" not in errors
