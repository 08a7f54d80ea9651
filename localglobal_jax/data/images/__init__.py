# SPDX-License-Identifier: Apache-2.0
"""Image input: readers, folders, decoding, augmentation, batches."""
