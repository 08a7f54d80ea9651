# SPDX-License-Identifier: Apache-2.0
"""Which paths are on an object store."""

import os
import re


def is_remote(directory: str | os.PathLike[str]) -> bool:
    """``gs://bucket/run`` is, ``runs/gs`` is not; ValueError for stores that nobody knows."""
    if not re.match(r"\w+:/", os.fspath(directory)):
        return False
    if not re.match(r"gs://[^/]+/.", os.fspath(directory)):
        raise ValueError(f"{directory}: want a local directory, or gs://BUCKET/PATH")
    return True
