# SPDX-License-Identifier: Apache-2.0
"""Input data: images, text, TFDS data sets, and the loader that orders their batches."""
