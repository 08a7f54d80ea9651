# SPDX-License-Identifier: Apache-2.0
"""Reads a prepared data set whose files or description are damaged or hostile."""

import json
import pathlib
from collections.abc import Callable, Iterator

import folders
import numpy as np
import run_images

Trial = tuple[str, Callable[[], str]]
FLIPS, CUTS = 40, 25
FOREIGN = ("os.system.x", "antigravity.X", "subprocess.Popen", "..x.y", "x", "", "builtins.eval",
           "tensorflow_datasets/../x.Y", "x" * 10_000)  # fmt: skip
SHARDS: tuple[dict, ...] = (
    *({"name": "../x"}, {"name": ""}, {"shardLengths": ["-5"]}, {"shardLengths": []}),
    *({"shardLengths": ["9"] * 3}, {"shardLengths": ["999999999999"]}, {"shardLengths": "x"}),
    *({"filepathTemplate": "../../{DATASET}"}, {"filepathTemplate": "{DATASET.__class__}"}),
    *({"filepathTemplate": "/etc/passwd"}, {"filepathTemplate": ""}, {"numBytes": "-1"}),
)
ABOUT: tuple[dict, ...] = (
    *({"name": "../../evil"}, {"name": 5}, {"name": ""}, {"version": "x"}, {"version": "../1.0.0"}),
    *({"splits": []}, {"splits": None}, {"splits": {}}, {"fileFormat": "tfrecord"}),
    *({"fileFormat": "evil"}, {"fileFormat": "parquet"}, {"configName": "../../evil"}),
)


def trials(scratch: pathlib.Path) -> Iterator[Trial]:
    """Yields (name, function) of every attempt."""
    clean, contents = run_images.base(scratch / "clean", 3)
    names = sorted(path.name for path in clean.iterdir() if path.suffix != ".npz")
    for name in names:
        for what, change in _damages(name, (clean / name).read_bytes()):

            def attempt(name=name, change=change):
                folder = folders.copied(clean, scratch / "dirty", contents)
                change(folder / name)
                return _outcome(scratch, clean)

            yield f"{name}: {what}", attempt


def _outcome(scratch: pathlib.Path, clean: pathlib.Path) -> str:
    options = run_images.OPTIONS[0]
    root = scratch / "dirty"
    try:
        found = folders.batches(root, clean.parent.name, **options)
    except ValueError as error:
        text = str(error)
        named = str(root) in text or f"{clean.parent.name}/1.0.0" in text
        assert named or "no TFDS data set" in text, f"does not name the set: {text}"
        raise
    folders.same_elsewhere(found, run_images.clean_batches(clean, options))
    return "works"


def _damages(name: str, data: bytes) -> Iterator[tuple[str, Callable[[pathlib.Path], object]]]:
    rng = np.random.default_rng(len(data))
    yield "deleted", lambda path: path.unlink()
    yield "a folder", lambda path: (path.unlink(), path.mkdir())
    contents = {"empty": b"", "null": b"null", "list": b"[]", "object": b"{}", "zeros": bytes(500)}
    contents |= {"brackets": b"[" * 100_000, "random": rng.bytes(500), "twice": data + data}
    contents |= {f"cut {i}": data[: int(rng.integers(len(data)))] for i in range(CUTS)}
    for i in range(FLIPS):
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
        contents[f"bit flip {i}"] = bytes(flipped)
    if name == "dataset_info.json":
        about = json.loads(data)
        for change in ABOUT:
            contents[f"{change}"] = json.dumps(about | change).encode()
        for change in SHARDS:
            split = about["splits"][0] | change
            contents[f"split {change}"] = json.dumps(about | {"splits": [split]}).encode()
    if name == "features.json":
        own = b"tensorflow_datasets.core.features.image_feature.Image"
        for foreign in FOREIGN:
            contents[f"code {foreign[:40]!r}"] = data.replace(own, foreign.encode())
    for what, content in contents.items():
        yield what, lambda path, content=content: path.write_bytes(content)
