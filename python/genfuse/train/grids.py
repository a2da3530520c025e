"""Pictures of what a model does: reconstructions, samples and interpolations, as grids in PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import replacing

__all__ = ["draw_completions", "draw_interpolation", "draw_reconstructions", "draw_samples", "grid", "write_png"]

CELL = 56  # pixels of the file for an image's longer side, about
GAP = 2


def grid(images: Tensor, gap: int = GAP) -> NDArray[np.uint8]:
    """Images side by side on white, each pixel enlarged to a square where the images are small.

    Args:
        images: ``[rows, columns, C, H, W]`` in [0, 1], C 1 or 3.
        gap: white pixels between images, and around them.

    Returns:
        uint8 ``[height, width]``, or ``[height, width, 3]`` in colour.

    Example:
        >>> grid(torch.zeros(2, 3, 1, 28, 28)).shape
        (118, 176)
    """
    rows, columns, channels, height, width = images.shape
    scale = max(1, round(CELL / max(height, width)))
    values = (images.detach().float().cpu().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()
    values = values.repeat(scale, axis=3).repeat(scale, axis=4)
    down, across = height * scale + gap, width * scale + gap
    canvas = np.full((rows * down + gap, columns * across + gap, channels), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = gap + row * down, gap + column * across
            canvas[top : top + down - gap, left : left + across - gap] = values[row, column].transpose(1, 2, 0)
    return canvas[:, :, 0] if channels == 1 else canvas


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a PNG atomically: grey from ``[height, width]``, colour from ``[height, width, 3]``."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png", optimize=True)
    with replacing(path) as file:
        file.write(content.getvalue())


def draw_samples(path: Path, images: Tensor) -> None:
    """Write images, ``[N, C, H, W]`` in [0, 1], as a PNG with about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    rest = images.new_ones(rows * columns - len(images), *images.shape[1:])
    write_png(path, grid(torch.cat([images, rest]).view(rows, columns, *images.shape[1:])))


def draw_reconstructions(path: Path, model: Any, images: Tensor, columns: int = 10) -> None:
    """Write pairs of rows as a PNG: images, and below them what `model` makes of them."""
    columns = min(columns, len(images))
    images = images[: len(images) // columns * columns]
    shape = (len(images) // columns, columns, *images.shape[1:])
    pairs = torch.stack([images.view(shape), model.reconstruct(images).view(shape)], 1)
    write_png(path, grid(pairs.flatten(0, 1)))


def draw_completions(path: Path, images: Tensor, completions: Sequence[Tensor], kept: int, columns: int = 10) -> None:
    """Write rows as a PNG: images, what was given of each, the rest of it grey, and completions of that.

    Args:
        path: of the PNG.
        images: ``[N, C, H, W]`` in [0, 1].
        completions: of these, each of the same shape.
        kept: rows of pixels that were given.
        columns: at most; what does not fit beside them follows below.
    """
    given = images.clone()
    given[:, :, kept:] = 0.5
    rows = []
    for some in torch.split(torch.arange(len(images)), columns):
        for row in (images, given, *completions):
            white = images.new_ones(min(columns, len(images)) - len(some), *images.shape[1:])
            rows.append(torch.cat([row[some], white]))
    write_png(path, grid(torch.stack(rows)))


def draw_interpolation(path: Path, model: Any, images: Tensor, steps: int = 10) -> None:
    """Write a PNG with a row for each two of `images`: from the one to the other through the latent space."""
    half = len(images) // 2
    write_png(path, grid(model.interpolate(images[:half], images[half : 2 * half], steps)))
