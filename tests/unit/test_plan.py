"""Which splits are tried for a workload, and which is best."""

from __future__ import annotations

import random

import pytest

from cluster.failure import CommandFailure
from cluster.plan import FOLLOWING, MIXED, PREFERRED, Split, Wanted, planned, said, splits, subjects
from cluster.simulator.setup import Slo
from cluster.workload.swing import Swing, swinging

SMALL = Swing(waves=1, tasks=12, within_s=5.0, reads=1, writes=1, pause_s=1.0, answer_tokens=100)


def wanted(model: str, gpus: int, tp: int | None = None) -> Wanted:
    return Wanted(model, gpus, swinging(SMALL, random.Random(1)), Slo(2.0, 0.05), tp=tp)


def test_every_split_is_tried() -> None:
    assert splits(8, 2)[0] == Split(2, 4, 0, MIXED)
    assert [one.prefill for one in splits(8, 2)] == [0, 1, 2, 3]
    assert said(splits(8, 2)[1]) == "1 prefill, 3 decode"


def test_sizes_that_do_not_fit_are_left_out() -> None:
    assert set(subjects(wanted("llama-3.1-70b-h200-tp4", 4, 4))) == {4}
    with pytest.raises(CommandFailure, match="no-such-model"):
        subjects(wanted("no-such-model", 8))


def test_the_best_split_is_found_and_what_following_adds() -> None:
    told: list[str] = []
    outcomes, following = planned(wanted("llama-3.1-8b-h200-tp1", 3, 1), told.append)
    assert [one.split.prefill for one in outcomes] == [0, 1, 2]
    assert following is not None
    assert 0.0 <= following.good <= 1.0
    assert following.split.kind in (FOLLOWING, PREFERRED)
    # Both kinds of roles were tried.
    assert len(told) == 5
    assert ("prefill workers decode, too" in told[-1], told[-2].endswith("demand")) == (True, True)
