# SPDX-License-Identifier: Apache-2.0
"""Text input: files, sentence pairs, tokenizers, length buckets, batches."""
