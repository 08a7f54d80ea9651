# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: metrics, TensorBoard, Weights & Biases, plots, model card, HTML."""
