# SPDX-License-Identifier: Apache-2.0
"""Workdirs and checkpoints: saving, reading, digests, locks, Google Cloud Storage."""
