# SPDX-License-Identifier: Apache-2.0
"""``localglobal prepare``: prepares and checks a data set."""

import argparse
import json


def prepare(args: argparse.Namespace) -> None:
    from localglobal_jax.config import loading, schema, validation

    name, directory, options = args.name, args.dir, None
    if args.config:
        options = validation.check(loading.load(args.config, args.overrides)).data
        name, directory = options.name, directory or options.dir
    from localglobal_jax.data.images import folder
    from localglobal_jax.data.text import pairs
    from localglobal_jax.data.tfds import prepare as data

    if name == folder.NAME:
        counts = folder.count(directory)
    elif isinstance(options, schema.Text) and (options.files or options.mock):
        counts = pairs.count(options)
    elif args.from_tfrecord:
        counts = data.from_tfrecord(args.from_tfrecord, directory)
    elif name:
        counts = data.prepare(name, directory, source=args.source)
    else:
        raise ValueError("name a data set: --config FILE, a TFDS NAME, or --from_tfrecord DIR")
    print(json.dumps(counts) if args.json else "\n".join(f"{k}: {v}" for k, v in counts.items()))
