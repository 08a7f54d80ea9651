# SPDX-License-Identifier: Apache-2.0
"""CoAtNet on Fashion-MNIST: 60,000 small photographs of clothes, on a laptop.

    localglobal prepare --config configs/coatnet_fashion_mnist.py
    localglobal train --config configs/coatnet_fashion_mnist.py --workdir runs/fashion_mnist

Expect at least 91 % on the test set, within twenty minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from localglobal_jax.config.loading import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, size=("demo", "tiny"), data=("real", "mock"))
    config = ConfigDict()
    config.steps = 3300  # seven epochs
    config.batch_size = 128  # images

    # 28x28 pixels: the stem halves them, convolution sees 14x14, attention 7x7
    config.model = dict(name="coatnet", layout=("CC", "CTT"), depths=(2, 3), widths=(32, 96))
    config.model.update(strides=(1, 2), stem=(16, 32))
    config.model.blocks = dict(C=dict(stride_at="pool"), T=dict(head_width=32))
    config.data = dict(name="fashion_mnist", mock=arg.data == "mock")
    config.data.update(image_size=(28, 28), crop="pad", pad=1, flip=True)  # pixels
    config.data.update(mean=(0.286,), std=(0.353,))  # of the training set's pixels in [0, 1]
    config.optim = dict(learning_rate=2e-3, warmup_steps=200, weight_decay=0.05, ema=0.99)
    config.eval = dict(every=400, batch_size=500)  # steps, images
    config.checkpoint = dict(every=400, best="test/accuracy")
    if arg.size == "tiny":
        config.update(steps=20, batch_size=32)
        config.model.update(layout=("C", "T"), depths=(1, 1), widths=(16, 32), stem=(8, 16))
        config.optim.warmup_steps = 5
        config.eval.update(every=10, batch_size=32)
        config.checkpoint.every = 10
    return config
