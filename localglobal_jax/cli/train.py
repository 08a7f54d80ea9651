# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal train`: trains a run, on this machine or as one of many hosts."""

import argparse
import json
import logging
import os
import sys
import traceback

from localglobal_jax.cli import options
from localglobal_jax.launch.exit_codes import ExitCode

log = logging.getLogger(__name__)
NAME = "train"
HELP = "train, or resume, a run"
EXAMPLE = "--config configs/coatnet_digits.py --workdir runs/digits"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_config(parser)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where everything is written"
    )
    parser.add_argument("--replay", type=int, metavar="STEP",
                     help="compute this step again and name what is not finite")  # fmt: skip
    parser.add_argument("--distributed", action="store_true",
                     help="one of many hosts of Cloud TPU, Kubernetes or SLURM")  # fmt: skip
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of host 0, if no cluster gives it"
    )
    parser.add_argument("--hosts", type=int, metavar="N", help="number of hosts")
    parser.add_argument("--host", type=int, metavar="I", help="index of this host")
    parser.add_argument("--start_timeout", type=float, default=300.0, metavar="SECONDS",
                     help="how long to wait for the other hosts")  # fmt: skip


def join(args: argparse.Namespace) -> None:
    """Connects to the other hosts if options name them. Raises ValueError for a part of these."""
    from localglobal_jax.parallel import rendezvous

    given = (args.coordinator, args.hosts, args.host)
    if any(x is not None for x in given):
        if args.distributed or any(x is None for x in given):
            raise ValueError("give --coordinator, --hosts and --host together, or --distributed")
        cluster = rendezvous.Cluster(*given)
    elif args.distributed:
        cluster = rendezvous.detect(args.start_timeout)
    else:
        return
    keep_native_code_off_stdout()
    rendezvous.start(cluster, args.start_timeout)


def keep_native_code_off_stdout() -> None:
    """Sends what native code prints on stdout nowhere; Python's own output stays.

    Gloo prints a line per group of hosts there, also before the JSON of ``--json``.
    """
    stdout = sys.__stdout__
    if stdout is None or sys.stdout is not stdout:  # as in a test
        return
    stdout.flush()
    ours = os.fdopen(os.dup(1), "w", buffering=1, encoding=stdout.encoding, errors=stdout.errors)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = ours


def run(args: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    from localglobal_jax.config import loading, validation

    options.check_workdir(args.workdir)
    run = validation.check(loading.load(args.config, args.overrides))  # importing jax takes seconds
    for notice in validation.notices(run, args.overrides):
        log.info("notice   %s", notice)

    from localglobal_jax.parallel import multihost
    from localglobal_jax.training import divergence, loop, replay

    try:
        join(args)
        with multihost.naming_the_lost():
            if args.replay is not None:
                found = replay.replay(run, args.workdir, args.replay)
                multihost.finished(ExitCode.DONE)
                return _replayed(found, args.json)
            results = loop.train(run, args.workdir, source=args.config)
    except loop.Preempted as stop:
        multihost.finished(ExitCode.PREEMPTED)
        return _say(f"{stop}; start again to resume", ExitCode.PREEMPTED)
    except divergence.Diverged as stop:
        multihost.finished(ExitCode.DIVERGED)
        return _say(str(stop), ExitCode.DIVERGED)
    except multihost.HostLost as stop:
        multihost.leave(_say(str(stop), ExitCode.PREEMPTED))
    except Exception as error:
        if not multihost.joined():
            raise
        if not isinstance(error, ValueError | OSError):
            traceback.print_exc()
        code = ExitCode.WRONG if isinstance(error, ValueError) else ExitCode.FAILED
        multihost.leave(_say(str(error), code))
    multihost.finished(ExitCode.DONE)
    if args.json and multihost.rank() == 0:
        print(json.dumps(results))
    return ExitCode.DONE


def _replayed(found: dict, as_json: bool) -> int:
    from localglobal_jax.parallel import multihost
    from localglobal_jax.training import divergence

    if multihost.rank() == 0:  # JSON has no NaN
        plain = {k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in found.items()}
        print(json.dumps(plain) if as_json else divergence.describe(found))
    return ExitCode.DONE if found["finite"] else ExitCode.DIVERGED


def _say(text: str, code: ExitCode) -> ExitCode:
    print(f"localglobal train: {text}", file=sys.stderr)
    return code
