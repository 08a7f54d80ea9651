# SPDX-License-Identifier: Apache-2.0
"""Training: setup, the loop, the step, optimizers, tasks, evaluation, reporting."""
