# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal classify`: names the classes of images."""

import argparse
import hashlib
import json
import os
import pathlib
import struct
import sys
import zlib
from typing import Any

from localglobal_jax.cli import options
from localglobal_jax.launch.exit_codes import ExitCode

NAME = "classify"
HELP = "name what is in pictures"
EXAMPLE = "--workdir runs/mine PICTURES --overlay seen"

FORMATS = """\
A line per picture: PATH TAB CLASS TAB PROBABILITY, and the next best classes behind it in the same
way, so that `cut -f1,2` gives every picture and its class. Folders stand for all pictures in them
(.bmp .gif .jpeg .jpg .png .webp), sorted; URLs are file:///PATH, gs:// or, with s3fs, s3://. A tab,
a line feed or a backslash in a path or a name is shown as \\t, \\n or \\\\; --json has them as they
are, in one object. A file that is no whole picture is named on stderr with the reason, the others
are still classified, and the exit code is then 2.

Pictures are resized and normalised as in the run's evaluation, or as for the published weights;
--config.data.FIELD=VALUE changes that (image_size, mean, std, eval_crop, interpolation), and is
needed for converted weights of which it is not known. --overlay draws each picture in grey, and in
colour where the model saw its likeliest class (Grad-CAM, arXiv 1610.02391, of the last stage's
output: behind global blocks, evidence may lie elsewhere than where it was found; --overlay_stage
takes an earlier one). What is dark is cut off in evaluation. In DIR the files lie as they do below
the folder that all IMAGEs share, with .png behind their names."""
NAME_BYTES = 255
ENDING = 8  # characters of the ending of a long name that stay
# control characters, which a terminal would obey
ESCAPED = {i: f"\\x{i:02x}" for i in (*range(32), 127)}
ESCAPED |= str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_notes(parser, FORMATS)
    options.take_overrides(parser)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="of a run, or of a converted checkpoint")
    add("images", nargs="+", metavar="IMAGE", help="a file or a folder, here or in gs://BUCKET")
    add("--top", type=int, default=3, metavar="K", help="classes printed per picture; default: 3")
    add("--batch_size", type=int, default=32, metavar="N", help="pictures per batch; default: 32")
    add(
        "--overlay",
        metavar="DIR",
        help="also write PNGs in DIR that show where the model saw the class",
    )
    add(
        "--overlay_stage",
        type=int,
        metavar="N",
        help="stage of the model, from 1; default: the last",
    )
    options.add_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Classifies the images; returns 2 if some could not be read."""
    from localglobal_jax.checkpoints import workdir
    from localglobal_jax.data.images import files

    if args.overlay:
        workdir.check_local("--overlay", args.overlay, "folder")
    if args.overlay_stage is not None and not args.overlay:
        raise ValueError("--overlay_stage is for --overlay: give both, or none")
    found = files.find(args.images)
    good = [picture for picture in found if not picture.problem]
    if not good:
        raise ValueError("; ".join(f"{picture.path}: {picture.problem}" for picture in found))
    places = _places(args.overlay, good) if args.overlay else {}
    workdir.check_exists(args.workdir, workdir.without_checkpoint)
    from localglobal_jax.inference.classifier import Classified, load

    classifier = load(args.workdir, args.step, args.average, args.overrides)
    answers = classifier.classify(
        [picture.path for picture in good],
        top=args.top,
        batch_size=args.batch_size,
        overlay=bool(args.overlay),
        stage=args.overlay_stage,
    )
    if args.overlay:
        _make(pathlib.Path(args.overlay))
    sys.stdout.reconfigure(  # type: ignore[union-attr]
        encoding="utf-8", errors="surrogateescape", newline="\n"
    )
    bad, everything = 0, []
    for path, _, problem in found:
        answer = Classified(path, problem=problem) if problem else next(answers)
        if answer.problem:
            bad += 1
            name = path.translate(ESCAPED)
            print(f"localglobal classify: {name}: {answer.problem}", file=sys.stderr)
        if answer.overlay is not None:
            _write(places[path], answer.overlay)
        if args.json:
            everything.append(_described(answer, places))
        elif not answer.problem:
            print(_line(answer), flush=sys.stdout.isatty())
    if args.json:
        print(json.dumps({"images": everything}))
    return ExitCode.WRONG if bad else ExitCode.DONE


def _places(given: str, found: list[Any]) -> dict[str, pathlib.Path]:
    """Returns each picture's overlay file, below DIR. Raises ValueError if it is an input."""
    from localglobal_jax.data.images import files

    directory = pathlib.Path(given)
    paths = [picture.path for picture in found]
    names = files.below(found)
    places = {
        path: directory / _overlay_name(name) for path, name in zip(paths, names, strict=True)
    }
    inputs = {os.path.realpath(path) for path in paths}
    for place in places.values():
        if os.path.realpath(place) in inputs:
            raise ValueError(f"--overlay would overwrite the picture {place}: give another DIR")
    return places


def _overlay_name(name: str) -> str:
    """Returns the name of a picture's overlay, which a file system may hold (255 bytes)."""
    folder, last = os.path.split(name)
    whole = os.fsencode(last)
    if len(whole) + len(".png") > NAME_BYTES:
        digest = hashlib.sha256(whole).hexdigest()[:8]
        end = f"-{digest}{os.path.splitext(last)[1][:ENDING]}"
        left = NAME_BYTES - len(os.fsencode(f"{end}.png"))
        last = whole[:left].decode("utf-8", "ignore") + end
    return os.path.join(folder, f"{last}.png")


def _make(directory: pathlib.Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--overlay {directory} cannot be made: {error.strerror}") from error


def _write(place: pathlib.Path, picture: Any) -> None:
    import cv2

    from localglobal_jax.data.images import scan

    place.parent.mkdir(parents=True, exist_ok=True)
    data = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    # A chunk behind the header (33 bytes), by which a data set leaves overlays out.
    text = b"tEXt" + scan.MADE_BY
    chunk = struct.pack(">I", len(scan.MADE_BY)) + text + struct.pack(">I", zlib.crc32(text))
    place.write_bytes(data[:33] + chunk + data[33:])


def _line(answer: Any) -> str:
    fields = [answer.path]
    for guess in answer.best:
        fields += [guess.name, f"{guess.probability:.4f}"]
    return "\t".join(field.translate(ESCAPED) for field in fields)


def _described(answer: Any, places: dict[str, pathlib.Path]) -> dict[str, Any]:
    """Returns an answer as a JSON object."""
    described: dict[str, Any] = {"path": answer.path}
    if answer.problem:
        return described | {"problem": answer.problem}
    if answer.path in places:
        described["overlay"] = str(places[answer.path])
    return described | {"classes": [guess._asdict() for guess in answer.best]}
