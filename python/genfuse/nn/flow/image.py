"""Layers of flows of images: squeezing, factoring out, dequantisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import ops
from genfuse.nn.sampling import _check_number, _check_size

from .base import Transform, zero_log_det
from .linear import at_least_float32, check_channels

__all__ = ["DequantizeLogit", "MultiScale", "Split", "Squeeze"]


class Squeeze(Transform):
    """Blocks of ``factor x factor`` pixels become channels: ``[B, C, H, W]`` to ``[B, C f f, H / f, W / f]``.

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803), section 3.6; in the order of `torch.nn.PixelUnshuffle`.

    Args:
        factor: of the height and of the width.

    Raises:
        TypeError: factor is no int.
        ValueError: factor is below 1, or x's height and width are no multiples of it (z's channels of its square).

    Example:
        >>> z, log_abs_det = Squeeze()(torch.arange(4.0).view(1, 1, 2, 2))
        >>> z.flatten(), log_abs_det
        (tensor([0., 1., 2., 3.]), tensor([0.]))
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = _check_size("Squeeze", "factor", factor)

    def extra_repr(self) -> str:
        return str(self.factor)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.size(2) % self.factor or x.size(3) % self.factor:
            want = f"[B, C, H, W] with H and W multiples of {self.factor}"
            raise ValueError(f"Squeeze: x must be {want}, got {list(x.shape)}")
        if x.size(0) == 0:  # whose shape torch 2.13's pixel_unshuffle gets wrong
            return x.view(0, x.size(1) * self.factor**2, *(size // self.factor for size in x.shape[2:])), zero_log_det(
                x
            )
        return F.pixel_unshuffle(x, self.factor), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if z.dim() != 4 or z.size(1) % self.factor**2:
            want = f"[B, C, H, W] with C a multiple of {self.factor**2}"
            raise ValueError(f"Squeeze: z must be {want}, got {list(z.shape)}")
        return F.pixel_shuffle(z, self.factor), zero_log_det(z)


class Split(torch.nn.Module):
    """Factor out half of the channels: they are done, and the flow goes on with the others.

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803), section 3.6. With ``prior="learned"`` what is factored out
    has a Gaussian with mean and standard deviation from a convolution over what goes on, which starts at zero (Kingma
    and Dhariwal 2018, arXiv 1807.03039, and its code): it is returned whitened, ``(x - mean) / std``, so that its prior
    is the standard normal either way. `MultiScale` makes a transform of levels and splits.

    Args:
        channels: C of x ``[B, C, H, W]``; the first half, the larger one of an odd number, goes on.
        prior: ``"learned"`` or ``"standard"``.

    Raises:
        TypeError: channels is no int.
        ValueError: channels is below 2, an unknown prior, or x has other channels.

    Example:
        >>> split = Split(4)
        >>> x = torch.randn(2, 4, 6, 6)
        >>> kept, z, log_abs_det = split(x)
        >>> bool((split.inverse(kept, z)[0] - x).abs().max() < 1e-6), kept.shape, z.shape
        (True, torch.Size([2, 2, 6, 6]), torch.Size([2, 2, 6, 6]))
    """

    def __init__(self, channels: int, *, prior: str = "learned") -> None:
        super().__init__()
        self.channels = _check_size("Split", "channels", channels)
        if self.channels < 2:
            raise ValueError(f"Split: channels must be at least 2, got {self.channels}")
        if prior not in ("learned", "standard"):
            raise ValueError(f"Split: prior must be 'learned' or 'standard', got {prior!r}")
        self.factored = self.channels // 2
        self.kept = self.channels - self.factored
        self.prior: torch.nn.Conv2d | None = None
        if prior == "learned":
            self.prior = torch.nn.Conv2d(self.kept, 2 * self.factored, 3, padding=1)
            torch.nn.init.zeros_(self.prior.weight)
            assert self.prior.bias is not None
            torch.nn.init.zeros_(self.prior.bias)

    def extra_repr(self) -> str:
        return str(self.channels)

    def _whiten(self, kept: Tensor, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.prior is None:
            return x, zero_log_det(x)
        # Mean and ln std: z std + mean = x is the coupling, and whitening is its inverse.
        return ops.affine_coupling(x, self.prior(kept).to(x.dtype), scale="exp", inverse=not inverse)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(kept, z, log_abs_det [B])`` of x ``[B, C, H, W]``."""
        check_channels("Split", x, self.channels)
        kept, rest = torch.split_with_sizes(x, (self.kept, self.factored), 1)
        z, log_abs_det = self._whiten(kept, rest, False)
        return kept, z, log_abs_det

    def inverse(self, kept: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log_abs_det [B])`` of both parts."""
        check_channels("Split", kept, self.kept, "kept")
        check_channels("Split", z, self.factored, "z")
        rest, log_abs_det = self._whiten(kept, z, True)
        return torch.cat([kept, rest], 1), log_abs_det


class MultiScale(Transform):
    """Levels of a flow with a `Split` after each but the last: images to vectors of all that was factored out.

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803), eq. 14 to 16. z is ``[B, D]``: what the first split factors
    out, flat, then the second's, and so on, and what the last level returns at the end.

    Args:
        levels: a transform for each scale.
        splits: a `Split` after each level but the last.
        input_shape: (channels, height, width) of x, by which `inverse` finds the parts of z.

    Raises:
        ValueError: not one split fewer than levels; from `forward` or `inverse`, another shape.

    Example:
        >>> from genfuse import nn
        >>> flow = MultiScale([nn.Squeeze(), nn.Squeeze()], [nn.Split(4)], (1, 4, 4))
        >>> x = torch.randn(3, 1, 4, 4)
        >>> z, log_abs_det = flow(x)
        >>> z.shape, bool((flow.inverse(z)[0] - x).abs().max() < 1e-6)
        (torch.Size([3, 16]), True)
    """

    def __init__(self, levels: Sequence[Transform], splits: Sequence[Split], input_shape: Sequence[int]) -> None:
        super().__init__()
        if len(splits) != len(levels) - 1:
            raise ValueError(f"MultiScale: splits must be one fewer than levels, got {len(splits)} and {len(levels)}")
        self.levels, self.splits = torch.nn.ModuleList(levels), torch.nn.ModuleList(splits)
        self.input_shape = tuple(_check_size("MultiScale", "input_shape", size) for size in input_shape)
        self.features = math.prod(self.input_shape)
        self.shapes: list[tuple[int, ...]] = []  # of the parts of z
        shape = self.input_shape
        for level, split in zip(levels, [*splits, None], strict=True):
            shape = _shape_after(level, shape)
            if split is not None:
                if shape[0] != split.channels:
                    raise ValueError(f"MultiScale: a split has {split.channels} channels after a level of {shape[0]}")
                self.shapes.append((split.factored, *shape[1:]))
                shape = (split.kept, *shape[1:])
        self.shapes.append(shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.shape[1:] != self.input_shape:
            raise ValueError(f"MultiScale: x must be {['B', *self.input_shape]}, got {list(x.shape)}")
        parts: list[Tensor] = []
        total: Any = None
        for level, split in zip(self.levels, [*self.splits, None], strict=True):
            x, log_abs_det = level(x, context)
            total = log_abs_det if total is None else total + log_abs_det
            if split is not None:
                x, part, log_abs_det = split(x)
                total = total + log_abs_det
                parts.append(part.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if z.dim() != 2 or z.size(1) != self.features:
            raise ValueError(f"MultiScale: z must be [B, {self.features}], got {list(z.shape)}")
        parts = [
            part.view(part.size(0), *shape)
            for part, shape in zip(
                torch.split_with_sizes(z, [math.prod(shape) for shape in self.shapes], 1), self.shapes, strict=True
            )
        ]
        x = parts[-1]
        total: Any = None
        for index in reversed(range(len(self.levels))):
            if index < len(self.splits):
                x, log_abs_det = self.splits[index].inverse(x, parts[index])  # type: ignore[operator]
                total = total + log_abs_det
            x, log_abs_det = self.levels[index].inverse(x, context)  # type: ignore[operator]
            total = log_abs_det if total is None else total + log_abs_det
        return x, total


def _shape_after(level: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a level makes of a shape: squeezes change it, nothing else does."""
    factor = 1
    for module in level.modules():
        if isinstance(module, Squeeze):
            factor *= module.factor
    channels, height, width = shape
    if height % factor or width % factor:
        raise ValueError(f"MultiScale: {height} by {width} pixels cannot be squeezed by {factor}")
    return channels * factor**2, height // factor, width // factor


class DequantizeLogit(Transform):
    """Images of whole numbers to real ones: noise within each level, and a logit.

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803), section 4.1: ``z = logit(alpha + (1 - 2 alpha) (x + u) /
    levels)`` with u uniform on [0, 1), in eval mode too. ``log_abs_det`` is of z by x + u, so with it a model's density
    is of pixels in units of a level, and its negative mean logarithm bounds that of the levels' probabilities.

    `inverse` returns the level, a whole number in x's units; its log_abs_det is that of the map before rounding down.

    Args:
        levels: number of values a pixel can have, 0 to levels - 1.
        alpha: in [0, 0.5): keeps the logit finite, above 0.

    Raises:
        TypeError: levels is no int, alpha no number; from `forward`, x is neither uint8 nor floating.
        ValueError: levels below 2, or alpha outside of [0, 0.5).

    Example:
        >>> layer = DequantizeLogit()
        >>> x = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
        >>> z, log_abs_det = layer(x)
        >>> bool(torch.equal(layer.inverse(z)[0].to(torch.uint8), x)), log_abs_det.shape
        (True, torch.Size([2]))
    """

    def __init__(self, levels: int = 256, alpha: float = 0.05) -> None:
        super().__init__()
        self.levels = _check_size("DequantizeLogit", "levels", levels)
        if self.levels < 2:
            raise ValueError(f"DequantizeLogit: levels must be at least 2, got {self.levels}")
        _check_number("DequantizeLogit", "alpha", alpha)
        if not alpha < 0.5:
            raise ValueError(f"DequantizeLogit: alpha must be in [0, 0.5), got {alpha}")
        self.alpha = float(alpha)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, alpha={self.alpha}"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(z, log_abs_det)``; noise is `u`, of x's shape, or drawn from `generator`."""
        return ops.dequantize_logit(x, levels=self.levels, alpha=self.alpha, u=u, generator=generator)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.logit_quantize(z, levels=self.levels, alpha=self.alpha), self._log_det_back(z)

    def continuous(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`inverse` without the rounding down: ``(x + u, log_abs_det)``."""
        wide = at_least_float32(z)
        x = (torch.sigmoid(wide) - self.alpha) * (self.levels / (1.0 - 2.0 * self.alpha))
        return x.to(z.dtype), self._log_det_back(z)

    def _log_det_back(self, z: Tensor) -> Tensor:
        wide = at_least_float32(z)
        # d sigmoid(z) / dz = sigmoid(z) sigmoid(-z)
        each = F.logsigmoid(wide) + F.logsigmoid(-wide) + math.log(self.levels / (1.0 - 2.0 * self.alpha))
        return each.flatten(1).sum(1)
