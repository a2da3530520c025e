"""The masked convolution, in plain PyTorch: a sum over the taps that are alive, and no look at the others."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["live_taps", "masked_conv2d"]

# Of each kind of mask: the live taps of the centre's row but for the centre itself ("none", "left", "row"), whether the
# rows above are alive, and what is alive of the centre: nothing, channel groups before the output's, those up to and
# with it, or all. The kernels know the masks by their place here; the short names come last.
MASKS: dict[str, tuple[str, bool, str]] = {
    "A": ("left", True, "before"),
    "B": ("left", True, "up to"),
    "vertical_A": ("none", True, "none"),
    "vertical_B": ("row", True, "all"),
    "horizontal_A": ("left", False, "before"),
    "horizontal_B": ("left", False, "up to"),
    "vertical": ("none", True, "none"),
    "horizontal": ("left", False, "before"),
}


def _of_tap(mask_type: str, size: tuple[int, int], i: int, j: int) -> str:
    """What is alive of tap (i, j): "none", "all", or at the centre the groups "before" the output's, or "up to" it."""
    sideways, above, centre = MASKS[mask_type]
    row, column = size[0] // 2, size[1] // 2
    if i != row:
        return "all" if above and i < row else "none"
    if j == column:
        return centre
    return "all" if sideways == "row" or (sideways == "left" and j < column) else "none"


def channel_groups_of(channels: int, channel_groups: int, channel_order: str) -> list[int]:
    """The group of each channel: thirds of them for RGB, or every third ("interleaved")."""
    if channel_order == "interleaved":
        return [c % channel_groups for c in range(channels)]
    return [c * channel_groups // channels for c in range(channels)]


def live_taps(
    mask_type: str,
    channel_groups: int,
    channel_order: str,
    out_channels: int,
    in_channels: int,
    kernel_size: int | Sequence[int],
) -> Tensor:
    """Which weights of a masked convolution are alive.

    Van den Oord et al. 2016 (arXiv 1601.06759), section 3.4, and for the stacks arXiv 1606.05328, section 2.2: those
    of the pixels above and to the left; and at the pixel itself, for mask A, of the channel groups (colours) before the
    output's, and for mask B of the output's own too.

    Args:
        mask_type: "A", "B", "vertical" or "vertical_A" (the rows above), "vertical_B" (and the centre's whole row),
            "horizontal" or "horizontal_A", "horizontal_B" (the centre's row alone, masked as A or B).
        channel_groups: into how many groups the channels of both sides fall, 3 for RGB.
        channel_order: "contiguous", channel c of C is of group c G // C, or "interleaved", of group c % G.
        out_channels, in_channels: O and I.
        kernel_size: odd, one number or two.

    Returns:
        bool ``[O, I, kh, kw]``.

    Example:
        >>> live_taps("A", 1, "contiguous", 1, 1, 3)[0, 0].int()
        tensor([[1, 1, 1],
                [1, 0, 0],
                [0, 0, 0]], dtype=torch.int32)
    """
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else (kernel_size[0], kernel_size[1])
    live = torch.zeros(out_channels, in_channels, *size, dtype=torch.bool)
    outputs = torch.tensor(channel_groups_of(out_channels, channel_groups, channel_order)).unsqueeze(1)
    inputs = torch.tensor(channel_groups_of(in_channels, channel_groups, channel_order)).unsqueeze(0)
    for i in range(size[0]):
        for j in range(size[1]):
            what = _of_tap(mask_type, size, i, j)
            if what == "all":
                live[:, :, i, j] = True
            elif what != "none":
                live[:, :, i, j] = inputs < outputs if what == "before" else inputs <= outputs
    return live


Indices = tuple[int, ...] | None  # None stands for all


@functools.lru_cache(maxsize=256)
def _products(
    mask_type: str,
    channel_groups: int,
    channel_order: str,
    outputs: int,
    inputs: int,
    size: tuple[int, int],
    groups: int,
) -> tuple[tuple[int, int, Indices, Indices, Indices], ...]:
    """(row, column, outputs, their channels of x, the same of the weight) of each product of a tap."""
    group_out = channel_groups_of(outputs, channel_groups, channel_order)
    group_in = channel_groups_of(inputs, channel_groups, channel_order)
    each_out, each_in = outputs // groups, inputs // groups
    found: list[tuple[int, int, Indices, Indices, Indices]] = []
    for i in range(size[0]):
        for j in range(size[1]):
            what = _of_tap(mask_type, size, i, j)
            if what == "none":
                continue
            if what == "all" and groups == 1:
                found.append((i, j, None, None, None))
                continue
            alike: dict[tuple[int, ...], list[int]] = {}  # outputs that see the same channels
            for o in range(outputs):
                first, own = o // each_out * each_in, group_out[o]
                last = {"all": channel_groups, "up to": own, "before": own - 1}[what]
                seen = tuple(c for c in range(first, first + each_in) if group_in[c] <= last)
                if seen:
                    alike.setdefault(seen, []).append(o)
            for seen, rows in alike.items():
                found.append((i, j, tuple(rows), seen, tuple(c % each_in for c in seen)))
    return tuple(found)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_type: str = "B",
    channel_groups: int = 1,
    channel_order: str = "contiguous",
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """y[b, o, r, s] = bias[o] + sum over live (c, i, j) of weight[o, c, i, j] x[b, c, r + i dh - ph, s + j dw - pw].

    Args:
        x: ``[B, I, H, W]``.
        weight: ``[O, I / groups, kh, kw]``.
        bias: ``[O]``.
        mask_type, channel_groups, channel_order: as for `live_taps`.
        padding: zeros (ph, pw) on each side.
        dilation: (dh, dw).
        groups: of channels that see only each other, as torch's.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    outputs, _, *size = weight.shape
    taps = weight.to(wide)
    padded = torch.nn.functional.pad(x.to(wide), (padding[1], padding[1], padding[0], padding[0]))
    height = padded.shape[2] - dilation[0] * (size[0] - 1)
    width = padded.shape[3] - dilation[1] * (size[1] - 1)
    y = padded.new_zeros((x.shape[0], outputs, height, width))
    products = _products(mask_type, channel_groups, channel_order, outputs, x.shape[1], (size[0], size[1]), groups)
    for i, j, rows, channels, columns in products:
        row, column = i * dilation[0], j * dilation[1]
        part, tap = padded[:, :, row : row + height, column : column + width], taps[:, :, i, j]
        if rows is None:
            y = y + torch.einsum("oc,bchw->bohw", tap, part)
            continue
        to, of, among = (torch.tensor(index, device=x.device) for index in (rows, channels, columns))
        tap = tap.index_select(0, to).index_select(1, among)
        y = y.index_add(1, to, torch.einsum("oc,bchw->bohw", tap, part.index_select(1, of)))
    if bias is not None:
        y = y + bias.to(wide)[:, None, None]
    return y.to(x.dtype)
