# SPDX-License-Identifier: Apache-2.0
"""The smallest models that train, as overrides of the ``size=tiny`` configs.

Compiling is most of a small run's time: use these wherever the model is not the subject.
"""

IMAGES = {  # one attention block behind the stem; for images of at most 32 pixels
    "model.layout": "T",
    "model.depths": "(1,)",
    "model.widths": "(16,)",
    "model.strides": "(1,)",
}
TEXT = {  # one layer on each side, one shape of batches, greedy translations
    "model.depths": "(1, 1)",
    "model.widths": "(16, 16)",
    "model.hidden": "(16, 16)",
    "task.beam": "1",
    "data.buckets": "1",
    "data.max_length": "16",
}
