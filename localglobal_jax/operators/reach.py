# SPDX-License-Identifier: Apache-2.0
"""Reach of an operator: declared by each operator, tested by its Jacobian."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reach:
    """`radius`: positions in every direction that can move an output; None: all of them.

    `windows`: an operator that also attends to windows or pooled summaries (focal) is neither
    purely local nor purely global: BOTH, and its radius comes from its window sizes.

    >>> lg.operators.Outlook(16, heads=2).reach
    Reach(radius=2, windows=False)
    >>> lg.operators.FocalAttention(16, heads=2).reach.name
    'BOTH'
    """

    radius: int | None = None
    windows: bool = False

    @property
    def name(self) -> str:
        """LOCAL, GLOBAL or BOTH."""
        if self.windows:
            return "BOTH"
        return "GLOBAL" if self.radius is None else "LOCAL"

    def __str__(self) -> str:
        return self.name if self.radius is None else f"{self.name} {self.radius}"


GLOBAL = Reach()


def local(radius: int) -> Reach:
    """A neighbourhood of `radius` positions in every direction.

    >>> str(lg.operators.local(2))
    'LOCAL 2'
    """
    return Reach(radius)
