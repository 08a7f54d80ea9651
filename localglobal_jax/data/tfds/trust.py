# SPDX-License-Identifier: Apache-2.0
"""Checks the metadata of a data set on disk before TFDS reads it.

TFDS imports the module of any class that a `FEATURES` file names, so a data set from another source
could run code; and names in it become paths, which could point anywhere.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from localglobal_jax.data.tfds import gcs

INFO = "dataset_info.json"  # TFDS's description of a prepared version
FEATURES = "features.json"
DEPTH = 3  # a set, its configs, their versions
PLAIN = re.compile(r"\w[\w.+@-]*")  # a name that is one folder or file, and no way out of it


class Damaged(ValueError):
    """A description is no JSON of the expected form."""


@contextlib.contextmanager
def trusted(folder: gcs.Place) -> Iterator[None]:
    """Context manager that checks the descriptions in `folder` before TFDS reads them.

    Whatever damage makes TFDS raise becomes a ValueError that names the folder.
    """
    for path in _described(folder):
        below = str(path)[len(str(folder)) :].split("/")
        if any(part.startswith("incomplete.") for part in below):  # a preparation writes there
            with contextlib.suppress(Damaged):
                _refuse_foreign_code(path)
            continue
        _refuse_foreign_code(path)
        if gcs.is_bucket(path):  # TFDS sends three requests, each with all retries
            with contextlib.suppress(FileNotFoundError):
                gcs.check_readable(path.parent / INFO)
    try:
        yield
    except (AssertionError, tfds.core.DatasetNotFoundError):
        raise
    except Exception as error:  # TFDS's own, protobuf's, json's: no list would be complete
        gcs.raise_failure_behind(error)
        raise ValueError(
            f"{folder} is damaged, or there is no such data set ({error}): correct the name, or "
            "prepare the data set again"
        ) from error


def _described(folder: gcs.Place) -> list[Any]:
    """Returns the files that describe features, in `folder` and its configs and versions."""
    if gcs.is_bucket(folder):
        return gcs.find(folder, FEATURES, DEPTH)
    try:
        below = ["*/" * depth + FEATURES for depth in range(DEPTH)]
        return [path for pattern in below for path in folder.glob(pattern)]
    except OSError as error:  # no path at all, such as one of a thousand letters
        raise ValueError(f"the data directory (data.dir): {error}") from error


def open_directory(folder: gcs.Place) -> tfds.core.DatasetBuilder:
    """Returns the builder of a version's folder. Raises ValueError for an unsafe one."""
    with trusted(folder):
        builder = tfds.builder_from_directory(str(folder))
        splits = list(builder.info.splits)
    named = [*builder.info.full_name.split("/"), *splits]
    if bad := [name for name in named if not PLAIN.fullmatch(name)]:
        raise ValueError(f"{folder} calls itself, or a split, {bad[0]!r}: want a plain name")
    for split in splits:
        refuse_elsewhere(builder.info.splits[split].filepaths, folder)
    return builder


def refuse_elsewhere(paths: Iterable[Any], folder: gcs.Place) -> None:
    """Raises ValueError for a file that is not in the folder of its data set."""
    for path in paths:
        if gcs.place(path).parent != folder:
            raise ValueError(
                f"the description of {folder} names the file {path}, which is elsewhere: delete "
                f"{folder} and prepare the data set again"
            )


def _refuse_foreign_code(path: gcs.Place) -> None:
    try:
        foreign = sorted(_foreign(json.loads(path.read_bytes())))
    except (OSError, ValueError, RecursionError) as error:
        gcs.raise_failure_behind(error)
        raise Damaged(
            f"{path} is damaged ({error}): delete {path.parent} and prepare the data set again"
        ) from None
    if foreign:
        raise ValueError(
            f"{path} names {foreign[0]}: only features of tensorflow_datasets are loaded. "
            "Prepare the data set with those"
        )


def _foreign(tree: Any) -> set[str]:
    """Returns the names of classes in a JSON tree that are not TFDS's."""
    if isinstance(tree, list):
        return set().union(*map(_foreign, tree))
    if not isinstance(tree, dict):
        return set()
    found = set().union(*map(_foreign, tree.values()))
    for key, value in tree.items():
        if not isinstance(value, str):
            continue
        if key in ("pythonClassName", "python_class_name", "type"):
            found |= set() if value.startswith("tensorflow_datasets.") else {value}
        elif key == "json":  # a feature's own form, once more in JSON
            found |= _foreign(json.loads(value))
    return found
