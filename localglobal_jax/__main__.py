# SPDX-License-Identifier: Apache-2.0
"""Runs the command line: ``python -m localglobal_jax`` is the same as ``localglobal``."""

import sys

from localglobal_jax.cli.main import console

if __name__ == "__main__":
    sys.exit(console())
