# SPDX-License-Identifier: Apache-2.0
"""A worker (see pairs.py): tf.data. ``python input_theirs.py LAYERS IMAGES JPEG...``

In an environment of its own with tensorflow. Decodes no more of a JPEG than its crop needs, as
big_vision and scenic do; RandAugment is Keras's. CPU seconds of the whole process.
"""

import os
import pathlib
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import tensorflow as tf

WHOLE = tf.zeros((1, 0, 4))  # no box: all of the image


def crop(data):
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(data),
        WHOLE,
        area_range=(0.08, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.image.resize(image, (224, 224), "bilinear")
    return tf.image.random_flip_left_right(tf.cast(image, tf.uint8))


def main(layers, count, *paths):
    files = [pathlib.Path(path).read_bytes() for path in paths]
    data = [files[i % len(files)] for i in range(int(count))]
    augment = keras.layers.RandAugment(num_ops=int(layers), factor=0.5) if int(layers) else None

    def change(image):
        image = crop(image)
        return augment(image) if augment else image

    pipeline = tf.data.Dataset.from_tensor_slices(data).map(change, num_parallel_calls=2).batch(64)

    def go():
        for _ in pipeline:
            pass

    go()
    print(f"ready tensorflow {tf.__version__} keras {keras.__version__}", flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        go()
        print("seconds", time.process_time() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
