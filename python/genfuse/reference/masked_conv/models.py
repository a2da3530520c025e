"""The autoregressive image models in plain PyTorch: the definitions of `genfuse.models.PixelCNN`, `GatedPixelCNN`,
`PixelCNNPlusPlus` and `PixelSNAIL`.

Each twin has its original's arguments and ``state_dict``, and the methods that define it: ``forward``, ``log_prob``,
``loss``, ``bits_per_dim`` and ``sample``, the naive loop. The same ``state_dict``, images and uniforms give the same
likelihoods, gradients and samples. They are written as the field writes them: weights times masks, halves by
``chunk``, cross entropy over levels, the mixture of logistics as published, and one pass over the whole image for each
pixel that is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.reference.random import draw_rng, uniform

__all__ = ["GatedPixelCNN", "PixelCNN", "PixelCNNPlusPlus", "PixelSNAIL"]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


# ---- likelihoods -----------------------------------------------------------------------------------------------------


def _mixture_parts(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-weights ``[B, M, H, W]``, means and log-scales ``[B, C, M, H, W]``, the means coupled by the values x."""
    channels = x.size(1)
    components = params.size(1) // (10 if channels == 3 else 3)
    log_weights = F.log_softmax(params[:, :components], 1)
    rest = params[:, components:].reshape(params.size(0), channels, -1, components, *params.shape[2:])  # B C kind M H W
    means, log_scales = rest[:, :, 0], rest[:, :, 1].clamp(min=-7.0)
    if channels == 3:
        coefficients = rest[:, :, 2].tanh()
        red, green = x[:, 0, None], x[:, 1, None]
        mean_green = means[:, 1] + coefficients[:, 0] * red
        mean_blue = means[:, 2] + coefficients[:, 1] * red + coefficients[:, 2] * green
        means = torch.stack([means[:, 0], mean_green, mean_blue], 1)
    return log_weights, means, log_scales


def _log_probability(x: Tensor, means: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """ln (sigmoid(upper edge) - sigmoid(lower edge)) of the bin at x, exactly: -softplus(-a) - softplus(b) + ln(1 -
    e^(b - a))."""
    half = 1.0 / (levels - 1)
    upper = (x - means + half) * torch.exp(-log_scales)
    lower = (x - means - half) * torch.exp(-log_scales)
    width = 2.0 * half * torch.exp(-log_scales)
    inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width))
    bottom, top = x <= -1.0 + half, x >= 1.0 - half
    return torch.where(bottom, F.logsigmoid(upper), torch.where(top, F.logsigmoid(-lower), inside))


def _published_log_probability(x: Tensor, means: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """The same as in PixelCNN++'s code, where a bin of next to no probability has that of its middle."""
    centered, inv_stdv = x - means, torch.exp(-log_scales)
    plus_in, min_in = inv_stdv * (centered + 1.0 / (levels - 1)), inv_stdv * (centered - 1.0 / (levels - 1))
    mid_in = inv_stdv * centered
    cdf_delta = torch.sigmoid(plus_in) - torch.sigmoid(min_in)
    log_pdf_mid = mid_in - log_scales - 2.0 * F.softplus(mid_in)
    inside = torch.where(
        cdf_delta > 1e-5, torch.log(cdf_delta.clamp(min=1e-12)), log_pdf_mid - math.log((levels - 1) / 2)
    )
    log_cdf_plus, log_one_minus_cdf_min = plus_in - F.softplus(plus_in), -F.softplus(min_in)
    return torch.where(x < -0.999, log_cdf_plus, torch.where(x > 0.999, log_one_minus_cdf_min, inside))


def _mixture_log_prob(x: Tensor, params: Tensor, levels: int, mode: str) -> Tensor:
    """Of x in [-1, 1], per image: Salimans et al. 2017 (arXiv 1701.05517), eq. 1 to 3."""
    log_weights, means, log_scales = _mixture_parts(x, params)
    formula = _log_probability if mode == "exact" else _published_log_probability
    each = formula(x.unsqueeze(2), means, log_scales, levels).sum(1)
    return torch.logsumexp(log_weights + each, 1).flatten(1).sum(1)


def _inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """The first class of ``logits [B, L]`` whose cumulated probability exceeds u ``[B]``."""
    cumulated = F.softmax(logits, 1).cumsum(1)
    return (cumulated <= u.unsqueeze(1) * cumulated[:, -1:]).sum(1).clamp(max=logits.size(1) - 1)


def _draw_mixture(params: Tensor, u: Tensor, levels: int, channels: int) -> Tensor:
    """Levels ``[B, C]`` of one pixel, by ``params [B, K]`` and ``u [B, 1 + C]``."""
    params = params[:, :, None, None]
    values = params.new_zeros(params.size(0), channels, 1, 1)
    u = u.to(params.dtype)
    rows = torch.arange(len(u), device=u.device)
    for channel in range(channels):
        log_weights, means, log_scales = _mixture_parts(values, params)
        chosen = _inverse_cdf(log_weights[:, :, 0, 0], u[:, 0])
        noise = u[:, 1 + channel].clamp(1e-5, 1.0 - 1e-5)
        mean, log_scale = means[rows, channel, chosen, 0, 0], log_scales[rows, channel, chosen, 0, 0]
        drawn = mean + torch.exp(log_scale) * (torch.log(noise) - torch.log1p(-noise))
        level = ((drawn.clamp(-1.0, 1.0) + 1.0) / 2.0 * (levels - 1)).round()
        values = values.clone()
        values[:, channel, 0, 0] = level * 2.0 / (levels - 1) - 1.0
    return ((values[:, :, 0, 0] + 1.0) / 2.0 * (levels - 1)).round().long()


class _Autoregressive(torch.nn.Module):
    """p(x) as the product over pixels of p(pixel | those above and to the left)."""

    def __init__(
        self, in_channels: int, image_size: int | Sequence[int], levels: int, components: int | None, mode: str
    ) -> None:
        super().__init__()
        self.in_channels, self.image_size, self.levels = in_channels, _pair(image_size), levels
        self.components = None if levels == 2 else components
        self.mode, self.channel_order = mode, "contiguous"

    @property
    def outputs(self) -> int:
        """Channels of the head."""
        if self.components is not None:
            return (10 if self.in_channels == 3 else 3) * self.components
        return self.in_channels * (1 if self.levels == 2 else self.levels)

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def image(self, x: Tensor) -> Tensor:
        """What the network sees: values in [-1, 1]."""
        dtype = next(self.parameters()).dtype
        return x.to(dtype) * (2.0 if x.is_floating_point() else 2.0 / (self.levels - 1)) - 1.0

    def level(self, x: Tensor) -> Tensor:
        return (x * (self.levels - 1)).round().long() if x.is_floating_point() else x.long()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits ``[B, C, H, W]`` (two levels) or ``[B, C, levels, H, W]``, or the mixture's parameters."""
        out = self.network(self.image(x), labels)
        if self.components is not None or self.levels == 2:
            return out
        if self.channel_order == "contiguous":
            return out.view(out.size(0), self.in_channels, self.levels, *out.shape[2:])
        return out.view(out.size(0), self.levels, self.in_channels, *out.shape[2:]).transpose(1, 2)

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(x), ``[B]``, nats."""
        out, level = self(x, labels), self.level(x)
        if out.dtype != torch.float64:
            out = out.float()
        if self.components is not None:
            return _mixture_log_prob(level.to(out.dtype) * 2.0 / (self.levels - 1) - 1.0, out, self.levels, self.mode)
        if self.levels == 2:
            nll = F.binary_cross_entropy_with_logits(out, level.to(out.dtype), reduction="none")
        else:
            nll = F.cross_entropy(out.transpose(1, 2), level, reduction="none")
        return -nll.flatten(1).sum(1)

    def loss(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean of -ln p(x), nats per image."""
        return -self.log_prob(x, labels).mean()

    def bits_per_dim(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """-log_2 p(x) per number of the image, ``[B]``."""
        return -self.log_prob(x, labels) / (math.log(2.0) * math.prod(x.shape[1:]))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
        conditioned_on: Tensor | None = None,
    ) -> Tensor:
        """Images ``[n, C, H, W]`` in [0, 1], pixel by pixel with a pass over the image for each; in eval mode."""
        channels, (height, width) = self.in_channels, self.image_size
        like = next(self.parameters())
        draws = channels + (0 if self.components is None else 1)
        if u is None:
            u = uniform(draw_rng(like.device, generator), (n, draws, height, width))
        training = self.training
        self.eval()
        given = torch.full((n, channels, height, width), -1, device=like.device)
        if conditioned_on is not None:
            given = torch.where(conditioned_on >= 0, self.level(conditioned_on), -1)
        levels = given.clamp(min=0)
        for y in range(height):
            for x in range(width):
                for channel in range(channels if self.components is None else 1):
                    out = self(levels, labels)
                    if self.components is not None:
                        drawn = _draw_mixture(out[:, :, y, x], u[:, :, y, x], self.levels, channels)
                    elif self.levels == 2:
                        drawn = (u[:, channel, y, x] < torch.sigmoid(out[:, channel, y, x])).long()
                    else:
                        drawn = _inverse_cdf(out[:, channel, :, y, x], u[:, channel, y, x].to(out.dtype))
                    where = slice(None) if self.components is not None else channel
                    known = given[:, where, y, x]
                    levels[:, where, y, x] = torch.where(known >= 0, known, drawn)
        self.train(training)
        return levels.to(like.dtype) / (self.levels - 1)


# ---- masks -----------------------------------------------------------------------------------------------------------


def _groups(channels: int, groups: int, order: str) -> Tensor:
    index = torch.arange(channels)
    return index * groups // channels if order == "contiguous" else index % groups


class _MaskedConv2d(torch.nn.Conv2d):
    """A convolution whose weight is multiplied by a mask.

    ``"A"`` and ``"B"``: van den Oord et al. 2016 (arXiv 1601.06759), figure 2; ``"vertical"`` has the rows above,
    ``"vertical_B"`` those and the centre's.
    """

    mask: Tensor

    def __init__(
        self,
        kind: str,
        ins: int,
        outs: int,
        kernel: int | tuple[int, int],
        groups: int = 1,
        order: str = "contiguous",
        halves: int = 1,
        bias: bool = True,
    ) -> None:
        kernel = _pair(kernel)
        super().__init__(ins, outs, kernel, padding=(kernel[0] // 2, kernel[1] // 2), bias=bias)
        y, x = kernel[0] // 2, kernel[1] // 2
        mask = torch.zeros(outs, ins, *kernel)
        mask[:, :, :y] = 1.0
        if kind == "vertical_B":
            mask[:, :, y] = 1.0
        elif kind != "vertical":
            mask[:, :, y, :x] = 1.0
            after = _groups(outs // halves, groups, order).repeat(halves).unsqueeze(1)
            before = _groups(ins, groups, order).unsqueeze(0)
            mask[:, :, y, x] = (before < after if kind == "A" else before <= after).float()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


def _embedding(num_classes: int, features: int) -> torch.nn.Embedding:
    table = torch.nn.Embedding(num_classes, features)
    torch.nn.init.normal_(table.weight, std=0.05)
    return table


def _head(ins: int, hidden: Sequence[int], outs: int, groups: int, order: str) -> torch.nn.ModuleList:
    widths = [ins, *hidden, outs]
    return torch.nn.ModuleList([_MaskedConv2d("B", a, b, 1, groups, order) for a, b in itertools.pairwise(widths)])


class PixelCNN(_Autoregressive):
    """The plain twin of `genfuse.models.PixelCNN` (van den Oord et al. 2016, arXiv 1601.06759).

    Example:
        >>> model = PixelCNN(image_size=8, channels=6, num_layers=2, kernel_size=3, levels=2)
        >>> model.loss(torch.rand(2, 1, 8, 8).round()).shape, model.sample(3).shape
        (torch.Size([]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        channels: int = 64,
        num_layers: int = 8,
        kernel_size: int = 7,
        levels: int = 256,
        *,
        first_kernel_size: int | None = None,
        head_channels: Sequence[int] = (),
        residual: bool = False,
        num_classes: int | None = None,
        channel_order: str = "contiguous",
    ) -> None:
        super().__init__(in_channels, image_size, levels, None, "exact")
        self.channel_order, self.residual = channel_order, residual
        groups, order = in_channels, channel_order
        first = kernel_size if first_kernel_size is None else first_kernel_size
        layers = [_MaskedConv2d("A", in_channels, channels, first, groups, order)]
        for _ in range(num_layers - 1):
            layers.append(_MaskedConv2d("B", channels, channels, kernel_size, groups, order))
        self.layers = torch.nn.ModuleList(layers)
        self.conditions: torch.nn.ModuleList | None = None
        if num_classes is not None:
            self.conditions = torch.nn.ModuleList([_embedding(num_classes, channels) for _ in layers])
        self.head = _head(channels, head_channels, self.outputs, groups, order)

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            y = layer(x)
            if self.conditions is not None:
                y = y + self.conditions[index](labels)[:, :, None, None]
            y = F.relu(y)
            x = x + y if self.residual and index else y
        for index, layer in enumerate(self.head):
            x = layer(F.relu(x) if index else x)
        return x


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class _GatedLayer(torch.nn.Module):
    """Van den Oord et al. 2016 (arXiv 1606.05328), figure 2 and eq. 4."""

    def __init__(
        self,
        ins: int,
        channels: int,
        kernel: int,
        first: bool,
        last: bool,
        groups: int,
        order: str,
        num_classes: int | None,
        skip: bool,
    ) -> None:
        super().__init__()
        self.first, self.last = first, last
        kind = "vertical" if first else "vertical_B"
        self.vertical = _MaskedConv2d(kind, ins, 2 * channels, kernel, bias=False)
        self.vertical_bias = None if last else torch.nn.Parameter(torch.zeros(2 * channels))
        self.horizontal = _MaskedConv2d(
            "A" if first else "B", ins, 2 * channels, (1, kernel), groups, order, halves=2, bias=False
        )
        self.horizontal_bias = torch.nn.Parameter(torch.zeros(2 * channels))
        self.vertical_to_horizontal = torch.nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.output = None if last and skip else _MaskedConv2d("B", channels, channels, 1, groups, order)
        self.skip = _MaskedConv2d("B", channels, channels, 1, groups, order) if skip else None
        self.vertical_condition: torch.nn.Embedding | None = None
        self.horizontal_condition: torch.nn.Embedding | None = None
        if num_classes is not None:
            self.vertical_condition = None if last else _embedding(num_classes, 2 * channels)
            self.horizontal_condition = _embedding(num_classes, 2 * channels)

    def forward(self, v: Tensor, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        above = self.vertical(v)
        across = self.horizontal(h) + self.vertical_to_horizontal(above) + self.horizontal_bias[:, None, None]
        if self.horizontal_condition is not None:
            across = across + self.horizontal_condition(labels)[:, :, None, None]
        gated = _gate(across)
        out = gated
        if self.output is not None:
            out = self.output(gated) if self.first else h + self.output(gated)
        if self.vertical_bias is not None:
            above = above + self.vertical_bias[:, None, None]
            if self.vertical_condition is not None:
                above = above + self.vertical_condition(labels)[:, :, None, None]
            v = _gate(above)
        return v, out, None if self.skip is None else self.skip(gated)


class GatedPixelCNN(_Autoregressive):
    """The plain twin of `genfuse.models.GatedPixelCNN` (van den Oord et al. 2016, arXiv 1606.05328).

    Example:
        >>> model = GatedPixelCNN(image_size=8, channels=6, num_layers=2, levels=4, num_classes=10)
        >>> labels = torch.tensor([3, 7])
        >>> model.loss(torch.randint(4, (2, 1, 8, 8)), labels).shape, model.sample(2, labels=labels).shape
        (torch.Size([]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        channels: int = 64,
        num_layers: int = 8,
        kernel_size: int = 3,
        levels: int = 256,
        *,
        first_kernel_size: int | None = 7,
        head_channels: Sequence[int] = (),
        skip: bool = False,
        num_classes: int | None = None,
        channel_order: str = "contiguous",
    ) -> None:
        super().__init__(in_channels, image_size, levels, None, "exact")
        self.channel_order = channel_order
        first = kernel_size if first_kernel_size is None else first_kernel_size
        layers = []
        for index in range(num_layers):
            kernel, ins = (kernel_size, channels) if index else (first, in_channels)
            last = index == num_layers - 1
            layers.append(
                _GatedLayer(ins, channels, kernel, index == 0, last, in_channels, channel_order, num_classes, skip)
            )
        self.layers = torch.nn.ModuleList(layers)
        self.head = _head(channels, head_channels, self.outputs, in_channels, channel_order)

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        v = h = x
        total: Tensor | None = None
        for layer in self.layers:
            v, h, skip = layer(v, h, labels)
            if skip is not None:
                total = skip if total is None else total + skip
        h = h if total is None else total
        for layer in self.head:
            h = layer(F.relu(h))
        return h


# ---- shifted convolutions with normalised weights --------------------------------------------------------------------


class _WeightNorm(torch.nn.Module):
    """W = g V / |V|, whose first batch in training sets g and the bias so that outputs have mean 0 and the deviation
    `init_scale` (Salimans and Kingma 2016, arXiv 1602.07868)."""

    initialized: Tensor

    def __init__(self, ins: int, outs: int, kernel: tuple[int, int], stride: int = 1, init_scale: float = 1.0) -> None:
        super().__init__()
        self.kernel, self.stride, self.init_scale = kernel, stride, init_scale
        self.weight_v = torch.nn.Parameter(0.05 * torch.randn(outs, ins, *kernel))
        self.weight_g = torch.nn.Parameter(torch.ones(outs))
        self.bias = torch.nn.Parameter(torch.zeros(outs))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        direction = self.weight_v / self.weight_v.flatten(1).norm(dim=1)[:, None, None, None]
        if self.training and not bool(self.initialized):
            with torch.no_grad():
                y = self.convolve(x, direction, None).double()
                mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
                scale = self.init_scale / (variance + 1e-10).sqrt()
                scale[variance <= 1e-10 * (1 + mean.square())] = self.init_scale  # of the same number everywhere
                self.weight_g.copy_(scale)
                self.bias.copy_(-mean * scale)
                self.initialized.fill_(True)
        return self.convolve(x, self.weight_g[:, None, None, None] * direction, self.bias)


class _Down(_WeightNorm):
    """Sees the rows above and its own, as many columns to the left as to the right."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        side = (self.kernel[1] - 1) // 2
        return F.conv2d(F.pad(x, (side, side, self.kernel[0] - 1, 0)), weight, bias, self.stride)


class _DownRight(_WeightNorm):
    """Sees the rows above and its own, and columns to the left and its own."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (self.kernel[1] - 1, 0, self.kernel[0] - 1, 0)), weight, bias, self.stride)


class _DownTranspose(_WeightNorm):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), bias, self.stride)
        side = (self.kernel[1] - 1) // 2
        return y[:, :, : 2 * x.size(2), side : side + 2 * x.size(3)]


class _DownRightTranspose(_WeightNorm):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), bias, self.stride)
        return y[:, :, : 2 * x.size(2), : 2 * x.size(3)]


def _down_shift(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)


def _right_shift(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :, :, :1]), x[:, :, :, :-1]], 3)


def _concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], 1))


_NONLINEARITIES: dict[str, tuple[Any, int]] = {
    "concat_elu": (_concat_elu, 2),
    "elu": (F.elu, 1),
    "relu": (F.relu, 1),
}


class _GatedResNet(torch.nn.Module):
    """``x + a sigmoid(b)`` of two convolutions, with another input by a 1x1 convolution and classes before the gate."""

    def __init__(
        self,
        channels: int,
        conv: tuple[type[_WeightNorm], tuple[int, int]],
        aux: int,
        dropout: float,
        nonlinearity: str,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.nonlinearity, wider = _NONLINEARITIES[nonlinearity]
        self.dropout = dropout
        kind, kernel = conv
        self.conv_in = kind(wider * channels, channels, kernel)
        self.aux = _WeightNorm(wider * aux, channels, (1, 1)) if aux else None
        self.conv_out = kind(wider * channels, 2 * channels, kernel, 1, 0.1)
        self.condition = None if num_classes is None else _embedding(num_classes, 2 * channels)

    def forward(self, x: Tensor, aux: Tensor | None, labels: Tensor | None) -> Tensor:
        y = self.conv_in(self.nonlinearity(x))
        if self.aux is not None:
            y = y + self.aux(self.nonlinearity(aux))
        y = F.dropout(self.nonlinearity(y), self.dropout, self.training)
        y = self.conv_out(y)
        if self.condition is not None:
            y = y + self.condition(labels)[:, :, None, None]
        a, b = y.chunk(2, 1)
        out: Tensor = x + a * torch.sigmoid(b)
        return out


class _Start(torch.nn.Module):
    """The first layer of a stream that sees pixels above and to the left, and not the pixel itself."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.above = _Down(ins, outs, (1, 3))
        self.left = _DownRight(ins, outs, (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return _down_shift(self.above(x)) + _right_shift(self.left(x))


def _with_ones(x: Tensor) -> Tensor:
    """Tells the padding from black pixels."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


class PixelCNNPlusPlus(_Autoregressive):
    """The plain twin of `genfuse.models.PixelCNNPlusPlus` (Salimans et al. 2017, arXiv 1701.05517).

    Example:
        >>> model = PixelCNNPlusPlus(image_size=4, nr_resnet=1, nr_filters=4, nr_logistic_mix=2)
        >>> model.loss(torch.rand(2, 3, 4, 4)).shape, model.sample(1).shape
        (torch.Size([]), torch.Size([1, 3, 4, 4]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        nr_resnet: int = 5,
        nr_filters: int = 160,
        nr_logistic_mix: int | None = 10,
        *,
        levels: int = 256,
        dropout: float = 0.5,
        resnet_nonlinearity: str = "concat_elu",
        num_classes: int | None = None,
        scales: int = 3,
        mode: str = "exact",
    ) -> None:
        super().__init__(in_channels, image_size, levels, nr_logistic_mix, mode)
        filters, down, right = nr_filters, (_Down, (2, 3)), (_DownRight, (2, 2))
        rest = (dropout, resnet_nonlinearity, num_classes)

        def blocks(conv: Any, aux: int, count: int) -> torch.nn.ModuleList:
            return torch.nn.ModuleList([_GatedResNet(filters, conv, aux, *rest) for _ in range(count)])

        self.u_start = _Down(in_channels + 1, filters, (2, 3))
        self.ul_start = _Start(in_channels + 1, filters)
        counts = [nr_resnet + (scale > 0) for scale in range(scales)]  # of the way back
        self.u_up = torch.nn.ModuleList([blocks(down, 0, nr_resnet) for _ in counts])
        self.ul_up = torch.nn.ModuleList([blocks(right, filters, nr_resnet) for _ in counts])
        self.u_downsize = torch.nn.ModuleList([_Down(filters, filters, (2, 3), 2) for _ in counts[1:]])
        self.ul_downsize = torch.nn.ModuleList([_DownRight(filters, filters, (2, 2), 2) for _ in counts[1:]])
        self.u_down = torch.nn.ModuleList([blocks(down, filters, count) for count in counts])
        self.ul_down = torch.nn.ModuleList([blocks(right, 2 * filters, count) for count in counts])
        self.u_upsize = torch.nn.ModuleList([_DownTranspose(filters, filters, (2, 3), 2) for _ in counts[1:]])
        self.ul_upsize = torch.nn.ModuleList([_DownRightTranspose(filters, filters, (2, 2), 2) for _ in counts[1:]])
        self.head = _WeightNorm(filters, self.outputs, (1, 1))

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = _with_ones(x)
        us, uls = [_down_shift(self.u_start(x))], [self.ul_start(x)]
        for scale in range(len(self.u_up)):
            if scale:
                us.append(self.u_downsize[scale - 1](us[-1]))
                uls.append(self.ul_downsize[scale - 1](uls[-1]))
            for u_block, ul_block in zip(self.u_up[scale], self.ul_up[scale], strict=True):  # type: ignore[call-overload]
                us.append(u_block(us[-1], None, labels))
                uls.append(ul_block(uls[-1], us[-1], labels))
        u, ul = us.pop(), uls.pop()
        for scale in range(len(self.u_up)):
            if scale:
                u, ul = self.u_upsize[scale - 1](u), self.ul_upsize[scale - 1](ul)
            for u_block, ul_block in zip(self.u_down[scale], self.ul_down[scale], strict=True):  # type: ignore[call-overload]
                u = u_block(u, us.pop(), labels)
                ul = ul_block(ul, torch.cat([u, uls.pop()], 1), labels)
        assert not us
        assert not uls
        out: Tensor = self.head(F.elu(ul))
        return out


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Scaled dot products with the pixels before, in raster order; zeros for the first pixel."""
    batch, _, height, width = value.shape
    parts = (part.reshape(batch, heads, part.size(1) // heads, height * width) for part in (query, key, value))
    q, k, v = (part.transpose(2, 3) for part in parts)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
    before = torch.ones(height * width, height * width, dtype=torch.bool, device=q.device).tril(-1)
    probabilities = F.softmax(scores.masked_fill(~before, -math.inf)[:, :, 1:], 3)
    mixed = F.pad(probabilities @ v, (0, 0, 1, 0))
    return mixed.transpose(2, 3).reshape(batch, -1, height, width)


class _SnailBlock(torch.nn.Module):
    def __init__(self, filters: int, image: int, keys: int, values: int, heads: int, count: int, *rest: Any) -> None:
        super().__init__()
        self.keys, self.heads = keys, heads
        content, asked = image + filters + 2, filters + 2
        nin = (_WeightNorm, (1, 1))
        self.resnets = torch.nn.ModuleList(
            [_GatedResNet(filters, (_DownRight, (2, 2)), 0, *rest) for _ in range(count)]
        )
        self.content = _GatedResNet(content, nin, 0, *rest)
        self.key_value = _WeightNorm(content, keys + values, (1, 1))
        self.question = _GatedResNet(asked, nin, 0, *rest)
        self.query = _WeightNorm(asked, keys, (1, 1))
        self.merge = _GatedResNet(filters, nin, values, *rest)

    def forward(self, ul: Tensor, x: Tensor, background: Tensor, labels: Tensor | None) -> Tensor:
        for block in self.resnets:
            ul = block(ul, None, labels)
        both = self.key_value(self.content(torch.cat([x, ul, background], 1), None, labels))
        key, value = both[:, : self.keys], both[:, self.keys :]
        query = self.query(self.question(torch.cat([ul, background], 1), None, labels))
        out: Tensor = self.merge(ul, _causal_attention(query, key, value, self.heads), labels)
        return out


class PixelSNAIL(_Autoregressive):
    """The plain twin of `genfuse.models.PixelSNAIL` (Chen et al. 2017, arXiv 1712.09763).

    Example:
        >>> model = PixelSNAIL(image_size=4, nr_blocks=1, nr_resnet=1, nr_filters=4, nr_logistic_mix=2)
        >>> model.loss(torch.rand(2, 3, 4, 4)).shape, model.sample(1).shape
        (torch.Size([]), torch.Size([1, 3, 4, 4]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        nr_blocks: int = 6,
        nr_resnet: int = 5,
        nr_filters: int = 256,
        nr_logistic_mix: int | None = 10,
        *,
        key_channels: int = 16,
        value_channels: int | None = None,
        num_heads: int = 1,
        levels: int = 256,
        dropout: float = 0.5,
        resnet_nonlinearity: str = "concat_elu",
        num_classes: int | None = None,
        mode: str = "exact",
    ) -> None:
        super().__init__(in_channels, image_size, levels, nr_logistic_mix, mode)
        values = nr_filters // 2 if value_channels is None else value_channels
        rest = (nr_resnet, dropout, resnet_nonlinearity, num_classes)
        self.start = _Start(in_channels + 1, nr_filters)
        self.blocks = torch.nn.ModuleList(
            [_SnailBlock(nr_filters, in_channels, key_channels, values, num_heads, *rest) for _ in range(nr_blocks)]
        )
        self.head = _WeightNorm(nr_filters, self.outputs, (1, 1))

    def background(self, like: Tensor) -> Tensor:
        """Row and column of each pixel, from -1/2 to 1/2."""
        height, width = self.image_size
        rows = ((torch.arange(height) - height / 2) / height).to(like).view(1, 1, -1, 1)
        columns = ((torch.arange(width) - width / 2) / width).to(like).view(1, 1, 1, -1)
        shape = (like.size(0), 1, height, width)
        return torch.cat([rows.expand(shape), columns.expand(shape)], 1)

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        ul, background = self.start(_with_ones(x)), self.background(x)
        for block in self.blocks:
            ul = block(ul, x, background, labels)
        out: Tensor = self.head(F.elu(ul))
        return out
