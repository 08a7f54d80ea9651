# SPDX-License-Identifier: Apache-2.0
"""Other people's weights to ours: a mapping name -> array in, ``(module, variables)`` out.

Strict both ways: a missing or a left-over name is a ValueError that lists them. Torch is not
needed: any mapping to arrays will do, e.g. ``safetensors.numpy.load_file(path)``.
"""
