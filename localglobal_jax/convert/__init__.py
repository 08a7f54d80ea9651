# SPDX-License-Identifier: Apache-2.0
"""Converters of published weights, and adaptation to other image sizes and numbers of classes.

A converter takes a state dict (any mapping name -> array; `weights.read_safetensors` reads one
without torch) and returns ``(module, variables)``. It is strict: a name that is missing
or left over, or a shape that does not fit, is a ValueError that lists all of them.

>>> module = lg.create_model("coatnet_0", classes=1000)
>>> images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
>>> variables = jax.eval_shape(module.init, jax.random.key(0), images)
>>> module, variables = lg.convert.adapt.reclassify(module, variables, classes=10)
>>> module.classes, variables["params"]["head"]["classifier"]["bias"].shape
(10, (10,))
"""

from localglobal_jax.convert import adapt, fairseq, focal, timm, weights

__all__ = ["adapt", "fairseq", "focal", "timm", "weights"]
