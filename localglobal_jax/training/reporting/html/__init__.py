# SPDX-License-Identifier: Apache-2.0
"""The HTML page that `localglobal report` writes from the workdirs of runs."""
