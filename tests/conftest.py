"""What every kind of test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.model import TINY_LLAMA, prepare


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The folder of the tiny random Llama, made on first use and kept in the user's cache."""
    return prepare(TINY_LLAMA)
