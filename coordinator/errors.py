"""What can be our own fault, as one tree.

::

    CoreError                 a bug of ours: let it crash
     └─ InvalidTransition     a lifecycle was asked for a move that its table forbids

What the world does wrong (lost peers, late messages, full workers) is an ordinary event
with a transition; what a user does wrong is answered with ``Rejected``. Neither raises.
"""

from __future__ import annotations

from collections.abc import Sequence

StoryLine = tuple[float, str, str]
"""When (s), where to, and why."""


class CoreError(Exception):
    """A bug in the core."""


class InvalidTransition(CoreError):
    """A move that the table does not have; carries the object's recent story."""

    def __init__(self, what: str, source: str, target: str, story: Sequence[StoryLine]) -> None:
        lines = "".join(f"\n  {at_s:.3f} {phase}: {why}" for at_s, phase, why in story)
        super().__init__(f"{what} cannot move from {source} to {target}; its story:{lines}")
