# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: metrics file, TensorBoard, Weights & Biases, plots, model card, HTML."""
