# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal train`: a run, on this machine or as one of many hosts."""

import argparse
import json
import sys
import traceback


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of the command line, beside --config."""
    sub.add_argument("--workdir", required=True, metavar="DIR", help="where everything is written")
    sub.add_argument("--replay", type=int, metavar="STEP",
                     help="compute this step again and say what is wrong with it")  # fmt: skip
    sub.add_argument("--distributed", action="store_true",
                     help="one of many hosts, as Cloud TPU, Kubernetes or SLURM say")  # fmt: skip
    sub.add_argument("--coordinator", metavar="HOST:PORT", help="host 0, if nobody says")
    sub.add_argument("--hosts", type=int, metavar="N", help="how many hosts there are")
    sub.add_argument("--host", type=int, metavar="I", help="which of them this is")
    sub.add_argument("--start_timeout", type=float, default=300.0, metavar="SECONDS",
                     help="how long to wait for the other hosts")  # fmt: skip


def join(args: argparse.Namespace) -> None:
    """Joins the other hosts, if there are any."""
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
    rendezvous.start(cluster, args.start_timeout)


def run(args: argparse.Namespace) -> int:
    """Trains; the exit codes are those of `cli`."""
    from localglobal_jax.config import loading, validation

    if not args.workdir.strip():  # a shell variable that is not set
        raise ValueError("--workdir is empty: give the directory where everything is written")
    run = validation.check(loading.load(args.config, args.overrides))  # before jax takes seconds

    from localglobal_jax.parallel import multihost
    from localglobal_jax.training import divergence, loop, replay

    try:
        join(args)
        with multihost.naming_the_lost():
            if args.replay is not None:
                found = replay.replay(run, args.workdir, args.replay)
                return _replayed(found, args.json)
            results = loop.train(run, args.workdir)
    except loop.Preempted as stop:
        return _say(f"{stop}; start again to resume", 42)
    except divergence.Diverged as stop:
        return _say(str(stop), 3)
    except multihost.HostLost as stop:
        multihost.leave(_say(str(stop), 42))
    except Exception as error:
        if not multihost.joined():
            raise
        if not isinstance(error, ValueError | OSError):
            traceback.print_exc()
        multihost.leave(_say(str(error), 2 if isinstance(error, ValueError) else 1))
    if args.json and multihost.rank() == 0:
        print(json.dumps(results))
    return 0


def _replayed(found: dict, as_json: bool) -> int:
    from localglobal_jax.parallel import multihost
    from localglobal_jax.training import divergence

    if multihost.rank() == 0:  # JSON knows no NaN
        plain = {k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in found.items()}
        print(json.dumps(plain) if as_json else divergence.describe(found))
    return 0 if found["finite"] else 3


def _say(text: str, code: int) -> int:
    print(f"localglobal train: {text}", file=sys.stderr)
    return code
