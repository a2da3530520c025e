"""Layers of PixelCNN++ and PixelSNAIL: shifted convolutions with normalised weights, gated residual blocks, attention
to what precedes a pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import ops
from genfuse.nn.flow.linear import _Remembered, at_least_float32
from genfuse.nn.sampling import _check_number, _check_size, _several_processes

__all__ = [
    "DownRightShiftedConv2d",
    "DownRightShiftedConvTranspose2d",
    "DownShiftedConv2d",
    "DownShiftedConvTranspose2d",
    "GatedResNet",
    "NetworkInNetwork",
    "WeightNormConv2d",
    "causal_attention",
    "down_shift",
    "right_shift",
]

NONLINEARITIES = {"concat_elu": 2, "elu": 1, "relu": 1}  # and how many times the channels there are after each


def _pair(module: str, argument: str, size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, Sequence) and not isinstance(size, (str, bytes)):
        if len(size) != 2:
            raise ValueError(f"{module}: {argument} must be an int or a pair of ints, got {list(size)}")
        return _check_size(module, argument, size[0]), _check_size(module, argument, size[1])
    found = _check_size(module, argument, size)
    return found, found


class WeightNormConv2d(torch.nn.Module):
    r"""A convolution with a normalised weight, which the first batch in training sets up; base of the shifted ones.

    .. math:: W = g \, V / \lVert V \rVert

    for each output channel: Salimans and Kingma 2016 (arXiv 1602.07868), eq. 2. The first batch that `forward` sees in
    training mode sets g and the bias so that each channel of the result has mean 0 and the standard deviation
    `init_scale` over that batch (eq. 5 and 6; one that is the same everywhere gets g = `init_scale`), and no later one
    does, nor after loading a state_dict of a layer that had its first batch (the buffer `initialized`). Whether it has
    had it is remembered in Python, too, so no step waits for the device. With several processes (`torch.distributed`)
    the batch is that of all of them, and all have the same parameters. Until then g is 1 and the bias 0. Under
    `torch.compile` the first batch has a graph of its own.

    While parameters stay as they are and no gradient is wanted, W is computed once. It is computed in float32 or wider,
    whatever autocast says.

    Args:
        in_channels, out_channels: I and O.
        kernel_size: ``(kh, kw)``, or one number for both.
        stride: 1 or 2.
        init_scale: the standard deviation that the first batch gives.

    Parameters: ``weight_v [O, I, kh, kw]`` (of transposed ones, too), ``weight_g [O]``, ``bias [O]``.

    Raises:
        TypeError: a size is no int, x no Tensor.
        ValueError: a size below 1, another stride, or x has other channels.

    Example:
        >>> layer = WeightNormConv2d(3, 8, 1)
        >>> y = layer(5.0 + 2.0 * torch.randn(16, 3, 8, 8))
        >>> bool(y.mean().abs() < 1e-4), bool((y.std() - 1).abs() < 1e-2)
        (True, True)
    """

    initialized: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int = 1,
        *,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = _check_size(name, "in_channels", in_channels)
        self.out_channels = _check_size(name, "out_channels", out_channels)
        self.kernel_size = _pair(name, "kernel_size", kernel_size)
        self.stride = _check_size(name, "stride", stride)
        if self.stride > 2:
            raise ValueError(f"{name}: stride must be 1 or 2, got {self.stride}")
        _check_number(name, "init_scale", init_scale)
        self.init_scale = float(init_scale)
        self.weight_v = torch.nn.Parameter(0.05 * torch.randn(self.out_channels, self.in_channels, *self.kernel_size))
        self.weight_g = torch.nn.Parameter(torch.ones(self.out_channels))
        self.bias = torch.nn.Parameter(torch.zeros(self.out_channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._ready = False
        self._weight = _Remembered()

    def extra_repr(self) -> str:
        kernel = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return kernel + (f", stride={self.stride}" if self.stride > 1 else "")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.initialized.is_meta:
            self._ready = bool(self.initialized)

    @property
    def weight(self) -> Tensor:
        """W, ``[O, I, kh, kw]``."""
        found: Tensor = self._weight.get([self.weight_v, self.weight_g], self._normalise)
        return found

    def _normalise(self) -> Tensor:
        with torch.autocast(self.weight_v.device.type, enabled=False):
            scaled = self._direction() * at_least_float32(self.weight_g)[:, None, None, None]
            return scaled.to(self.weight_v.dtype)

    def _direction(self) -> Tensor:
        wide = at_least_float32(self.weight_v)
        square = wide.square().sum((1, 2, 3), keepdim=True)
        return wide * torch.rsqrt(square.clamp(min=1e-24))  # a V of zeros stays one

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride)

    def initialize(self, x: Tensor) -> None:
        """Set g and the bias by a batch, whatever the mode and whether they were set before.

        Args:
            x: ``[B, I, H, W]``, of all processes together. Where there are no numbers in it, or some that are not
                finite, nothing is set.
        """
        self._check(x)
        self._initialize(x, anew=True)

    @torch.no_grad()
    def _initialize(self, x: Tensor, anew: bool) -> None:
        with torch.autocast(x.device.type, enabled=False):
            direction = self._direction()
            values = self._convolve(x.detach().to(direction.dtype), direction, None).double()
        dims = (0, 2, 3)
        count = values.new_full((1,), values.numel() // self.out_channels)
        total = values.sum(dims)
        several = _several_processes()
        if several:
            both = torch.cat([count, total])
            torch.distributed.all_reduce(both)
            count, total = both[:1], both[1:]
        elif values.numel() == 0:
            return
        # No process may stay behind, so an empty batch of all is told by its count.
        some = count > 0
        mean = total / count.clamp(min=1.0)
        square = (values - mean[:, None, None]).square().sum(dims)
        if several:
            torch.distributed.all_reduce(square)
        variance = square / count.clamp(min=1.0)
        scale = self.init_scale / (variance + 1e-10).sqrt()
        # Where all positions are the same (a stream of rows above that has but one row) there is nothing to scale to,
        # and what differs later would be 1e5 times as large.
        scale = torch.where(variance > 1e-10 * (1.0 + mean.square()), scale, self.init_scale)
        some = some & mean.isfinite().all() & variance.isfinite().all()
        if not anew:  # the buffer may have been copied from a layer that was set, which nothing tells
            some = some & ~self.initialized
        self.weight_g.copy_(torch.where(some, scale, self.weight_g.double()))
        self.bias.copy_(torch.where(some, -mean * scale, self.bias.double()))
        self.initialized.logical_or_(some.squeeze(0))
        self._ready = torch.compiler.is_compiling() or bool(self.initialized)

    def _check(self, x: Tensor) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: x must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.size(1) != self.in_channels:
            raise ValueError(f"{name}: x must be [B, {self.in_channels}, H, W], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.training and not self._ready:
            self._initialize(x, anew=False)
        return self._convolve(x, self.weight, self.bias)


class NetworkInNetwork(WeightNormConv2d):
    """A 1x1 convolution with a normalised weight: PixelCNN++'s ``nin``. See `WeightNormConv2d`.

    Args:
        in_channels, out_channels: I and O.
        init_scale: the standard deviation that the first batch gives.

    Raises:
        TypeError, ValueError: as `WeightNormConv2d`.

    Example:
        >>> NetworkInNetwork(3, 8)(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, *, init_scale: float = 1.0) -> None:
        super().__init__(in_channels, out_channels, 1, init_scale=init_scale)


class DownShiftedConv2d(WeightNormConv2d):
    """A convolution that sees its own row and those above it, with as many columns on the left as on the right.

    Salimans et al. 2017 (arXiv 1701.05517), as in the code published with it: the image is padded and the kernel is
    dense, so no tap is masked. With a stride of 2 position y sees rows up to 2 y. The weight is normalised: see
    `WeightNormConv2d`.

    Args:
        in_channels, out_channels: I and O.
        kernel_size: ``(kh, kw)`` with odd kw.
        stride: 1 or 2.
        init_scale: the standard deviation that the first batch gives.

    Raises:
        TypeError, ValueError: as `WeightNormConv2d`, or an even kw.

    Example:
        >>> DownShiftedConv2d(3, 8)(torch.randn(2, 3, 4, 6)).shape
        torch.Size([2, 8, 4, 6])
    """

    offset: tuple[int, int]  # of the first tap from the position that sees it

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = (2, 3),
        stride: int = 1,
        *,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, init_scale=init_scale)
        _check_odd(self)
        self.offset = 1 - self.kernel_size[0], -(self.kernel_size[1] // 2)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        side = self.kernel_size[1] // 2
        return F.conv2d(F.pad(x, (side, side, self.kernel_size[0] - 1, 0)), weight, bias, self.stride)


class DownRightShiftedConv2d(WeightNormConv2d):
    """A convolution that sees its own row and column, those above, and those to the left.

    Salimans et al. 2017 (arXiv 1701.05517). With a stride of 2 position (y, x) sees up to (2 y, 2 x). The
    weight is normalised: see `WeightNormConv2d`.

    Args:
        in_channels, out_channels: I and O.
        kernel_size: ``(kh, kw)``.
        stride: 1 or 2.
        init_scale: the standard deviation that the first batch gives.

    Raises:
        TypeError, ValueError: as `WeightNormConv2d`.

    Example:
        >>> DownRightShiftedConv2d(3, 8, stride=2)(torch.randn(2, 3, 4, 6)).shape
        torch.Size([2, 8, 2, 3])
    """

    offset: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = (2, 2),
        stride: int = 1,
        *,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, init_scale=init_scale)
        self.offset = 1 - self.kernel_size[0], 1 - self.kernel_size[1]

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        above, left = self.kernel_size[0] - 1, self.kernel_size[1] - 1
        return F.conv2d(F.pad(x, (left, 0, above, 0)), weight, bias, self.stride)


class DownShiftedConvTranspose2d(WeightNormConv2d):
    """Twice the height and width, by the transpose of a `DownShiftedConv2d` of stride 2: rows 2 y and 2 y + 1 see rows
    up to y.

    Salimans et al. 2017 (arXiv 1701.05517), section 2.3. The weight is normalised: see `WeightNormConv2d`.

    Args:
        in_channels, out_channels: I and O.
        kernel_size: ``(kh, kw)`` with odd kw, both at least 2.
        init_scale: the standard deviation that the first batch gives.

    Raises:
        TypeError, ValueError: as `WeightNormConv2d`, or a kernel that does not fit.

    Example:
        >>> DownShiftedConvTranspose2d(3, 8)(torch.randn(2, 3, 4, 6)).shape
        torch.Size([2, 8, 8, 12])
    """

    offset: tuple[int, int]  # of the first tap's place from twice the position

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = (2, 3),
        *,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, 2, init_scale=init_scale)
        _check_odd(self)
        _check_covers(self)
        self.offset = 0, -(self.kernel_size[1] // 2)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), bias, 2)
        side = self.kernel_size[1] // 2
        return y[:, :, : 2 * x.size(2), side : side + 2 * x.size(3)]


class DownRightShiftedConvTranspose2d(WeightNormConv2d):
    """Twice the height and width, by the transpose of a `DownRightShiftedConv2d` of stride 2: positions from (2 y, 2 x)
    on see up to (y, x).

    Salimans et al. 2017 (arXiv 1701.05517), section 2.3. The weight is normalised: see `WeightNormConv2d`.

    Args:
        in_channels, out_channels: I and O.
        kernel_size: ``(kh, kw)``, both at least 2.
        init_scale: the standard deviation that the first batch gives.

    Raises:
        TypeError, ValueError: as `WeightNormConv2d`, or a kernel that does not fit.

    Example:
        >>> DownRightShiftedConvTranspose2d(3, 8)(torch.randn(2, 3, 4, 6)).shape
        torch.Size([2, 8, 8, 12])
    """

    offset: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = (2, 2),
        *,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, 2, init_scale=init_scale)
        _check_covers(self)
        self.offset = 0, 0

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), bias, 2)
        return y[:, :, : 2 * x.size(2), : 2 * x.size(3)]


def _check_odd(module: WeightNormConv2d) -> None:
    if module.kernel_size[1] % 2 == 0:
        raise ValueError(f"{type(module).__name__}: kernel_size must be odd in its width, got {module.kernel_size}")


def _check_covers(module: WeightNormConv2d) -> None:
    if min(module.kernel_size) < 2:
        raise ValueError(f"{type(module).__name__}: kernel_size must be at least 2, got {module.kernel_size}")


def down_shift(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` a row down: the first is 0, the last is gone.

    Example:
        >>> down_shift(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0, 0]
        tensor([[0., 0.],
                [1., 2.]])
    """
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def right_shift(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` a column to the right: the first is 0, the last is gone.

    Example:
        >>> right_shift(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0, 0]
        tensor([[0., 1.],
                [0., 3.]])
    """
    return F.pad(x[:, :, :, :-1], (1, 0))


def _nonlinear(x: Tensor, kind: str) -> Tensor:
    if kind == "concat_elu":
        return ops.concat_elu(x)
    return F.elu(x) if kind == "elu" else F.relu(x)


class GatedResNet(torch.nn.Module):
    r"""PixelCNN++'s residual block: two convolutions, another input, dropout, classes, and a gate.

    .. math:: y = x + a \odot \sigma(b), \quad [a; b] = c_2(\mathrm{dropout}(f(c_1(f(x)) + \mathrm{nin}(f(s))))) + h

    with f the nonlinearity, s the other input (a shortcut, the other stream) and h that of the class: Salimans et al.
    2017 (arXiv 1701.05517), section 2 and its code. Gate and residual, and the nonlinearity, are one pass each.

    Args:
        channels: C of x.
        conv: of both convolutions: "down" (`DownShiftedConv2d`), "down_right" (`DownRightShiftedConv2d`), or "nin".
        aux_channels: of s, if there is one.
        dropout: probability of a number's being 0, in training.
        nonlinearity: "concat_elu", "elu" or "relu".
        num_classes: of a block with labels.

    Raises:
        TypeError: a size is no int.
        ValueError: a size below 1, an unknown convolution or nonlinearity; s is missing or superfluous.

    Example:
        >>> block = GatedResNet(8, "down_right", aux_channels=8)
        >>> x = torch.randn(2, 8, 4, 4)
        >>> block(x, x).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        conv: str = "down_right",
        *,
        aux_channels: int | None = None,
        dropout: float = 0.5,
        nonlinearity: str = "concat_elu",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        channels = _check_size("GatedResNet", "channels", channels)
        if nonlinearity not in NONLINEARITIES:
            known = ", ".join(map(repr, NONLINEARITIES))
            raise ValueError(f"GatedResNet: nonlinearity must be one of {known}; got {nonlinearity!r}")
        _check_number("GatedResNet", "dropout", dropout)
        if not dropout < 1.0:
            raise ValueError(f"GatedResNet: dropout must be in [0, 1), got {dropout}")
        self.nonlinearity, self.dropout = nonlinearity, float(dropout)
        wider = NONLINEARITIES[nonlinearity]
        self.conv_in = _convolution(conv, wider * channels, channels, 1.0)
        self.aux: NetworkInNetwork | None = None
        if aux_channels is not None:
            aux_channels = _check_size("GatedResNet", "aux_channels", aux_channels)
            self.aux = NetworkInNetwork(wider * aux_channels, channels)
        # A tenth of the deviation: a block starts close to the identity.
        self.conv_out = _convolution(conv, wider * channels, 2 * channels, 0.1)
        self.condition: torch.nn.Embedding | None = None
        if num_classes is not None:
            self.condition = torch.nn.Embedding(_check_size("GatedResNet", "num_classes", num_classes), 2 * channels)
            torch.nn.init.normal_(self.condition.weight, std=0.05)

    def forward(self, x: Tensor, aux: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Of x ``[B, C, H, W]``, another input ``[B, aux_channels, H, W]`` and int64 labels ``[B]``: of x's shape."""
        if (aux is None) != (self.aux is None):
            raise ValueError(f"GatedResNet: aux must {'not ' if self.aux is None else ''}be given")
        if (labels is None) != (self.condition is None):
            raise ValueError(f"GatedResNet: labels must {'not ' if self.condition is None else ''}be given")
        y = self.conv_in(_nonlinear(x, self.nonlinearity))
        if self.aux is not None:
            assert aux is not None
            y = y + self.aux(_nonlinear(aux, self.nonlinearity))
        y = F.dropout(_nonlinear(y, self.nonlinearity), self.dropout, self.training)
        condition = None if self.condition is None else self.condition(labels)
        return ops.gated_activation(self.conv_out(y), condition, residual=x, activation="linear")


def _convolution(kind: str, ins: int, outs: int, init_scale: float) -> WeightNormConv2d:
    if kind == "down":
        return DownShiftedConv2d(ins, outs, init_scale=init_scale)
    if kind == "down_right":
        return DownRightShiftedConv2d(ins, outs, init_scale=init_scale)
    if kind == "nin":
        return NetworkInNetwork(ins, outs, init_scale=init_scale)
    raise ValueError(f"GatedResNet: conv must be 'down', 'down_right' or 'nin', got {kind!r}")


def causal_attention(query: Tensor, key: Tensor, value: Tensor, heads: int = 1) -> Tensor:
    """Scaled dot-product attention of every pixel to those before it in raster order, not to itself; 0 of the first.

    Chen et al. 2017 (arXiv 1712.09763); by torch's ``scaled_dot_product_attention``. What is not
    finite in a key or value reaches no pixel up to its own, and makes NaN of all after it.

    Args:
        query, key: ``[B, D, H, W]``.
        value: ``[B, E, H, W]``.
        heads: that divide D and E.

    Returns:
        ``[B, E, H, W]``.

    Raises:
        TypeError: heads is no int.
        ValueError: heads do not divide the channels.

    Example:
        >>> x = torch.tensor([[[[1.0, 2.0, 4.0]]]])
        >>> causal_attention(torch.zeros(1, 1, 1, 3), x, x)
        tensor([[[[0.0000, 1.0000, 1.5000]]]])
    """
    batch, outputs, height, width = value.shape
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"causal_attention: heads must be an int, got {type(heads).__name__}")
    if heads < 1 or query.size(1) % heads or outputs % heads:
        raise ValueError(f"causal_attention: {heads} heads must divide {query.size(1)} and {outputs} channels")
    # Row n of what is asked meets row n of what is seen, but is of pixel n + 1: the mask that includes the diagonal,
    # which is the fast one, then excludes the pixel itself, and no row of it is empty.
    asked = query.flatten(2)[:, :, 1:]
    seen_key, seen_value = key.flatten(2)[:, :, :-1], value.flatten(2)[:, :, :-1]
    # A masked weight is 0 and not absent, and 0 times NaN is NaN.
    finite = seen_key.isfinite().all(1, keepdim=True) & seen_value.isfinite().all(1, keepdim=True)
    zero = torch.zeros((), dtype=key.dtype, device=key.device)
    parts = [asked, torch.where(finite, seen_key, zero), torch.where(finite, seen_value, zero.to(value.dtype))]
    q, k, v = (part.reshape(batch, heads, part.size(1) // heads, part.size(2)).transpose(2, 3) for part in parts)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(2, 3).flatten(1, 2)
    spoilt = (~finite).to(torch.int32).cumsum(2) > 0
    mixed = mixed.masked_fill(spoilt, math.nan)
    return F.pad(mixed, (1, 0)).view(batch, outputs, height, width)
