# SPDX-License-Identifier: Apache-2.0
"""Files and folders as people have them, on a real disk and in a bucket."""

import json
import os
import pathlib
import shutil
import tempfile

import pytest
from etils import epath

from localglobal_jax.checkpoints import digests
from localglobal_jax.data.images import scan


def fill(root, *names, data=b"x"):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def left_out(root):
    found = {}
    for reason, name in scan.scan(root).left_out:
        found.setdefault(reason, []).append(name)
    return found


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    if request.param == "disk":
        return tmp_path
    return epath.Path(request.getfixturevalue("bucket"))


def test_hidden_folders_at_any_depth(root):
    fill(root, "cat/1.jpg", "cat/.ipynb_checkpoints/1.jpg", "cat/a/.b/c/1.jpg", "cat/._1.jpg")
    fill(root, "__MACOSX/cat/1.jpg", "cat/@eaDir/1.jpg/SMALL.jpg", "cat/Thumbs.db", ".git/x.png")
    found = scan.scan(root)
    assert found.pictures == ["cat/1.jpg"]
    assert left_out(root) == {
        scan.HIDDEN: [
            *(".git", "__MACOSX", "cat/._1.jpg", "cat/.ipynb_checkpoints", "cat/@eaDir"),
            *("cat/Thumbs.db", "cat/a/.b"),
        ]
    }
    assert found.folders == ["cat", "cat/a"]
    assert bool(found.marks) == scan.gcs.is_bucket(root)


def test_endings(root):
    names = ["a.JPG", "b.Jpeg", "c.PnG", "d (1).webp", "-e.gif", "f.g.bmp"]
    fill(root, *(f"cat/{name}" for name in names))
    fill(root, "cat/a.HEIC", "cat/a.AAE", "cat/a.MOV", "cat/jpg", "cat/b.tiff")
    assert scan.scan(root).pictures == sorted(f"cat/{name}" for name in names)
    assert left_out(root) == {
        scan.KIND: ["cat/a.HEIC", "cat/b.tiff"],
        scan.OTHER: ["cat/a.AAE", "cat/a.MOV", "cat/jpg"],
    }


def test_pictures_are_sorted_by_the_parts_of_their_names(root):
    fill(root, "a-b/1.png", "a/b.png", "a/b/1.png", "a/B.png")
    names = scan.scan(root).pictures
    assert names == sorted(names, key=lambda name: pathlib.PurePosixPath(name).parts)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "{}", "checkpoints/3/files.json": "{}"},
        {"config.json": "{}", "metrics.jsonl": ""},
        {"config.json": json.dumps({"task": 1, "model": 2, "data": 3})},
        {f"checkpoints/0/{digests.MANIFEST}": "{}"},
        {"config.json": json.dumps({"library_name": "localglobal_jax", "step": 3})},  # an export
    ],
)
@pytest.mark.parametrize("place", ["mine", "runs/mine", "cat/a/mine"])
def test_workdirs_are_left_out(root, place, files):
    fill(root, "cat/1.jpg", "cat/a/2.jpg", f"{place}/learning_curve.png", f"{place}/x/1.jpg")
    for name, text in files.items():
        fill(root, f"{place}/{name}", data=text.encode())
    assert scan.scan(root).pictures == ["cat/1.jpg", "cat/a/2.jpg"]
    assert left_out(root) == {scan.RUN: [place]}


def test_other_configs_are_no_workdirs(root):
    fill(root, "cat/1.jpg", "cat/config.json", "dog/2.jpg", "dog/checkpoints/3.jpg")
    fill(root, "eel/4.jpg", "eel/config.json", data=b'{"model": 1}')
    names = ["cat/1.jpg", "dog/2.jpg", "dog/checkpoints/3.jpg", "eel/4.jpg"]
    assert scan.scan(root).pictures == names


# ------------------------------------------------------------------------------------- links


def test_links_are_followed_once(tmp_path):
    root, elsewhere = tmp_path / "p", tmp_path / "elsewhere"
    fill(elsewhere, "1.jpg", "deep/2.jpg")
    fill(root, "cat/z/3.jpg", "dog/4.jpg")
    (root / "cat" / "camera").symlink_to(elsewhere)
    (root / "cat" / "again").symlink_to(elsewhere / "deep")  # before "camera", thus the one taken
    (root / "cat" / "a_link").symlink_to("z")  # the folder itself goes before its links
    (root / "cat" / "5.jpg").symlink_to(elsewhere / "1.jpg")
    (root / "eel").symlink_to(elsewhere)  # another class: below each, once
    assert scan.scan(root).pictures == [
        *("cat/5.jpg", "cat/again/2.jpg", "cat/camera/1.jpg", "cat/z/3.jpg", "dog/4.jpg"),
        *("eel/1.jpg", "eel/deep/2.jpg"),
    ]
    assert left_out(root) == {scan.LINKED: ["cat/a_link", "cat/camera/deep"]}


def test_loops_broken_links_and_pipes_are_named(tmp_path):
    root = tmp_path / "p"
    fill(root, "cat/1.jpg", "cat/a/2.jpg")
    for name, target in {
        "cat/self.jpg": "self.jpg",
        "cat/gone.jpg": "nothing",
        "cat/loop": ".",
        "cat/a/up": "../..",
        "cat/a/all": "/",
        "top": "..",
    }.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "cat" / "pipe.jpg")
    assert scan.scan(root).pictures == ["cat/1.jpg", "cat/a/2.jpg"]
    assert left_out(root) == {
        scan.BROKEN: ["cat/gone.jpg", "cat/self.jpg"],
        scan.LINKED: ["cat/a/all", "cat/a/up", "cat/loop", "top"],
        scan.OTHER: ["cat/pipe.jpg"],
    }


@pytest.fixture
def as_nobody():
    """Runs the test without root's permission to read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user may reach; pytest's own ones only their owner may."""
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_folders_without_permission(open_folder, request):
    fill(open_folder, "cat/1.jpg", "cat/locked/2.jpg", "dog/3.jpg")
    (open_folder / "cat" / "locked").chmod(0)
    (open_folder / "dog").chmod(0)
    request.getfixturevalue("as_nobody")
    assert scan.scan(open_folder).pictures == ["cat/1.jpg"]
    assert left_out(open_folder) == {scan.UNREADABLE: ["cat/locked", "dog"]}


# ------------------------------------------------------------------------------------- names


def test_names_in_any_bytes(tmp_path):
    names = [
        *(
            b"caf\xe9.jpg",
            b"a\nb.jpg",
            b" .jpg",
            b"-rf.jpg",
            b"\xf0\x9f\x90\x88.jpg",
            b"\x1b[31m.jpg",
        ),
        *("caf\u00e9.jpg".encode(), "cafe\u0301.jpg".encode(), b"x" * 251 + b".jpg", b"\\.jpg"),
    ]
    (tmp_path / "cat").mkdir()
    for name in names:
        (pathlib.Path(os.fsdecode(bytes(tmp_path / "cat") + b"/" + name))).write_bytes(b"x")
    found = scan.scan(tmp_path).pictures
    assert {os.fsencode(name) for name in found} == {b"cat/" + name for name in names}
    shown = [scan.readable(name) for name in found]
    assert len(set(shown)) == len(names)
    assert all(text.isprintable() for text in shown)
    assert "cat/caf\\xe9.jpg" in shown and "cat/a\\nb.jpg" in shown
    assert "cat/\U0001f408.jpg" in shown and "cat/caf\u00e9.jpg" in shown


def test_folders_deeper_than_a_path_may_be_long(tmp_path):
    fill(tmp_path, "cat/1.jpg")
    here = os.getcwd()
    os.chdir(tmp_path / "cat")
    try:
        for _ in range(20):  # 20 * 251 characters; PATH_MAX is 4096
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
    finally:
        os.chdir(here)
    assert scan.scan(tmp_path).pictures == ["cat/1.jpg"]
    assert len(left_out(tmp_path)[scan.UNREADABLE]) == 1
    shutil.rmtree(tmp_path / "cat")
