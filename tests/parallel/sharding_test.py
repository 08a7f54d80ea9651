# SPDX-License-Identifier: Apache-2.0
"""The rules of tensor parallelism over the parameters of all four families."""

import re

import jax
import pytest

from localglobal_jax.models.registry import create_model, example
from localglobal_jax.parallel import sharding

# Kernels inside blocks that "model" does not split, one pattern for all blocks of a model.
WHOLE = {
    "coatnet_0": {"squeeze_excite/reduce"},  # its input is split: XLA sums the few numbers
    "volo_d1": set(),
    "focal_tiny": {"attention/pool1"},  # weights of the positions of a window, for all channels
    # Attention and convolution, one beside the other: their border is not one between devices.
    "muse_iwslt": {"muse/output", "muse/convolution/kernel*"},
    "transformer_base": set(),
}


@pytest.mark.parametrize("model", WHOLE)
def test_heads_and_hidden_channels_of_every_block_are_split(model):
    module = create_model(model, **({"heads": (4, 8, 16, 32)} if "focal" in model else {}))
    variables = jax.eval_shape(module.init, jax.random.key(0), *example(model))
    whole = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        inside = re.fullmatch(r".*?/(?:block|layer)\d+/(.*)/kernel", name)
        if inside and "model" not in sharding.spec(
            f"params/{name}", leaf.shape, "tensor", {"model": 2}
        ):
            whole.add(re.sub(r"(?<=kernel)\d+", "*", inside[1]))
    assert whole == WHOLE[model]
