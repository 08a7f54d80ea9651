# SPDX-License-Identifier: Apache-2.0
"""The vocabulary. Every operator maps ``[b, *space, d] -> [b, *space, d]`` and declares its reach.

| operator                  | file           | letter | reach  | weights           |
|---------------------------|----------------|--------|--------|-------------------|
| depthwise convolution     | convolution.py | C      | LOCAL  | static            |
| outlook attention         | outlook.py     | O      | LOCAL  | from the content  |
| attention, relative bias  | attention.py   | T      | GLOBAL | from the content  |
| attention, plain          | attention.py   | S      | GLOBAL | from the content  |

Each file has pure functions first (the mathematics), then modules (the parameters).
"""

from localglobal_jax.operators import attention, convolution, outlook

__all__ = ["attention", "convolution", "outlook"]
