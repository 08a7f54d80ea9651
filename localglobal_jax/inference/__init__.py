# SPDX-License-Identifier: Apache-2.0
"""Use of trained models: loading, classification, translation, decoding, Grad-CAM, BLEU."""
