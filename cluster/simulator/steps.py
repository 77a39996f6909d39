"""When the steps of an engine end: one with prefills, or many that only decode."""

from __future__ import annotations

from math import floor, sqrt


class Steps:
    """``count`` steps from ``start_s`` on: the first takes ``first_s``, each one ``growth_s`` more.

    A step that only decodes takes longer than the one before by what its sequences' new tokens
    cost to read, which is the same each time.
    """

    __slots__ = ("count", "first_s", "growth_s", "start_s")

    def __init__(self, start_s: float, first_s: float, growth_s: float, count: int) -> None:
        assert first_s > 0.0
        assert growth_s >= 0.0
        self.start_s = start_s
        self.first_s = first_s
        self.growth_s = growth_s
        self.count = count

    @property
    def end_s(self) -> float:
        """When the last one ends."""
        return self.end_of_s(self.count)

    def end_of_s(self, step: int) -> float:
        """When step number ``step`` ends; the first is 1."""
        return self.start_s + step * (self.first_s + self.growth_s * (step - 1) * 0.5)

    def ended_by(self, now_s: float) -> int:
        """How many of them are over."""
        if self.count == 1 or now_s >= self.end_s:
            return int(now_s >= self.end_s) * self.count
        passed_s = now_s - self.start_s
        if passed_s <= 0.0:
            return 0
        # The sum of the first k steps is growth/2 k^2 + (first - growth/2) k.
        linear = self.first_s - self.growth_s * 0.5
        root = sqrt(linear * linear + 2.0 * self.growth_s * passed_s)
        steps = min(floor(2.0 * passed_s / (linear + root)), self.count - 1)
        while steps and self.end_of_s(steps) > now_s:
            steps -= 1
        while self.end_of_s(steps + 1) <= now_s:
            steps += 1
        return steps

    def stretch(self, ratio: float, now_s: float) -> None:
        """If there is only one step, what is left of it takes ``ratio`` times as long."""
        if self.count == 1 and now_s < self.end_s:
            passed_s = max(0.0, now_s - self.start_s)
            self.first_s = passed_s + (self.first_s - passed_s) * ratio

    def stop_after(self, now_s: float) -> None:
        """Take no step that would begin after ``now_s``, but at least one."""
        if self.count > 1 and now_s < self.end_of_s(self.count - 1):
            steps = self.ended_by(now_s)
            self.count = steps if steps and self.end_of_s(steps) >= now_s else steps + 1
