"""Which items make up the batch of each step: a pure function of the seed and the global step.

With no state to save, a run that was killed and resumed reads exactly what an uninterrupted one reads, whatever the
number of processes among which a batch is divided.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_STEPS_BETWEEN_EVALUATIONS", "BatchOrder"]

MOST_STEPS_BETWEEN_EVALUATIONS = 1000


class BatchOrder:
    """Every epoch reads each item once, in a random order from NumPy's counter-based Philox keyed by (seed, epoch).

    The items of an epoch that do not fill a batch are left to the next epochs' luck.

    Args:
        items: how many there are.
        batch_size: items a step.
        seed: 64-bit.
        evaluations: the steps of an epoch are a multiple of this (or fewer than it), so that an epoch divides into
            that many equal parts.

    Example:
        >>> order = BatchOrder(items=10, batch_size=5, seed=0)
        >>> order.steps_per_epoch, sorted({*order.rows(0).tolist(), *order.rows(1).tolist()})
        (2, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """

    def __init__(self, items: int, batch_size: int, seed: int, evaluations: int = 1) -> None:
        self.items, self.batch_size, self.seed = items, batch_size, seed
        steps = max(1, items // batch_size)
        self.steps_per_epoch = max(1, steps // evaluations) * evaluations if steps >= evaluations else steps
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def rows(self, step: int) -> NDArray[np.int64]:
        """The items of global step `step`: ``[batch_size]``."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._begin_epoch(random)
            self._order = random.permutation(self.items)
            self._epoch = epoch
        rows = within * self.batch_size + np.arange(self.batch_size)
        # Where there are fewer items than a batch has rows, some of them come twice.
        return self._order[rows % self.items]

    def _begin_epoch(self, random: np.random.Generator) -> None:
        """Draw what else an epoch needs, before its order."""


def evaluations_per_epoch(steps: int) -> int:
    """How often an epoch of `steps` steps stops to look at the held-out data, so that it is not too rarely."""
    return math.ceil(steps / MOST_STEPS_BETWEEN_EVALUATIONS)
