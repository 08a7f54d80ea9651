# SPDX-License-Identifier: Apache-2.0
"""Reads every image of `pictures.py`, and other bad records, through a data set to batches."""

import pathlib
from collections.abc import Callable, Iterator

import folders
import numpy as np
import pictures
import trial

from localglobal_jax.data import loader
from localglobal_jax.data.images import readers

Trial = tuple[str, Callable[[], str]]
CHANNELS = (3, 1)
OPTIONS = [
    {"crop": crop, "in_memory": in_memory}
    for crop in ("none", "resized")
    for in_memory in (False, True)
]


def base(root: pathlib.Path, channels: int) -> tuple[pathlib.Path, list[bytes]]:
    """A clean set of photographs of several sizes.

    Made in a process of its own: threads of array_record's would not live on in later forks.
    """
    shown = pictures.picture().convert("RGB" if channels == 3 else "L")
    sizes = [(20 + 3 * i, 40 - 2 * i) for i in range(folders.SIZE)]
    files = [pictures.encode(shown.resize(size), "PNG") for size in sizes]
    examples = [{"image": data, "label": i} for i, data in enumerate(files)]
    name = f"photos{channels}"

    def build() -> str:
        folder = folders.build(root, name, folders.image_features(channels), examples)
        folders.write(folder, name, contents)  # TFDS shuffles
        for options in OPTIONS:
            found = folders.batches(root, name, **options)
            arrays = {f"{i} {key}": value for i, b in enumerate(found) for key, value in b.items()}
            np.savez(folder / file_of(options), **arrays)
        return "built"

    contents = [folders.serialized(example) for example in examples]
    built = trial.attempt(build)
    assert built.kind == "built", built
    return root / name / "1.0.0", contents


def file_of(options: dict) -> str:
    return "-".join(map(str, options.values())) + ".npz"


def clean_batches(clean: pathlib.Path, options: dict) -> list[loader.Batch]:
    found: dict[int, loader.Batch] = {}
    with np.load(clean / file_of(options)) as arrays:
        for name, value in arrays.items():
            found.setdefault(int(name.split()[0]), {})[name.split()[1]] = value
    return [found[i] for i in range(len(found))]


def trials(scratch: pathlib.Path) -> Iterator[Trial]:
    """Yields (name, function) of every attempt; each is called in a process of its own."""
    for channels in CHANNELS:
        clean, contents = base(scratch / "clean", channels)
        for i, case in enumerate(pictures.cases(channels)):
            options = OPTIONS[i % len(OPTIONS)]
            record = folders.serialized({"image": case.data, "label": 3})

            def attempt(case=case, record=record, options=options, clean=clean, contents=contents):
                kind = through(scratch, clean, contents, record, options)
                check(case, kind, 3 if clean.parent.name.endswith("3") else 1)
                return kind

            yield f"{channels} channels: {case.name}", attempt
        for i, (name, record) in enumerate(garbage(contents[folders.BAD])):
            options = OPTIONS[i % len(OPTIONS)]

            def attempt(record=record, options=options, clean=clean, contents=contents):
                kind = through(scratch, clean, contents, record, options)
                assert kind == "skipped", f"{record[:50]!r} was taken"
                return kind

            yield f"{channels} channels: record: {name}", attempt


def through(
    scratch: pathlib.Path, clean: pathlib.Path, contents: list[bytes], record: bytes, options: dict
) -> str:
    name = clean.parent.name
    bad = folders.BAD
    folders.copied(clean, scratch / "dirty", [*contents[:bad], record, *contents[bad + 1 :]])
    return folders.verdict(scratch / "dirty", name, clean_batches(clean, options), **options)


def check(case: pictures.Case, kind: str, channels: int) -> None:
    """Asserts the pixels that the case wants."""
    if case.want is None:
        assert kind == "skipped", "was taken for an image"
    elif isinstance(case.want, np.ndarray):
        assert kind == "works" or case.refusable, "a legal image was refused"
        if kind == "works":
            image = readers.decode(case.data, channels).astype(int)
            assert image.shape == case.want.shape, (image.shape, case.want.shape)
            worst = int(np.abs(image - case.want).max())
            assert worst <= case.within, f"a pixel is wrong by {worst}"


def garbage(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Returns records that are not examples of the set."""
    rng = np.random.default_rng(0)
    image = pictures.encode(pictures.picture(), "PNG")
    for label in (-1, 10, 2**40, -(2**63), 2**63 - 1, 2.7, float("inf"), float("nan"), b"3",
                  b"\xff", b"", [1, 2], [b"1", b"2"], [0.5, 1.5]):  # fmt: skip
        yield f"label {label!r}", folders.serialized({"image": image, "label": label})
    for value in (7, 1.5, [image, image], [1, 2], b""):
        shown = "two images" if value == [image, image] else repr(value)
        yield f"image {shown}", folders.serialized({"image": value, "label": 1})
    yield "no label", folders.serialized({"image": image})
    yield "no image", folders.serialized({"label": 1})
    yield "nothing", b""
    for length in (1, 10, 100, 10_000, 1_000_000):
        yield f"{length} random bytes", rng.integers(0, 256, length, np.uint8).tobytes()
    for i in range(20):
        yield f"cut ({i})", good[: int(rng.integers(1, len(good) - 30))]
