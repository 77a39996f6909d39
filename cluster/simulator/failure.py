"""What ends a comparison; imports nothing, so that whoever explains errors can know it."""

from __future__ import annotations


class SimulationError(RuntimeError):
    """A replay failed; says which one and how."""
