# SPDX-License-Identifier: Apache-2.0
"""Cost of a run's real step: compiled for absent devices, measured on present ones."""
