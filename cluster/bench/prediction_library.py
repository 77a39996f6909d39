"""Forecasts of the same demand by the models of a library that is good at it.

statsforecast (Nixtla; AutoARIMA and AutoETS after Hyndman, Theta, Holt, smoothing and means) sees
the demand of every 30 s so far and forecasts the next 30 s, at the same moments as ours. It is
an extra (``pip install pythia-serve[forecasts]``); without it there is nothing to compare with.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

HISTORY = 240
"""Values that are looked back on, as many as matter to models without seasons."""
WINDOWS_MOST = 60
"""Moments that are compared, spread over the judged half: fitting takes long."""


def available() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("statsforecast") is not None


def library_forecasts(
    values: NDArray[np.float64], moments: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """By model, what it says of ``values[moment]`` from all before it, refitted each time."""
    models: Any = importlib.import_module("statsforecast.models")
    made = [
        models.AutoARIMA(),
        models.AutoETS(),
        models.AutoTheta(),
        models.Holt(),
        models.SimpleExponentialSmoothingOptimized(),
        models.WindowAverage(window_size=10),
        models.HistoricAverage(),
    ]
    found: dict[str, NDArray[np.float64]] = {}
    with warnings.catch_warnings():
        # Models say so when they give up on a series; they then answer with a simpler one.
        warnings.simplefilter("ignore")
        for model in made:
            found[str(model)] = np.array(
                [
                    float(model.forecast(y=values[max(0, at - HISTORY) : at], h=1)["mean"][0])
                    for at in moments
                ]
            )
    return found


def spread_moments(first: int, last: int) -> NDArray[np.int64]:
    """At most ``WINDOWS_MOST`` moments between two, evenly."""
    count = min(WINDOWS_MOST, max(0, last - first))
    return np.unique(np.linspace(first, last - 1, count).astype(np.int64))
