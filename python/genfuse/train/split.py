"""Dividing data into three parts: what is learnt from, what chooses the best model, and what scores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

__all__ = ["Parts", "divide"]

SHARE = 0.1
Items = NDArray[Any]


@dataclass(frozen=True)
class Parts:
    """Data divided.

    Attributes:
        train, validation, test: arrays of items.
        how: for people.
    """

    train: Items
    validation: Items
    test: Items
    how: str


def divide(
    name: str, items: Items, validation: Items | None, test: Items | None, held_out: float | None, seed: int
) -> Parts:
    """Parts that the data do not set apart themselves are drawn from `items` with `seed`.

    Args:
        name: of the data, for messages.
        items: the array.
        validation, test: the data's own.
        held_out: share of the items for each part that is drawn, in (0, 0.5); None for a tenth.
        seed: which does not change with that of the training.

    Raises:
        UserError: there is nothing to draw, or too little.

    Example:
        >>> parts = divide("example", np.arange(100), None, None, None, seed=0)
        >>> len(parts.train), len(parts.validation), len(parts.test), parts.how
        (80, 10, 10, 'drawn with seed 0')
    """
    drawn = (validation is None) + (test is None)
    if drawn == 0 and held_out is not None:
        raise UserError(f"{name} has validation and test sets of its own, which are held out: leave out --held-out.")
    total = len(items)
    size = max(1, round(total * (SHARE if held_out is None else held_out))) if drawn else 0
    if total < drawn * size + 1:
        raise UserError(f"{name} is too small: nothing is left to learn from of {total} after {drawn} x {size}.")
    order = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64))).permutation(total)
    cuts = [items[np.sort(order[number * size : (number + 1) * size])] for number in range(drawn)]
    rest = items[np.sort(order[drawn * size :])]
    how = [] if drawn == 0 else [f"drawn with seed {seed}" if drawn == 2 else f"validation drawn with seed {seed}"]
    if test is None:
        test = cuts.pop(0)
    else:
        how.insert(0, "its own test set")
    if validation is None:
        validation = cuts.pop(0)
    return Parts(rest, validation, test, ", ".join(how))
