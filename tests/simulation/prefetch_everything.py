"""A core that takes every run to go on, with two calls at once that begin as the last one did."""

from __future__ import annotations

from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.workflow.limits import WorkflowLimits
from coordinator.workflow.prediction import Kept, NextCall, Prediction, RunKey, Spread
from coordinator.workflow.profiles import Profiles

FEW = Spread(8.0, 8.0, 8.0, 8.0, 8.0, 9.0)
SOON = Spread(0.1, 0.1, 0.1, 0.1, 0.1, 9.0)


class Certain(Profiles):
    """Learns as ever, and is sure of itself whatever it has seen."""

    def predict(self, key: RunKey, now_s: float) -> Prediction:
        """The same for all runs."""
        kept = [Kept("previous", 1.0, 1.0, 1.0)]
        following = NextCall("a", 1.0, 2.0, SOON, FEW, FEW, FEW, kept)
        return Prediction(True, 1.0, "a", [following], 0.0, 2.0, 16.0)


def prefetching_core(limits: Limits, placement: Placement, core_id: str) -> Core:
    """A core that predicts so."""
    return Core(limits, placement, core_id, profiles=Certain(WorkflowLimits()))
