# SPDX-License-Identifier: Apache-2.0
"""The page that `localglobal report` writes of runs, from their workdirs."""
