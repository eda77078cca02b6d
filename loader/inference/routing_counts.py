"""How often each layer has chosen each expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Choices"]


class Choices:
    """Counts what routers choose.

    Choices may still be in computation on a device when they are added; they are read when the next
    step begins, or when the counts are asked for, so counting never makes anything wait.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._counts = np.zeros((layers, experts), np.int64)
        self._later: list[tuple[int, Any, Any]] = []

    def add(self, number: int, choices: Any, real: Any) -> None:
        """Add a layer's choices, int32 `[N, chosen]`, for N tokens; bool `real` in order."""
        if number == 0:
            self._look()
        self._later.append((number, choices, real))

    def counts(self) -> npt.NDArray[np.int64]:
        """Tokens that each layer sent to each expert, `[layers, experts]`."""
        self._look()
        return self._counts.copy()

    def _look(self) -> None:
        for number, choices, real in self._later:
            of_real = np.asarray(choices)[np.asarray(real).reshape(-1)]
            self._counts[number] += np.bincount(of_real.reshape(-1), minlength=len(self._counts[0]))
        self._later.clear()
