"""How good the predictions of one workflow have been lately. All figures fade.

The next agent: was the likeliest the right one, and the probability of the right one (as log
loss). Lengths: how many were within their upper bound, and how wide the bounds were against
the longest answer seen. Gaps: where they fell in their distribution, which is right if they
fell everywhere alike (probability integral transform, Dawid 1984).
"""

from __future__ import annotations

from math import log

import msgspec

FADING = 2.0 ** (-1 / 300)
"""What a score keeps of its weight at the next one."""
GAP_BINS = 10
TRUSTED_SAMPLES = 8.0
"""Next agents that must have been predicted before predictions are acted on."""
DOUBT = 0.15
"""How much less often than it claims to be a prediction may be right."""
IMPROBABLE = 1e-4
"""The least probability that counts in log loss, so that no single surprise decides it."""


class Scores(msgspec.Struct):
    """Sums that fade; see the properties for what they say. Encoded with the profile."""

    next_count: float = 0.0
    next_right: float = 0.0
    next_claimed: float = 0.0
    next_loss: float = 0.0
    length_count: float = 0.0
    length_within: float = 0.0
    length_bounds: float = 0.0
    length_longest: float = 0.0
    gaps: list[float] = msgspec.field(default_factory=lambda: [0.0] * GAP_BINS)

    def next_agent(self, probabilities: dict[int, float], symbol: int) -> None:
        """``symbol`` came when these were the probabilities."""
        best = max(probabilities, key=probabilities.__getitem__, default=-1)
        self.next_count = self.next_count * FADING + 1.0
        self.next_right = self.next_right * FADING + (1.0 if best == symbol else 0.0)
        self.next_claimed = self.next_claimed * FADING + probabilities.get(best, 0.0)
        loss = -log(max(IMPROBABLE, probabilities.get(symbol, 0.0)))
        self.next_loss = self.next_loss * FADING + loss

    def length(self, tokens: float, bound: float, longest: float) -> None:
        """An answer had so many tokens when ``longest`` was the longest so far."""
        self.length_count = self.length_count * FADING + 1.0
        self.length_within = self.length_within * FADING + (1.0 if tokens <= bound else 0.0)
        self.length_bounds = self.length_bounds * FADING + bound
        self.length_longest = self.length_longest * FADING + longest

    def gap(self, below: float, up_to: float) -> None:
        """A gap came that these shares of all were thought to be below, and up to.

        What is known no finer is spread evenly between them, as for counts (Czado, Gneiting
        and Held, *Predictive Model Assessment for Count Data*, Biometrics 65, 2009).
        """
        width = max(up_to - below, 1e-9)
        for place in range(GAP_BINS):
            least, most = place / GAP_BINS, (place + 1) / GAP_BINS
            part = max(0.0, min(most, below + width) - max(least, below)) / width
            self.gaps[place] = self.gaps[place] * FADING + part

    @property
    def top1(self) -> float:
        """Share of next agents that were the likeliest; 0 if none was predicted."""
        return self.next_right / self.next_count if self.next_count else 0.0

    @property
    def log_loss(self) -> float:
        """Mean of minus the log of the probability of what came, in nats."""
        return self.next_loss / self.next_count if self.next_count else 0.0

    @property
    def length_coverage(self) -> float:
        """Share of answers within their bound; 1 if there were none."""
        return self.length_within / self.length_count if self.length_count else 1.0

    @property
    def length_width_ratio(self) -> float:
        """Mean bound over mean longest answer so far."""
        return self.length_bounds / self.length_longest if self.length_longest else 1.0

    @property
    def gap_error(self) -> float:
        """Mean distance between the shares that were below each tenth and that tenth."""
        total = sum(self.gaps)
        if not total:
            return 0.0
        below = error = 0.0
        for place in range(1, GAP_BINS):
            below += self.gaps[place - 1] / total
            error += abs(below - place / GAP_BINS)
        return error / (GAP_BINS - 1)

    @property
    def trusted(self) -> bool:
        """Whether predictions of the next agent are right about as often as they claim."""
        if self.next_count < TRUSTED_SAMPLES:
            return False
        return self.next_right >= self.next_claimed - DOUBT * self.next_count


class ScoreView(msgspec.Struct, frozen=True, gc=False):
    """Scores for people and metrics; see ``Scores``."""

    next_agent_top1: float
    next_agent_log_loss: float
    length95_coverage: float
    length95_width_ratio: float
    gap_calibration_error: float
    trusted: bool
    predictions: float


def score_view(scores: Scores) -> ScoreView:
    """The figures."""
    return ScoreView(
        next_agent_top1=scores.top1,
        next_agent_log_loss=scores.log_loss,
        length95_coverage=scores.length_coverage,
        length95_width_ratio=scores.length_width_ratio,
        gap_calibration_error=scores.gap_error,
        trusted=scores.trusted,
        predictions=scores.next_count,
    )
