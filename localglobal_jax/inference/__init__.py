# SPDX-License-Identifier: Apache-2.0
"""Trained models in use: loading, classification, translation, decoding, Grad-CAM, BLEU."""
