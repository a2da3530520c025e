"""The masked convolution of autoregressive image models: only the live taps are read, and only they are multiplied.

The definition is in `genfuse.reference.masked_conv.conv`; one registered operator with the rules of `operator.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfuse.ops.operator import Operator, lowered, on_cpu
from genfuse.ops.sampling import check_tensor
from genfuse.reference.masked_conv import conv as reference

__all__ = ["masked_conv2d"]

# The operator knows a mask by its place here, and so do the kernels.
_MASKS = ("A", "B", "vertical_A", "vertical_B", "horizontal_A", "horizontal_B")
_NAMES = {**{name: code for code, name in enumerate(_MASKS)}, "vertical": 2, "horizontal": 4}
_ORDERS = ("contiguous", "interleaved")
_MOST_GROUPS = 65536  # of channels; the kernels multiply it by their number
_MOST = 1 << 24  # of dilation and padding; the kernels multiply them by the kernel's size


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: int,
    channel_groups: int,
    interleaved: bool,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
) -> Tensor:
    height = x.shape[2] + 2 * padding_h - dilation_h * (weight.shape[2] - 1)
    width = x.shape[3] + 2 * padding_w - dilation_w * (weight.shape[3] - 1)
    last = _is_channels_last(x) or _is_channels_last(weight)
    return torch.empty(
        (x.shape[0], weight.shape[0], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _fake_gradient(index: int, tensor: Tensor) -> Tensor:
    last = index == 0 and _is_channels_last(tensor)
    return torch.empty_like(tensor, memory_format=torch.channels_last if last else torch.contiguous_format)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: int,
    channel_groups: int,
    interleaved: bool,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
) -> tuple[Tensor]:
    order, padding, dilation = _ORDERS[interleaved], (padding_h, padding_w), (dilation_h, dilation_w)
    y = reference.masked_conv2d(x, weight, bias, _MASKS[mask], channel_groups, order, padding, dilation, groups)
    last = _is_channels_last(x) or _is_channels_last(weight)
    return (y.contiguous(memory_format=torch.channels_last) if last else y,)


_MASKED_CONV2D = Operator(
    name="masked_conv2d",
    arguments=(
        *("x", "weight", "bias", "mask", "channel_groups", "interleaved"),
        *("padding_h", "padding_w", "dilation_h", "dilation_w", "groups"),
    ),
    tensors=3,
    differentiable=3,
    outputs=1,
    reference=_reference,
    fake=_fake,
    fake_gradient=_fake_gradient,
    module="masked_conv",
    lowers=True,
)


def _autocast_is_on(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _check_whole(op: str, name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    return value


def _check_pair(op: str, name: str, value: object, least: int, words: str = "") -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{op}: {name} must be{words} an int or a pair of ints, got {value!r}")
        return _check_whole(op, name, value[0], least), _check_whole(op, name, value[1], least)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be{words} an int or a pair of ints, got {type(value).__name__}")
    _check_whole(op, name, value, least)
    return value, value


def _check_most(op: str, name: str, pair: tuple[int, int]) -> None:
    for value in pair:
        if value > _MOST:
            raise ValueError(f"{op}: {name} must be at most {_MOST}, got {value}")


def check_mask(op: str, mask_type: object, channel_groups: object, channel_order: object) -> tuple[int, int, bool]:
    """The options of a mask as the operator takes them; raises what is wrong with them."""
    if not isinstance(mask_type, str) or mask_type not in _NAMES:
        raise ValueError(f"{op}: mask_type must be one of {', '.join(map(repr, _NAMES))}, got {mask_type!r}")
    count = _check_whole(op, "channel_groups", channel_groups, 1)
    if count > _MOST_GROUPS:
        raise ValueError(f"{op}: channel_groups must be at most {_MOST_GROUPS}, got {count}")
    if not isinstance(channel_order, str) or channel_order not in _ORDERS:
        raise ValueError(f"{op}: channel_order must be 'contiguous' or 'interleaved', got {channel_order!r}")
    return _NAMES[mask_type], count, channel_order == "interleaved"


def check_padding(op: str, padding: object, dilation: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Zeros on each side, of an argument that may be "same"."""
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0
        if padding != "same":
            raise ValueError(f"{op}: padding must be 'same', 'valid', an int or a pair of ints, got {padding!r}")
        return dilation[0] * (size[0] // 2), dilation[1] * (size[1] // 2)
    return _check_pair(op, "padding", padding, 0, " 'same', 'valid',")


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_type: str = "B",
    *,
    channel_groups: int = 1,
    channel_order: str = "contiguous",
    padding: str | int | tuple[int, int] = "same",
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""A convolution that sees only the pixels before its own in raster order, and takes the time of those alone.

    .. math:: y_{bors} = \beta_o + \sum_{(c, i, j)\ \mathrm{alive\ for}\ o} W_{ocij}\,
        x_{b, c, r + i d_h - p_h, s + j d_w - p_w}

    Van den Oord, Kalchbrenner and Kavukcuoglu 2016 (arXiv 1601.06759), section 3.4 and figure 2; the stacks of the
    gated PixelCNN: van den Oord et al. 2016 (arXiv 1606.05328), section 2.2. Equal to ``F.conv2d(x, weight * mask)``
    with `genfuse.reference.masked_conv.live_taps` as the mask, but that dead taps are never read, neither of x nor of
    the weight: NaN or infinity in the future of a pixel does not reach it, dead weights may be anything, and their
    gradients are exactly 0.

    ================================ ==============================================================================
    ``mask_type``                    live taps
    ================================ ==============================================================================
    "A"                              rows above; left of the centre; of the centre the channel groups before the
                                     output's (none if there is one group)
    "B"                              the same, and of the centre the output's own channel group
    "vertical_A" or "vertical"       rows above
    "vertical_B"                     rows above and the whole row of the centre
    "horizontal_A" or "horizontal"   left of the centre in its row; of the centre as "A"
    "horizontal_B"                   the same, of the centre as "B"
    ================================ ==============================================================================

    Args:
        x: ``[B, I, H, W]`` or, of one image, ``[I, H, W]``, any strides; float32, float64, bfloat16 or float16 (which
            are computed in float32); differentiable, as weight and bias are. Fastest in ``torch.channels_last``, which
            is what the kernel works in.
        weight: ``[O, I / groups, kh, kw]`` with odd kh and kw, of x's dtype.
        bias: ``[O]`` of x's dtype.
        mask_type: see above.
        channel_groups: into how many groups the channels of x and of the result fall: 3 for the colours of RGB.
        channel_order: "contiguous": channel c of C belongs to group c G // C; "interleaved": to group c % G.
        padding: zeros on each side, ``(ph, pw)`` or one number for both, at most 2^24; "same" keeps the size, "valid"
            is 0.
        dilation: distance of the taps, ``(dh, dw)`` or one number, at most 2^24.
        groups: of channels that see only each other, as of ``F.conv2d``.

    Returns:
        ``[B, O, H + 2 ph - dh (kh - 1), W + 2 pw - dw (kw - 1)]`` of x's dtype, without B if x has none; in
        channels_last if x or the weight is.
        Under autocast x, weight and bias follow it, as those of ``F.conv2d`` do. No sum depends on the number of
        threads.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating, an unknown mask or order, an even kernel, a number out of its range.
        RuntimeError: shapes do not fit, dtypes or devices differ.

    Example:
        >>> x, weight = torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, 3)
        >>> masked_conv2d(x, weight, mask_type="A")[0, 0]
        tensor([[0., 1., 1.],
                [2., 4., 3.]])
    """
    op = "masked_conv2d"
    if _autocast_is_on(x):
        x, weight, bias = lowered(x.device.type, x, weight, bias)
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight, ("x", x))
    code, count, interleaved = check_mask(op, mask_type, channel_groups, channel_order)
    _check_whole(op, "groups", groups, 1)
    if x.dim() not in (3, 4):
        raise RuntimeError(f"{op}: x must be [B, I, H, W] or [I, H, W], got {list(x.shape)}")
    alone = x.dim() == 3
    if alone:
        x = x.unsqueeze(0)
    channels = x.shape[1]
    if channels % groups != 0:
        raise RuntimeError(f"{op}: groups must divide the {channels} channels of x, got {groups}")
    if weight.dim() != 4 or weight.shape[1] != channels // groups:
        raise RuntimeError(
            f"{op}: weight must be [O, {channels // groups}, kh, kw], with x's channels / groups; "
            f"got {list(weight.shape)}"
        )
    outputs, size = weight.shape[0], (weight.shape[2], weight.shape[3])
    if outputs % groups != 0:
        raise RuntimeError(f"{op}: groups must divide the {outputs} outputs of weight, got {groups}")
    if size[0] % 2 == 0 or size[1] % 2 == 0:
        raise ValueError(f"{op}: weight must have an odd kernel, which has a centre; got {size[0]} x {size[1]}")
    if bias is not None:
        check_tensor(op, "bias", bias, ("x", x))
        if bias.dim() != 1 or bias.shape[0] != outputs:
            raise RuntimeError(f"{op}: bias must be [{outputs}], the outputs of weight; got {list(bias.shape)}")
    spread = _check_pair(op, "dilation", dilation, 1)
    _check_most(op, "dilation", spread)
    border = check_padding(op, padding, spread, size)
    _check_most(op, "padding", border)
    for name, length, pad, step, taps in zip(("H", "W"), x.shape[2:], border, spread, size, strict=True):
        if length + 2 * pad < step * (taps - 1) + 1:
            raise RuntimeError(
                f"{op}: x must have at least the kernel's extent {step * (taps - 1) + 1} in {name} with its padding "
                f"{pad} on both sides, got {length}"
            )
    arguments: tuple[Any, ...] = (x, weight, bias, code, count, interleaved, *border, *spread, groups)
    (y,) = _MASKED_CONV2D.run(op, x, arguments)
    return y.squeeze(0) if alone else y


_MASKED_CONV2D.enter(masked_conv2d, "x")
if on_cpu:
    _MASKED_CONV2D.register()
