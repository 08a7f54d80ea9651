# SPDX-License-Identifier: Apache-2.0
"""Training: setup, loop, step, optimizers, losses, metrics, tasks, evaluation, reporting."""
