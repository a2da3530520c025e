"""How the losses of a run are shown: on the screen, in TensorBoard, in the picture of the curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["Measure", "bits_per_dim"]


def bits_per_dim(shape: Iterable[int]) -> float:
    """Bits per dimension of one nat per image of this shape.

    Example:
        >>> round(bits_per_dim((1, 2, 2)), 4)
        0.3607
    """
    return 1.0 / (math.prod(shape) * math.log(2.0))


@dataclass(frozen=True)
class Measure:
    """The unit of a loss, and of the work that a step is.

    Args:
        unit: for people, as in ``"bits/char"``.
        key: the same for files.
        scale: the value in that unit of a loss of 1.
        axis: of the curve.
        held_out: what is held out, as in ``"text"``.
        items: what a step reads, as in ``"tokens"``.
        items_per_step: how many, over all processes.
        stage: what is being trained, where a run has several stages.
        part: what the evaluations look at, as in ``"validation"``.
        more: further figures that follow from a held-out loss, by their name in TensorBoard.

    Example:
        >>> measure = Measure("bits/dim", "bits_per_dim", 0.5, "bits per dimension", "images", "images", 128)
        >>> measure.logged("train", 3.0)
        {'train/loss': 3.0, 'train/bits_per_dim': 1.5}
    """

    unit: str
    key: str
    scale: float
    axis: str
    held_out: str
    items: str
    items_per_step: int
    stage: str = ""
    part: str = "held-out"
    more: Callable[[float], dict[str, float]] | None = None

    def log_name(self, name: str) -> str:
        return f"{self.stage}/{name}" if self.stage else name

    @property
    def part_key(self) -> str:
        """`part`, for files."""
        return self.part.replace("-", "_")

    def logged(self, part: str, loss: float) -> dict[str, float]:
        """What TensorBoard gets of a loss of `part`, which is ``"train"`` or that of the evaluations."""
        values = {"loss": loss, self.key: loss * self.scale}
        if self.more is not None and part == self.part_key:
            values |= self.more(loss)
        return {self.log_name(f"{part}/{name}"): value for name, value in values.items()}
