# SPDX-License-Identifier: Apache-2.0
"""TFRecord shards read at random through an index, on disk and in a bucket."""

import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import types

import fsspec.config
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.record_writer import RecordWriter

from localglobal_jax.checkpoints import store
from localglobal_jax.data.tfds import gcs, ranges, tfrecord, tfrecord_index
from localglobal_jax.data.tfds.tfrecord_files import DamagedRecord, TFRecordFiles

SHARDS = [[b"", b"a" * 5000, b"bc"], [bytes(range(256)) * n for n in (40, 0, 3, 1)], [b"last"]]


def names(contents):
    return [f"set-train.tfrecord-{i:05d}-of-{len(contents):05d}" for i in range(len(contents))]


def shard(records, path):
    """The bytes of a TFRecord file, from another writer than ours."""
    path.unlink(missing_ok=True)
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


def put(folder, contents, scratch):
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in zip(names(contents), contents, strict=True):
        (folder / name).write_bytes(shard(records, scratch / "shard"))


def counts(contents):
    return dict(zip(names(contents), map(len, contents), strict=True))


def opened(folder, contents=SHARDS):
    instructions = [
        types.SimpleNamespace(filename=f"{folder}/{name}", examples_in_shard=count)
        for name, count in counts(contents).items()
    ]
    return TFRecordFiles(instructions, gcs.place(str(folder)))


def places(contents=SHARDS):
    return [(file, i) for file, records in enumerate(contents) for i in range(len(records))]


def rewrite(path, content):
    """Changes a file on disk as a bad disk does: its time of modification stays."""
    before = os.stat(path)
    pathlib.Path(path).write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tfrecord_index.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """A directory of the shards `SHARDS`, not indexed yet."""
    where = tmp_path / "disk" if request.param == "disk" else request.getfixturevalue("bucket")
    put(epath.Path(where), SHARDS, tmp_path)
    return epath.Path(where)


@pytest.fixture
def on_disk(tmp_path):
    put(tmp_path / "disk", SHARDS, tmp_path)
    return tmp_path / "disk"


def make(folder, contents=SHARDS):
    return tfrecord_index.make(str(folder), counts(contents))


# ------------------------------------------------------------------------------------- reading


def test_records_are_read_at_random(folder):
    assert make(folder) == 0
    files = opened(folder)
    wanted = np.random.default_rng(0).permutation(places() * 3).tolist()
    assert files.read(wanted) == [SHARDS[file][i] for file, i in wanted]
    copy = pickle.loads(pickle.dumps(files))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda place: copy.read([place]), wanted)
        assert [one for (one,) in found] == [SHARDS[file][i] for file, i in wanted]
    assert files.changed() is None


@settings(deadline=None, max_examples=40)
@given(
    contents=st.lists(st.lists(st.binary(max_size=90), max_size=6), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 100), st.integers(1, 40), st.integers(0, 60)),
)
def test_any_records_at_any_size_of_chunk(tmp_path_factory, contents, sizes):
    folder = tmp_path_factory.mktemp("set")
    put(folder, contents, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "CHUNK", sizes[0])
        patch.setattr(tfrecord, "PIECE", sizes[1])
        patch.setattr("localglobal_jax.data.tfds.tfrecord_files.GAP", sizes[2])
        assert make(folder, contents) == 0
        files = opened(folder, contents)
        for order in (places(contents), places(contents)[::-2]):
            assert files.read(order) == [contents[file][i] for file, i in order]


def in_child(method, files, wanted):
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context(method)
    ) as pool:
        return pool.submit(files.read, wanted).result(timeout=600)


def test_other_processes_open_the_files_themselves(on_disk):
    make(on_disk)
    files = opened(on_disk)
    assert files.read([(1, 0)]) == [SHARDS[1][0]]
    assert in_child("spawn", files, places()) == [*itertools.chain(*SHARDS)]


def test_a_forked_process_says_why_it_cannot_read(on_disk):
    """tensorstore would abort it."""
    make(on_disk)
    code = f"""
        import os, types
        from localglobal_jax.data.tfds import ranges
        directory = ranges.Directory({str(on_disk)!r})
        assert directory.read([({names(SHARDS)[2]!r}, 12, 16)]) == [b"last"]
        if (child := os.fork()) == 0:
            try:
                directory.read([({names(SHARDS)[2]!r}, 12, 16)])
            except ranges.ReadFailed as error:
                os._exit(7 if "spawn" in str(error) else 8)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.stdout == "7\n", found.stderr


# ------------------------------------------------------------------------ damaged and replaced


def test_a_damaged_record_is_counted_and_read_as_its_error(folder, tmp_path):
    path = folder / names(SHARDS)[1]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert make(folder) == 1
    assert make(folder) == 1  # nothing is read again
    first, *others = opened(folder).read([(1, 0), (1, 2), (0, 1)])
    assert isinstance(first, DamagedRecord)
    assert others == [SHARDS[1][2], SHARDS[0][1]]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_bit_that_flips_later_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("set")
    put(folder, SHARDS, folder)
    make(folder)
    path = folder / names(SHARDS)[1]
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    rewrite(path, content)
    found = opened(folder).read(places())
    different = [
        place
        for place, record in zip(places(), found, strict=True)
        if record != SHARDS[place[0]][place[1]]
    ]
    assert len(different) <= 1
    for place in different:
        assert place[0] == 1 and isinstance(found[places().index(place)], DamagedRecord)


@pytest.mark.parametrize(
    "records",
    [
        [b"x" * len(one) for one in SHARDS[1]],  # the same lengths
        [SHARDS[1][0], SHARDS[1][1], SHARDS[1][3], SHARDS[1][2]],  # the same records
        [b"", SHARDS[1][0], *SHARDS[1][2:]],
    ],
)
def test_another_file_of_the_same_size_and_time_is_noticed(on_disk, tmp_path, records):
    make(on_disk)
    path = on_disk / names(SHARDS)[1]
    rewrite(path, shard(records, tmp_path / "shard"))
    with pytest.raises(ValueError, match=f"{path}.* --index {on_disk}`"):
        opened(on_disk).read([(1, i) for i in range(4)])


@pytest.mark.parametrize("change", ["rewritten", "replaced", "cut", "deleted"])
def test_a_shard_that_changes_while_it_is_open_is_named(folder, change, tmp_path):
    make(folder)
    files = opened(folder)
    assert files.read([(1, 3)]) == [SHARDS[1][3]]
    path = folder / names(SHARDS)[1]
    content = path.read_bytes()
    if change == "deleted":
        path.unlink()
    elif change == "cut":
        path.write_bytes(content[:-100])
    else:
        records = SHARDS[1] if change == "rewritten" else [b"x" * len(one) for one in SHARDS[1]]
        path.write_bytes(shard(records, tmp_path / "shard"))
    assert str(path) in files.changed()
    if change == "rewritten":  # the bytes are those that were indexed
        assert files.read([(1, 3)]) == [SHARDS[1][3]]
    else:
        with pytest.raises(ValueError, match=f"{path}.* --index {folder}`"):
            files.read([(0, 0), (1, 3)])
    with pytest.raises(ValueError, match=path.name):
        opened(folder)


# ------------------------------------------------------------------------------------ the index


def test_without_an_index_the_command_is_named(folder):
    with pytest.raises(tfrecord_index.NoIndex, match=f"{folder} .*{tfrecord_index.NAME}"):
        opened(folder)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_damage_of_the_index_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("set")
    put(folder, SHARDS, folder)
    make(folder)
    path = folder / tfrecord_index.NAME
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.* --index {folder}`"):
        opened(folder)
    make(folder)
    assert opened(folder).read([(1, 0)]) == [SHARDS[1][0]]


@pytest.mark.parametrize("body", [b"3", b"[3]", b"[[1, 2, 3, 4, 5, -6]]", b"[" * 99999, b"\xff"])
def test_a_forged_index_is_damaged(on_disk, body):
    """Its checksum is right: anyone can compute it."""
    import google_crc32c

    rest = len(body).to_bytes(8, "little") + body
    checksum = google_crc32c.value(rest).to_bytes(4, "little")
    (on_disk / tfrecord_index.NAME).write_bytes(tfrecord_index.MAGIC + checksum + rest)
    with pytest.raises(ValueError, match=f"{on_disk / tfrecord_index.NAME} is damaged"):
        opened(on_disk)


def test_an_index_of_other_shards_is_named(folder, tmp_path):
    """Copied from a set with the same file names, or with fewer shards."""
    other = tmp_path / "other"
    put(other, [SHARDS[0], [b"x"] * 4, SHARDS[2]], tmp_path)
    make(other, [SHARDS[0], [b"x"] * 4, SHARDS[2]])
    index = folder / tfrecord_index.NAME
    index.write_bytes((other / tfrecord_index.NAME).read_bytes())
    with pytest.raises(ValueError, match=f"{index}.* --index {folder}`"):
        opened(folder)
    tfrecord_index.make(str(folder), {names(SHARDS)[0]: 3})
    with pytest.raises(ValueError, match=f"{index} .*{names(SHARDS)[1]}"):
        opened(folder)
    wrong = [[*SHARDS[0], b""], *SHARDS[1:]]
    with pytest.raises(ValueError, match=f"{index} .*{names(SHARDS)[0]}"):
        opened(folder, wrong)


def test_where_the_data_cannot_be_written_the_index_is_in_the_cache(on_disk, cache):
    blocked = tfrecord_index._partial(on_disk / tfrecord_index.NAME)
    (blocked / "directory").mkdir(parents=True)  # in the way of a file, for root too
    make(on_disk)
    assert not (on_disk / tfrecord_index.NAME).exists()
    assert len(list(cache.iterdir())) == 1
    assert opened(on_disk).read([(1, 0)]) == [SHARDS[1][0]]


# ------------------------------------------------------------------------ a bucket that fails


def test_a_bucket_that_fails_for_the_moment_is_asked_again(bucket, faults, tmp_path, monkeypatch):
    """And each request names the project that pays, where one is set."""
    put(epath.Path(bucket), SHARDS, tmp_path)
    make(bucket)
    files = opened(bucket)
    faults.clear()
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"requester_pays": "payer"})
    monkeypatch.setattr(store, "STALL", 2)
    shards = {"path": r"/set-train\.tfrecord-.*alt=media", "times": 1}
    rules = [
        faults.add("status", status=503, **shards),
        faults.add("cut", skip=1, **shards),
        faults.add("status", status=429, skip=2, **shards),
        faults.add("stall", seconds=60, skip=3, **shards),  # longer than our patience
    ]
    assert [files.read([place])[0] for place in places()] == [*itertools.chain(*SHARDS)]
    assert [rule.hits for rule in rules] == [1] * len(rules)
    asked = [path for _, path, _ in faults.requests if "/set-train.tfrecord-" in path]
    assert len(asked) >= len(places())
    assert all("userProject=payer" in path for path in asked)


def test_shards_that_may_be_listed_but_not_read_are_named_in_one_line(bucket, faults, tmp_path):
    put(epath.Path(bucket), SHARDS, tmp_path)
    make(bucket)
    faults.add("status", r"/set-train\.tfrecord-.*alt=media", status=403)
    with pytest.raises(ValueError, match=f"{bucket}/{names(SHARDS)[1]}: 403") as error:
        opened(bucket).read([(1, 0)])
    assert "\n" not in str(error.value)


def test_the_index_of_a_bucket_that_cannot_be_written_is_in_the_cache(
    bucket, faults, tmp_path, cache
):
    put(epath.Path(bucket), SHARDS, tmp_path)
    denied = faults.add("status", tfrecord_index.NAME, method="POST|PUT|DELETE", status=403)
    make(bucket)
    assert denied.hits > 0
    assert opened(bucket).read(places()) == [*itertools.chain(*SHARDS)]
    assert not (epath.Path(bucket) / tfrecord_index.NAME).exists()
    assert len(list(cache.iterdir())) == 1


# -------------------------------------------------------------------------------------- making


def test_an_index_is_made_again_only_where_shards_changed(folder, tmp_path, monkeypatch):
    make(folder)
    read = []
    scan = tfrecord_index._scan

    def watched(directory, name, *rest):
        read.append(name)
        return scan(directory, name, *rest)

    monkeypatch.setattr(tfrecord_index, "_scan", watched)
    make(folder)
    assert read == []
    path = folder / names(SHARDS)[2]
    path.write_bytes(shard([b"new"], tmp_path / "shard"))
    make(folder)
    assert read == [path.name]
    assert opened(folder).read([(2, 0), (0, 1)]) == [b"new", SHARDS[0][1]]
    path.write_bytes(path.read_bytes())  # another generation, the same bytes
    make(folder)
    in_bucket = str(folder).startswith("gs://")  # which says the checksum
    assert read == [path.name] * (1 if in_bucket else 2)
    assert opened(folder).read([(2, 0)]) == [b"new"]


def test_hosts_that_index_at_once_all_succeed(folder):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make, [folder] * 4)) == [0] * 4
    assert opened(folder).read(places()) == [*itertools.chain(*SHARDS)]
    left = {path.name for path in folder.iterdir()}
    assert left == {*names(SHARDS), tfrecord_index.NAME}


def test_a_killed_attempt_is_continued(folder, monkeypatch):
    code = f"""
        import os, signal, sys
        from localglobal_jax.data.tfds import tfrecord_index
        scan = tfrecord_index._scan
        def last_kills(directory, name, *rest):
            if name == {names(SHARDS)[-1]!r}:
                while not os.path.exists(sys.argv[1]):
                    pass
                os.kill(os.getpid(), signal.SIGKILL)
            return scan(directory, name, *rest)
        write = tfrecord_index._write
        def watched(path, shards):
            write(path, shards)
            if len(shards) == 2:
                open(sys.argv[1], "w").close()
        tfrecord_index._scan, tfrecord_index._write = last_kills, watched
        tfrecord_index.SAVE_EVERY = 0
        tfrecord_index.make({str(folder)!r}, {counts(SHARDS)!r})
    """
    mark = os.environ[tfrecord_index.CACHE_VARIABLE] + ".mark"
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), mark],
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(tfrecord_index.NoIndex):
        opened(folder)
    scan, read = tfrecord_index._scan, []

    def watched(directory, name, *rest):
        read.append(name)
        return scan(directory, name, *rest)

    monkeypatch.setattr(tfrecord_index, "_scan", watched)
    make(folder)
    assert read == names(SHARDS)[-1:]
    assert opened(folder).read(places()) == [*itertools.chain(*SHARDS)]
    left = {path.name for path in folder.iterdir()}
    assert left == {*names(SHARDS), tfrecord_index.NAME}


@pytest.mark.parametrize("damage", ["cut", "length", "fewer", "missing"])
def test_a_shard_that_cannot_be_indexed_is_named(folder, damage):
    path = folder / names(SHARDS)[1]
    content = path.read_bytes()
    wanted = counts(SHARDS)
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "length":
        path.write_bytes(b"\1" + content[1:])
    elif damage == "fewer":
        wanted[path.name] += 1
    else:
        path.unlink()
    with pytest.raises(ValueError, match=str(path)):
        tfrecord_index.make(str(folder), wanted)
    assert not (folder / tfrecord_index.NAME).exists()


def test_no_whole_shard_is_in_memory(tmp_path):
    size = 96 * 2**20
    data = bytes(size)
    header = size.to_bytes(8, "little")
    checksums = [tfrecord.masked_crc(part).to_bytes(4, "little") for part in (header, data)]
    (tmp_path / "shard").write_bytes(header + checksums[0] + data + checksums[1])
    tracemalloc.start()
    assert tfrecord_index.make(str(tmp_path), {"shard": 1}) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 3
