# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal prepare`: prepares a data set, checks it, and counts its examples."""

import argparse
import json

from localglobal_jax.cli import options

NAME = "prepare"
HELP = "prepare a data set, check it, print counts"
EXAMPLE = "--config configs/coatnet_digits.py"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_config(parser, required=False)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="a TFDS name, instead of --config")
    add("--dir", metavar="DIR", help="TFDS data directory, local or gs://")
    add("--source", metavar="DIR", help="files already downloaded")
    add("--from_tfrecord", metavar="DIR", help="convert a TFRecord data set")
    add("--index", metavar="DIR", help="make the index by which TFRecords are read as they are")


def run(args: argparse.Namespace) -> None:
    """Prepares the data set, and prints the number of examples in each split."""
    from localglobal_jax.config import loading, schema, validation

    _check_options(args)
    name, directory, data, layout = args.name, args.dir, None, "auto"
    if args.config:
        data = validation.check(loading.load(args.config, args.overrides)).data
        name, directory = data.name, directory or data.dir
        layout = getattr(data, "layout", layout)
    from localglobal_jax.data.images import folder, folder_count, pipeline
    from localglobal_jax.data.text import pairs
    from localglobal_jax.data.tfds import records, tfrecord_index
    from localglobal_jax.data.tfds.prepare import from_tfrecord, prepare

    own = getattr(data, "files", ()) or getattr(data, "mock", False)
    if args.source and (own or not name or name == folder.NAME or args.from_tfrecord):
        raise ValueError("--source holds the downloads of a TFDS set, and none is prepared")
    if args.dir and own:
        raise ValueError(
            "--dir holds a TFDS set or a folder of pictures, and this data has its own"
        )
    if args.from_tfrecord and (own or name == folder.NAME):
        raise ValueError("--from_tfrecord makes a TFDS set, which this data does not read")
    for option in ("dir", "from_tfrecord", "index"):
        if given := getattr(args, option):
            records.data_root(given, f"--{option}")
    if name == folder.NAME:
        upright = not isinstance(data, schema.Images) or bool(data.exif_orientation)
        asked = {data.train_split, *data.eval_splits} if data else None
        counts = folder_count.count(directory, layout, upright=upright, needed=asked)
    elif isinstance(data, schema.Text) and (data.files or data.mock):
        counts = pairs.count(data)
    elif isinstance(data, schema.Images) and data.mock:
        splits = dict.fromkeys((data.train_split, *data.eval_splits))
        counts = {name: len(pipeline.open_split(data, name, train=False)) for name in splits}
    elif args.from_tfrecord:
        counts = from_tfrecord(args.from_tfrecord, directory)
    elif args.index:
        counts = tfrecord_index.prepare(args.index)
    else:
        counts = prepare(name, directory, source=args.source)
    if data and not own and name != folder.NAME:
        builder = records.find_builder(name, records.data_root(directory))
        for split in (data.train_split, *data.eval_splits):
            records.Records(builder, split)  # raises ValueError for an unknown one
    print(json.dumps(counts) if args.json else "\n".join(f"{k}: {v}" for k, v in counts.items()))


def _check_options(args: argparse.Namespace) -> None:
    """Raises ValueError unless the options name one data set, and each of them is read."""
    ways = {"NAME": args.name, "--config": args.config, "--index": args.index}
    if not args.config:  # else its data.dir is where the converted set goes
        ways["--from_tfrecord"] = args.from_tfrecord
    given = [f"{way}={value}" for way, value in ways.items() if value]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or 'nothing'} given: name one data set, by --config FILE, a "
            "TFDS NAME, --from_tfrecord DIR or --index DIR"
        )
    if args.overrides and not args.config:
        field = next(iter(args.overrides))
        raise ValueError(f"--config.{field} needs --config FILE; a NAME has --dir DIR")
    if args.index and args.dir:
        raise ValueError("--index writes beside the TFRecords: leave --dir out")
    if args.name == "folder" and not args.dir:
        raise ValueError("prepare folder needs --dir DIR: the folder with a folder per class")
