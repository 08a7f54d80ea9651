# SPDX-License-Identifier: Apache-2.0
"""A workdir in a bucket of a real server."""

import csv
import functools
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import urllib.parse

import gcs_server
import jax.numpy as jnp
import numpy as np
import pytest
import small
from etils import epath

from localglobal_jax.checkpoints import digests, gcs, manager, objects, reader, steps, workdir
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, schema, validation
from localglobal_jax.launch import status
from localglobal_jax.training import evaluation, loop, setup

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "workdirs"
LOCAL = f"{tempfile.gettempdir()}/localglobal-"  # of mirrors: no message names it


def put(path, contents):
    """Writes an object as another process would: past the clients of this one, and their caches."""
    bucket, _, name = path.removeprefix("gs://").partition("/")
    where = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={urllib.parse.quote(name, '')}"
    gcs_server.request(gcs_server.url() + where, "POST", contents)


def remove(path):
    bucket, _, name = path.removeprefix("gs://").partition("/")
    where = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, '')}"
    gcs_server.request(gcs_server.url() + where, "DELETE")


def test_small_files_go_there_and_come_back(bucket):
    one = gcs.LocalMirror(bucket)
    (one.local / "metrics.jsonl").write_text("1\n")
    (one.local / "tokenizer").mkdir()
    (one.local / "tokenizer" / "joint.model").write_bytes(b"\x00")
    one.push()
    (one.local / "metrics.jsonl").write_text("1\n2\n")
    one.push()
    other = gcs.LocalMirror(bucket)
    assert other.local != one.local
    assert (other.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert (other.local / "tokenizer" / "joint.model").read_bytes() == b"\x00"
    assert str(other.checkpoints) == f"{bucket}/checkpoints"


def test_a_file_that_the_run_removes_goes_there_too(bucket):
    one = gcs.LocalMirror(bucket)
    (one.local / "diverged.json").write_text("{}")
    (one.local / "config.json").write_text("{}")
    one.push()
    two = gcs.LocalMirror(bucket)
    (two.local / "diverged.json").unlink()
    before = len(gcs_server.requests())
    two.push()
    assert len(gcs_server.requests()) - before == 1  # config.json has not changed
    assert {path.name for path in gcs.LocalMirror(bucket).local.iterdir()} == {"config.json"}


def test_a_name_that_leaves_the_folder_is_not_fetched(bucket):
    put(f"{bucket}/../../escaped", b"x")
    put(f"{bucket}/tokenizer/../../escaped", b"x")
    put(f"{bucket}/config.json", b"{}")
    local = gcs.LocalMirror(bucket).local
    assert (local / "config.json").exists() and not (local.parent / "escaped").exists()
    assert not (local / "escaped").exists()


def counted(do):
    """The result of a call, and the requests that it took."""
    before = len(gcs_server.requests())
    result = do()
    return result, gcs_server.requests()[before:]


def test_a_run_is_resumed_and_evaluated_there_in_few_requests(bucket, data_dir):
    options = {"data.dir": data_dir, "steps": "6", "log.tensorboard": "false"}
    options |= {"checkpoint.every": "2", "checkpoint.keep": "3", "log.profile": "(1, 2)"}
    source = "configs/coatnet_digits.py:size=tiny"
    config = loading.load(source, options)
    run = functools.partial(loop.train, validation.check(config), bucket, source=source)
    results, asked = counted(run)
    there = epath.Path(bucket)
    assert {"config.json", "metrics.jsonl", "model_card.md"} <= {p.name for p in there.iterdir()}
    for step in (2, 4, 6):
        of_step = [request for request in asked if f"/checkpoints/{step}" in request]
        assert len(of_step) <= 120, of_step
    assert any(name.startswith("profile/") for name in objects.sizes(there))
    others = [request for request in asked if "/checkpoints/" not in request]
    assert len(others) <= 40, others
    again, asked = counted(run)
    assert again["test"] == results["test"]  # nothing is left to do
    assert len(asked) <= 75, asked
    assert status.environment(bucket)["config"] == source
    card = (there / "model_card.md").read_text()
    assert f"| config | {source} |\n" in card and "| page | configs/README.md |\n" in card
    (step, found), asked = counted(lambda: evaluation.evaluate(bucket))
    assert step == 6 and found["test"]["loss"] == pytest.approx(results["test"]["loss"], rel=1e-6)
    assert len(asked) <= 60, asked
    other = loading.load("configs/coatnet_digits.py:size=tiny", {**options, "seed": "7"})
    with pytest.raises(ValueError, match=r"seed: 0.*7") as error:
        loop.train(validation.check(other), bucket)
    assert bucket in str(error.value) and LOCAL not in str(error.value)


def test_what_a_run_wrote_is_there_after_an_error(bucket, data_dir, capsys):
    command = ["train", "--config=configs/coatnet_digits.py:size=tiny", f"--workdir={bucket}"]
    command += [f"--config.data.dir={data_dir}", "--config.optim.learning_rate=1e30"]
    command += ["--config.optim.clip_norm=0", "--config.optim.warmup_steps=4"]
    command += ["--config.optim.name=sgd", "--config.log.every=1"]
    command += [f"--config.{field}={value}" for field, value in small.IMAGES.items()]
    assert main(command) == 3
    found = objects.sizes(epath.Path(bucket))
    assert found["diverged.json"] and found["metrics.jsonl"]
    assert any(name.startswith("tensorboard/events") for name in found)
    assert LOCAL not in "".join(capsys.readouterr())


def state_of(step):
    return {"x": jnp.arange(1000.0) + step, "half": jnp.full(9, step, jnp.bfloat16)}


def saved(bucket, *numbers, **options):
    checkpoints = manager.Checkpoints(f"{bucket}/checkpoints", schema.Checkpoints(**options))
    for step in numbers:
        checkpoints.save(step, state_of(step), metadata={"n": step}, metrics={"loss": 1 / step})
    checkpoints.close()
    return checkpoints


DAMAGE = {
    "flipped": lambda x: bytes([x[0] ^ 1, *x[1:]]),
    "truncated": lambda x: x[:-1],
    "missing": None,
}


def test_damage_to_any_object_is_found_named_and_gone_around(bucket, caplog):
    checkpoints, there = saved(bucket, 1, 2, keep=3), epath.Path(bucket) / "checkpoints" / "2"
    files = dict(objects.contents(there, objects.sizes(there)))
    assert len(files) > 10
    for name, contents in files.items():
        for kind, damage in DAMAGE.items():
            if name == steps.WRITTEN or (not contents and kind != "missing"):
                continue  # the first of the two marks is enough
            if damage:
                put(f"{there}/{name}", damage(contents))
            else:
                remove(f"{there}/{name}")
            with pytest.raises(ValueError, match=name):
                digests.check_manifest(there)
            put(f"{there}/{name}", contents)
    digests.check_manifest(there)
    (array,) = [name for name in files if name.startswith("state/ocdbt.process_0/d/")]
    put(f"{there}/{array}", DAMAGE["flipped"](files[array]))
    found = checkpoints.restore(state_of(0))
    assert (found.step, found.metadata) == (1, {"n": 1})
    assert f"{there} is damaged: {array}" in caplog.text
    assert reader.inspect(bucket, verify=True)["latest"] == 1

    before = len(gcs_server.requests())
    for step in (2, 3):  # the damaged step is moved aside
        assert checkpoints.save(step, state_of(step), metadata={})
    checkpoints.close()
    assert not any("moveTo" in asked for asked in gcs_server.requests()[before:])
    assert checkpoints.steps() == [1, 2, 3]
    assert objects.sizes(there.with_name("2.damaged")).keys() == files.keys()
    assert (checkpoints.restore(state_of(0), 2).state["x"] == state_of(2)["x"]).all()


def test_a_lost_list_of_files_is_damage_and_an_interrupted_save_is_no_step(bucket, caplog):
    saved(bucket, 1)
    there = f"{bucket}/checkpoints/1"
    remove(f"{there}/{digests.MANIFEST}")
    checkpoints = manager.Checkpoints(f"{bucket}/checkpoints", schema.Checkpoints())
    with pytest.raises(reader.CorruptCheckpoint, match=digests.MANIFEST):
        checkpoints.restore(state_of(0))
    remove(f"{there}/{steps.WRITTEN}")
    assert checkpoints.restore(state_of(0)) is None
    assert checkpoints.save(5, state_of(5), metadata={})
    checkpoints.close()
    assert {name.split("/")[0] for name in objects.sizes(epath.Path(bucket) / "checkpoints")} == {
        "5"
    }


def test_old_steps_are_deleted_marks_first_without_rights_on_the_bucket(bucket):
    _, asked = counted(lambda: saved(bucket, 1, 2, keep=1, best="-loss"))
    name = bucket.removeprefix("gs://").split("/")[0]
    assert steps.scan(epath.Path(bucket) / "checkpoints") == {2: True}
    deleted = [x.split()[1] for x in asked if "DELETE" in x and "/1/" in x and x.endswith(" 200")]
    assert [path.rpartition("/1/")[2] for path in deleted[:2]] == [*steps.MARKS]
    assert len(deleted) > 10
    assert not any(f"GET /storage/v1/b/{name} " in request for request in asked)


def test_weights_of_others_are_converted_there(bucket, tmp_path, capsys):
    golden = pathlib.Path(__file__).parents[1] / "golden" / "muse_post"
    words, arguments = tmp_path / "dict.txt", tmp_path / "args.json"
    words.write_text("".join(f"w{i} 1\n" for i in range(36)))
    arguments.write_text(json.dumps(json.loads(golden.with_suffix(".json").read_text())["args"]))
    command = ["convert", "fairseq", f"{golden}.safetensors", f"--out={bucket}", "--json"]
    command += [f"--args=@{arguments}", "--dict", str(words)]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["written"] == bucket
    assert {"tokenizer/tokenizer.json", "checkpoints/0/files.json"} <= objects.sizes(
        epath.Path(bucket)
    ).keys()
    assert reader.inspect(bucket, verify=True)["latest"] == 0
    assert main(command) == 2 and f"{bucket} holds checkpoints" in capsys.readouterr().err


def test_nothing_is_cached(bucket):
    """A report, or a host that resumes, sees what others have written since it listed a folder."""
    saved(bucket, 1)
    checkpoints = epath.Path(bucket) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["1"]
    put(f"{checkpoints}/2/{digests.MANIFEST}", b"{}")
    assert (checkpoints / "2").is_dir() and reader.steps(bucket) == [1, 2]


def test_plain_orbax_reads_the_state(bucket):
    import orbax.checkpoint as ocp

    saved(bucket, 3)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(epath.Path(bucket) / "checkpoints" / "3" / "state")
    np.testing.assert_array_equal(state["x"], state_of(3)["x"])


@pytest.fixture
def translator(bucket, tmp_path):
    """The run of a family that was saved on disk by an older version, in a bucket."""
    with tarfile.open(GOLDEN / "4f09b88" / "muse.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    files = objects.sizes(epath.Path(tmp_path / "muse"))
    objects.upload(epath.Path(bucket), tmp_path / "muse", files)
    return bucket


TRAIN = "train --workdir={} --config=configs/muse_lohelp.py:size=tiny,data=mock"
TRANSLATE = "translate --workdir={} configs/README.md"


@pytest.mark.parametrize(
    ("name", "contents", "command", "named"),
    [
        ("config.json", b"{", "evaluate --workdir={}", "{}/config.json"),
        ("config.json", None, "evaluate --workdir={}", "{} "),
        ("config.json", None, TRAIN, "{} "),
        ("tokenizer/joint.txt", b"x", TRANSLATE, "{}/tokenizer "),
        ("tokenizer/tokenizer.json", None, TRANSLATE, "{} "),
        ("metrics.jsonl", b"", "inspect {} --verify", "{}/checkpoints"),
    ],
)
def test_errors_name_the_bucket(translator, capsys, name, contents, command, named):  # noqa: PLR0917
    if contents is None:
        remove(f"{translator}/{name}")
    else:
        put(f"{translator}/{name}", contents)
    assert main(command.format(translator).split()) in (1, 2)
    said = "".join(capsys.readouterr())
    assert named.format(translator) in said and LOCAL not in said


@pytest.mark.parametrize("path", ["gs:/bucket/x", "s3://a/b", "gs://bucket"])
def test_stores_that_nobody_knows(path):
    with pytest.raises(ValueError, match=path):
        workdir.is_remote(path)


@pytest.mark.parametrize("name", ["a#1", "a?1", "a[1]", "a]", "a*"])
def test_names_that_the_clients_read_differently(name):
    with pytest.raises(ValueError, match=r"# \? \*"):
        workdir.absolute(f"gs://bucket/{name}")
    with pytest.raises(ValueError, match=r"# \? \*"):
        gcs.LocalMirror(f"gs://bucket/{name}/run")


def test_folders_of_a_bucket_have_the_names_of_those_on_a_disk(bucket, tmp_path):
    for name in ("b/x/one.txt", "a/one.txt", "one.txt"):
        put(f"{bucket}/{name}", b"1")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    for root in (bucket, tmp_path):
        assert objects.folders(epath.Path(root)) == ["a", "b"]
        assert objects.folders(epath.Path(root) / "nothing") == []


def test_status_and_collect_look_there(bucket, tmp_path, capsys):
    """Of six runs one is done, one half way."""
    sweep = ["sweep", "--config=experiments/coatnet_layouts/sweep.py:size=tiny"]
    sweep += [f"--workdir={bucket}", "--backend=xpk", "--cluster=c", "--tpu_type=v5litepod-16"]
    assert main([*sweep, "--image=i", "--dry_run", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["runs"]]
    for name, step in zip(names, (20, 10), strict=False):
        folder = epath.Path(bucket) / name
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "files.json").write_text("{}")
        (folder / "config.json").write_text("{}")
        line = {"step": step, "split": "test", "accuracy": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    table = tmp_path / "all.csv"
    assert main([*sweep, "--status", f"--collect={table}"]) == 0
    said = capsys.readouterr().out
    assert "6 runs: 1 done, 1 unfinished, 4 not started" in said and "accuracy 0.5" in said
    done, half, *_ = csv.DictReader(table.read_text().splitlines())
    assert (done["state"], done["step"]) == ("done", "20")
    assert (half["state"], half["step"]) == ("unfinished", "10")
    first = names[0]  # the same process sees what another one has written since
    put(f"{bucket}/{first}/metrics.jsonl", json.dumps(line | {"accuracy": 0.75}).encode())
    remove(f"{bucket}/{names[1]}/checkpoints/10/files.json")
    _, asked = counted(lambda: main([*sweep, "--status"]))
    assert "accuracy 0.75" in capsys.readouterr().out
    assert len(asked) <= 6 * 8, asked  # of six runs


def test_a_token_for_another_server_is_not_written_to_stderr(gcs):
    """tensorstore writes a line at its first use of one; other lines are kept."""
    code = """
        import logging, os
        from localglobal_jax.checkpoints import store
        store.prepare()
        os.write(2, b"other")
        import tensorstore
        spec = {"driver": "gcs", "bucket": "no-such-bucket", "path": "x/"}
        print(tensorstore.KvStore.open(spec).result().read("x").result().state)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("missing", "other")


def test_the_server_of_the_page_has_a_bucket_for_a_command(gcs, tmp_path):
    code = (
        "from etils import epath; from localglobal_jax.checkpoints import store; store.prepare();"
        "file = epath.Path('gs://bucket/x/y'); file.write_text('z'); print(file.read_text())"
    )
    server = pathlib.Path(__file__).parents[1] / "gcs_server.py"
    command = [sys.executable, server, sys.executable, "-c", f"{code}; raise SystemExit(3)"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "z\n"), done.stderr
    assert gcs not in done.stderr  # one of its own


def test_a_gcsfs_that_was_imported_before_does_not_ask_for_the_type_of_a_bucket():
    code = """
        import gcsfs
        from localglobal_jax.checkpoints import gcs_file_system
        print(gcsfs.GCSFileSystem in gcs_file_system.FileSystem.__mro__)
    """
    environment = {**os.environ, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


def small_run(data_dir, **given):
    texts = small.IMAGES | {"data.dir": str(data_dir), "steps": "2", "log.tensorboard": "false"}
    texts |= {"optim.warmup_steps": "0"}
    return validation.check(loading.load("configs/coatnet_digits.py:size=tiny", texts | given))


@pytest.mark.parametrize("seed", ["0", "7"])
def test_a_run_that_ended_while_another_waited_for_its_lock_is_seen(seed, bucket, data_dir):
    """Its lines are not overwritten by older ones; one with another config is refused."""
    run = small_run(data_dir, seed=seed)
    waiting = setup.prepare_setup(run, bucket)
    loop.train(small_run(data_dir), bucket)  # it ends in between
    with workdir.Lock() as lock:
        if seed == "7":
            with pytest.raises(ValueError, match="seed"):
                setup.reserve(run, waiting.task, waiting.mirror, lock)
        else:
            setup.reserve(run, waiting.task, waiting.mirror, lock)
            assert (waiting.mirror.local / "metrics.jsonl").read_text()
