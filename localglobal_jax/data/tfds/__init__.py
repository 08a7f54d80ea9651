# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets without TensorFlow: preparation, records, trust in descriptions."""
