# SPDX-License-Identifier: Apache-2.0
"""Other people's weights -> ours, one file per source. Nothing here imports torch."""
