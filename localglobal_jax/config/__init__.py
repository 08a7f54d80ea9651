# SPDX-License-Identifier: Apache-2.0
"""Configs: the schema of a run, files and overrides, validation, sweeps. Imports no jax."""
