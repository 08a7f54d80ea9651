# SPDX-License-Identifier: Apache-2.0
"""What people name: files, folders, URLs, a bucket (here a file system in memory)."""

import cv2
import numpy as np
import pytest
from etils import epath

from localglobal_jax.config.schema import Images
from localglobal_jax.data.images import files, pipeline

PNG = cv2.imencode(".png", np.full((4, 6, 3), 7, np.uint8))[1].tobytes()


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path, bucket):
    """A folder with pictures in folders, here or there."""
    directory = f"{tmp_path}/p" if request.param == "disk" else bucket
    for name in ("b/2.png", "b/10.JPG", "a.webp", ".hidden.png", ".cache/3.png", "notes.txt"):
        file = epath.Path(directory) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG)
    return directory


def test_folders_are_walked_and_files_taken_as_they_are(root):
    found = files.find([root, f"{root}/notes.txt", f"{root}/gone"])
    inside = ["a.webp", "b/10.JPG", "b/2.png"]
    assert [picture.path for picture in found] == [
        f"{root}/{name}" for name in (*inside, "notes.txt", "gone")
    ]
    assert files.below(found) == [*inside, "notes.txt", "gone"]
    assert files.below(files.find([f"{root}/b/2.png"])) == ["2.png"]
    assert files.read(found[3].path, 3).shape == (4, 6, 3)  # its name does not matter
    with pytest.raises(ValueError, match=r"gone|No such file"):
        files.read(found[4].path, 3)


def test_pictures_of_a_kind_that_is_not_read_are_logged(root, caplog):
    for name in ("b/5.HEIC", "6.tiff", ".hidden.heic"):
        (epath.Path(root) / name).write_bytes(PNG)
    with caplog.at_level("WARNING"):
        found = files.find([root])
    assert [picture.path for picture in found] == [
        f"{root}/{name}" for name in ("a.webp", "b/10.JPG", "b/2.png")
    ]
    (text,) = caplog.messages
    assert "left out  2" in text and "b/5.HEIC" in text and "6.tiff" in text


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "p" / "b").mkdir(parents=True)
    (tmp_path / "p" / "b" / "c.png").write_bytes(PNG)
    (tmp_path / "p" / "loop").symlink_to(tmp_path)
    (tmp_path / "p" / "d").symlink_to(tmp_path / "p" / "b")
    (tmp_path / "a.png").unlink()
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "e.png").write_bytes(PNG)
    (tmp_path / "p" / "f").symlink_to(tmp_path / "q")
    found = [picture.path for picture in files.find([tmp_path / "p"])]
    assert found == [f"{tmp_path}/p/{name}" for name in ("b/c.png", "d/c.png", "f/e.png")]


def test_urls_of_local_paths(tmp_path):
    name = "a %20\u00e9#?.png"
    (tmp_path / name).write_bytes(PNG)
    url = (tmp_path / name).as_uri()
    assert files.locate(url) == tmp_path / name
    assert files.locate(url.replace("file://", "file://localhost")) == tmp_path / name
    assert files.locate("a:b/c.png") == epath.Path("a:b/c.png")
    for bad in ("http://x/a.png", "file://host/a.png", "file://", ""):
        (found,) = files.find([bad])
        assert found.problem


def test_names_of_classes(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
    assert pipeline.class_names(Images(name="folder", dir=str(tmp_path))) == ("cat", "dog")
    assert pipeline.class_names(Images(name="digits")) == ()  # no more than numbers
    assert pipeline.class_names(Images(name="fashion_mnist"))[:2] == ("T-shirt/top", "Trouser")
