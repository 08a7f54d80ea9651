# SPDX-License-Identifier: Apache-2.0
"""Archives that TFDS unpacks while a set is prepared name nothing outside of its folder.

The writing itself needs TensorFlow; where it would go is decided by what is tested here.
"""

import io
import os
import tarfile
import zipfile

import pytest

NAMES = ("../x", "../../x", "a/../../x", "/etc/x", "./.hidden/../../x", "a/./../../x", "good.txt")


def tar(path, mode):
    with tarfile.open(path, mode) as archive:
        for name in NAMES:
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in NAMES:
            archive.writestr(name, b"evil")


@pytest.mark.parametrize("kind", ["TAR", "TAR_GZ", "TAR_GZ_STREAM", "ZIP"])
def test_no_member_lies_elsewhere(tmp_path, kind):
    from tensorflow_datasets.core.download import extractor, resource

    archive = tmp_path / "archive"
    zipped(archive) if kind == "ZIP" else tar(archive, "w:gz" if "GZ" in kind else "w")
    method = extractor._EXTRACT_METHODS[resource.ExtractMethod[kind]]
    found = []
    try:
        with archive.open("rb") as file:
            for name, _ in method(file):
                found.append(name)
    except KeyError as error:  # a link out of the archive
        assert "linkname" in str(error)
    assert all(not os.path.isabs(n) and not os.path.normpath(n).startswith("..") for n in found)
    assert found == ["good.txt"]
