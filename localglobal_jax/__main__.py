# SPDX-License-Identifier: Apache-2.0
"""``python -m localglobal_jax`` is ``localglobal``."""

import sys

from localglobal_jax.cli.main import console

if __name__ == "__main__":
    sys.exit(console())
