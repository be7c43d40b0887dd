"""Marks for lists of parameters."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_but(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """``values`` for parametrize: those that are not ``quick`` are left to the slow tests.

    A tuple has a value for each of several names.
    """
    parameters = []
    for value in values:
        each = value if isinstance(value, tuple) else (value,)
        marks = [] if value in quick else [pytest.mark.slow]
        parameters.append(pytest.param(*each, marks=marks))
    return parameters
