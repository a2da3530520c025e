"""The flows in plain PyTorch: the definitions of `genfuse.models.RealNVP`, `Glow`, `NeuralSplineFlow`, `MAF` and `IAF`.

Each twin has its original's arguments (without `reversible`, which changes no result), ``state_dict`` and methods; from
the same ``state_dict`` and seed come the same densities, gradients and samples.

A layer has one method of each direction: `forward` from data to noise and `inverse` back, with ln |det| of each row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.reference.random import draw_rng
from genfuse.reference.sampling import philox_normal

from .coupling import additive_coupling, affine_coupling, split_channels
from .pointwise import actnorm, dequantize_logit, logit_quantize
from .spline import spline

__all__ = ["IAF", "MAF", "Glow", "NeuralSplineFlow", "RealNVP"]

Found = tuple[Tensor, Tensor]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.size(0))


# ---- networks --------------------------------------------------------------------------------------------------------


class _MLP(torch.nn.Module):
    def __init__(self, ins: int, outs: int, hidden: Sequence[int], context: int | None, zero: bool) -> None:
        super().__init__()
        widths = [ins, *hidden, outs]
        self.layers = torch.nn.ModuleList([torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        self.context_layer = None if context is None else torch.nn.Linear(context, widths[1], bias=False)
        if zero:
            torch.nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
            torch.nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h: Tensor = self.layers[0](x)
        if self.context_layer is not None:
            h = h + self.context_layer(context)
        for layer in self.layers[1:]:
            h = layer(F.relu(h))
        return h


class _Block(torch.nn.Module):
    def __init__(self, units: int, context: int | None) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(units, units) for _ in range(2)])
        self.gate = None if context is None else torch.nn.Linear(context, units)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h: Tensor = self.layers[1](F.relu(self.layers[0](F.relu(x))))
        return x + (h if self.gate is None else h * torch.sigmoid(self.gate(context)))


class _ResidualNet(torch.nn.Module):
    def __init__(self, ins: int, outs: int, hidden: Sequence[int], context: int | None) -> None:
        super().__init__()
        self.first = torch.nn.Linear(ins, hidden[0])
        self.context_layer = None if context is None else torch.nn.Linear(context, hidden[0], bias=False)
        self.blocks = torch.nn.ModuleList([_Block(hidden[0], context) for _ in hidden])
        self.last = torch.nn.Linear(hidden[0], outs)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h: Tensor = self.first(x)
        if self.context_layer is not None:
            h = h + self.context_layer(context)
        for block in self.blocks:
            h = block(h, context)
        out: Tensor = self.last(h)
        return out


class _ConvNet(torch.nn.Module):
    """Kingma and Dhariwal 2018 (arXiv 1807.03039), section 3.3."""

    def __init__(self, ins: int, outs: int, hidden: int, context: int | None) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [
                torch.nn.Conv2d(ins, hidden, 3, padding=1),
                torch.nn.Conv2d(hidden, hidden, 1),
                torch.nn.Conv2d(hidden, outs, 3, padding=1),
            ]
        )
        self.context_layer = None if context is None else torch.nn.Linear(context, hidden, bias=False)
        torch.nn.init.zeros_(self.layers[2].weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(self.layers[2].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h: Tensor = self.layers[0](x)
        if self.context_layer is not None:
            h = h + self.context_layer(context)[:, :, None, None]
        out: Tensor = self.layers[2](F.relu(self.layers[1](F.relu(h))))
        return out


class _MADE(torch.nn.Module):
    """Germain et al. 2015 (arXiv 1502.03509), eq. 12 and 13; ``[B, D, P]``."""

    def __init__(
        self, features: int, outputs: int, hidden: Sequence[int], context: int | None, activation: str
    ) -> None:
        super().__init__()
        self.features, self.activation = features, _ACTIVATIONS[activation]
        inputs = torch.arange(1, features + 1)
        lowest = 0 if context is not None or features == 1 else 1
        self.degrees = [inputs]
        self.degrees += [lowest + torch.arange(units) * (features - lowest) // units for units in hidden]
        self.degrees += [(inputs - 1).repeat_interleave(outputs)]
        widths = [len(degrees) for degrees in self.degrees]
        self.layers = torch.nn.ModuleList([torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        self.context_layer = None if context is None else torch.nn.Linear(context, hidden[0], bias=False)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = x
        for index, layer in enumerate(self.layers):
            mask = self.degrees[index + 1][:, None] >= self.degrees[index]
            h = h if index == 0 else self.activation(h)
            h = F.linear(h, layer.weight * mask, layer.bias)  # type: ignore[operator, arg-type]
            if index == 0 and self.context_layer is not None:
                h = h + self.context_layer(context)
        return h.view(x.size(0), self.features, -1)


# ---- layers ----------------------------------------------------------------------------------------------------------


class _ActNorm(torch.nn.Module):
    """Kingma and Dhariwal 2018, section 3.1."""

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        if self.training and not self.initialized:
            with torch.no_grad():
                values = x.transpose(0, 1).flatten(1).double()
                scale = 1 / (values.std(1, correction=0) + 1e-6)
                self.log_scale.copy_(scale.log())
                self.bias.copy_(-values.mean(1) * scale)
                self.initialized.fill_(True)
        return actnorm(x, self.log_scale, self.bias)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        return actnorm(z, self.log_scale, self.bias, inverse=True)


class _TopPrior(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(channels))
        self.log_std = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        return actnorm(x, self.log_std, self.mean, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        return actnorm(z, self.log_std, self.mean)


class _Matrix(torch.nn.Module):
    """W = P (L + 1) (U + diag(sign e^log_s)) over channels (Kingma and Dhariwal 2018, eq. 10), or any W; and a bias."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, start: Tensor, lu: bool, bias: bool) -> None:
        super().__init__()
        self.lu = lu
        if lu:
            p, lower, upper = torch.linalg.lu(start)
            self.register_buffer("permutation", p.argmax(1))
            self.register_buffer("sign", upper.diagonal().sign())
            self.lower = torch.nn.Parameter(lower.tril(-1))
            self.upper = torch.nn.Parameter(upper.triu(1))
            self.log_s = torch.nn.Parameter(upper.diagonal().abs().log())
        else:
            self.weight = torch.nn.Parameter(start)
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(len(start))) if bias else None)

    def matrix(self) -> Tensor:
        if not self.lu:
            return self.weight
        lower = self.lower.tril(-1) + torch.eye(len(self.log_s), dtype=self.lower.dtype)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())
        return (lower @ upper)[self.permutation]

    def log_det(self, x: Tensor) -> Tensor:
        each = self.log_s.sum() if self.lu else torch.linalg.slogdet(self.weight)[1]
        return (math.prod(x.shape[2:]) * each).expand(x.size(0))

    def shift(self, x: Tensor) -> Any:
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return 0 if bias is None else bias.view(1, -1, *[1] * (x.dim() - 2))

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        return torch.einsum("oi,bi...->bo...", self.matrix(), x) + self.shift(x), self.log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        back = torch.linalg.inv(self.matrix().double()).to(z.dtype)
        return torch.einsum("oi,bi...->bo...", back, z - self.shift(z)), -self.log_det(z)


class _Permutation(torch.nn.Module):
    permutation: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("permutation", order)

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        return x[:, self.permutation], _zeros(x)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        return z[:, self.permutation.argsort()], _zeros(z)


class _Coupling(torch.nn.Module):
    """The transformed channels' parameters come from a network that sees the others."""

    def __init__(
        self, channels: int, split: str | Tensor, net: Callable[[int, int], torch.nn.Module], each: int
    ) -> None:
        super().__init__()
        self.split = split
        if isinstance(split, Tensor):
            ins = outs = channels
        else:
            self.moved = split_channels(channels, split)
            self.still = torch.tensor([c for c in range(channels) if c not in self.moved.tolist()])
            ins, outs = len(self.still), len(self.moved)
        self.net = net(ins, outs * each)

    def parameters_of(self, x: Tensor, context: Tensor | None) -> Tensor:
        seen = torch.where(self.split, 0.0, x) if isinstance(self.split, Tensor) else x[:, self.still]
        found: Tensor = self.net(seen, context)
        return found


class _AffineCoupling(_Coupling):
    """Dinh et al. 2017 (arXiv 1605.08803), eq. 7 and 8."""

    def __init__(self, channels: int, split: str | Tensor, net: Any, scale: str, order: str = "multiply_add") -> None:
        super().__init__(channels, split, net, 2)
        self.options: Any = {"scale": scale, "order": order, "split": split}

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        return affine_coupling(x, self.parameters_of(x, context), **self.options)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        return affine_coupling(z, self.parameters_of(z, context), **self.options, inverse=True)


class _AdditiveCoupling(_Coupling):
    def __init__(self, channels: int, split: str | Tensor, net: Any) -> None:
        super().__init__(channels, split, net, 1)

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        return additive_coupling(x, self.parameters_of(x, context), split=self.split), _zeros(x)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        return additive_coupling(z, self.parameters_of(z, context), split=self.split, inverse=True), _zeros(z)


def _spline(
    x: Tensor, params: Tensor, inverse: bool, bins: int, bound: float, normalizer: str, logit_scale: float
) -> Found:
    """The rational-quadratic spline with linear tails, and its log-slopes summed over features."""
    return spline(
        x,
        params,
        None,
        None,
        kind="rational_quadratic",
        normalizer=normalizer,
        ends="one",
        tails=True,
        inverse=inverse,
        left=-bound,
        right=bound,
        bottom=-bound,
        top=bound,
        min_width=1e-3,
        min_height=1e-3,
        min_derivative=1e-3,
        logit_scale=logit_scale,
        bins=bins,
        batch_dims=1,
    )


class _SplineCoupling(_Coupling):
    """Durkan et al. 2019 (arXiv 1906.04032), section 3."""

    def __init__(
        self, features: int, split: str, net: Any, bins: int, bound: float, normalizer: str, units: int
    ) -> None:
        super().__init__(features, split, net, 3 * bins - 1)
        self.options: Any = (bins, bound, normalizer, 1 / math.sqrt(units))

    def both(self, x: Tensor, context: Tensor | None, inverse: bool) -> Found:
        params = self.parameters_of(x, context).view(x.size(0), len(self.moved), -1)
        new, log_abs_det = _spline(x[:, self.moved], params, inverse, *self.options)
        return x.index_copy(1, self.moved, new), log_abs_det

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        return self.both(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        return self.both(z, context, True)


class _Autoregressive(torch.nn.Module):
    """Each feature by parameters from those before it; the inverse finds one after the other, by a pass for each."""

    net: _MADE

    def element(self, x: Tensor, params: Tensor, inverse: bool) -> Found:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        return self.element(x, self.net(x, context), False)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        x = torch.zeros_like(z)
        for feature in range(z.size(1)):
            new, _ = self.element(z, self.net(x, context), True)
            x = torch.cat([x[:, :feature], new[:, feature : feature + 1], x[:, feature + 1 :]], 1)
        return x, self.element(z, self.net(x, context), True)[1]


class _AffineAutoregressive(_Autoregressive):
    """Papamakarios et al. 2017 (arXiv 1705.07057), eq. 3 to 5."""

    def __init__(self, features: int, hidden: Sequence[int], context: int | None, activation: str, scale: str) -> None:
        super().__init__()
        self.net, self.scale = _MADE(features, 2, hidden, context, activation), scale

    def element(self, x: Tensor, params: Tensor, inverse: bool) -> Found:
        layout = "interleaved_shift_scale"
        return affine_coupling(x, params.flatten(1), scale=self.scale, layout=layout, inverse=inverse)


class _SplineAutoregressive(_Autoregressive):
    """Durkan et al. 2019, section 3.3."""

    def __init__(
        self, features: int, hidden: Sequence[int], context: int | None, bins: int, bound: float, normalizer: str
    ) -> None:
        super().__init__()
        self.net = _MADE(features, 3 * bins - 1, hidden, context, "relu")
        self.options: Any = (bins, bound, normalizer, 1 / math.sqrt(hidden[-1]))

    def element(self, x: Tensor, params: Tensor, inverse: bool) -> Found:
        return _spline(x, params, inverse, *self.options)


class _Inverse(torch.nn.Module):
    def __init__(self, transform: torch.nn.Module) -> None:
        super().__init__()
        self.transform: Any = transform

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        found: Found = self.transform.inverse(x, context)
        return found

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        found: Found = self.transform(z, context)
        return found


class _Squeeze(torch.nn.Module):
    """Dinh et al. 2017, section 3.6."""

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        batch, channels, height, width = x.shape
        blocks = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return blocks.reshape(batch, 4 * channels, height // 2, width // 2), _zeros(x)

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        batch, channels, height, width = z.shape
        blocks = z.view(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return blocks.reshape(batch, channels // 4, 2 * height, 2 * width), _zeros(z)


class _GlowStep(torch.nn.Module):
    """Kingma and Dhariwal 2018, table 1."""

    def __init__(self, channels: int, net: Any, lu: bool, additive: bool) -> None:
        super().__init__()
        self.actnorm = _ActNorm(channels)
        self.conv = _Matrix(torch.linalg.qr(torch.randn(channels, channels))[0], lu, False)
        self.coupling: torch.nn.Module = (
            _AdditiveCoupling(channels, "second", net)
            if additive
            else _AffineCoupling(channels, "second", net, "sigmoid", "add_multiply")
        )

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        x, first = self.actnorm(x, context)
        x, second = self.conv(x, context)
        x, third = self.coupling(x, context)
        return x, first + second + third

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        z, third = self.coupling.inverse(z, context)  # type: ignore[operator]
        z, second = self.conv.inverse(z, context)
        z, first = self.actnorm.inverse(z, context)
        return z, first + second + third


class _Chain(torch.nn.Sequential):
    def forward(self, x: Tensor, context: Tensor | None) -> Found:  # type: ignore[override]
        total = _zeros(x)
        for step in self:
            x, log_abs_det = step(x, context)
            total = total + log_abs_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        total = _zeros(z)
        for step in reversed(list(self)):
            z, log_abs_det = step.inverse(z, context)  # type: ignore[operator]
            total = total + log_abs_det
        return z, total


class _Split(torch.nn.Module):
    """Half of the channels go on; the others are whitened by a Gaussian that is made of those."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.kept = (channels + 1) // 2
        self.prior = None
        if learned:
            self.prior = torch.nn.Conv2d(self.kept, 2 * (channels - self.kept), 3, padding=1)
            torch.nn.init.zeros_(self.prior.weight)
            torch.nn.init.zeros_(self.prior.bias)  # type: ignore[arg-type]

    def gaussian(self, kept: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.prior is None:
            return torch.zeros_like(like), torch.zeros_like(like)
        mean, log_std = self.prior(kept).chunk(2, 1)
        return mean, log_std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, rest = x[:, : self.kept], x[:, self.kept :]
        mean, log_std = self.gaussian(kept, rest)
        return kept, (rest - mean) * torch.exp(-log_std), -log_std.flatten(1).sum(1)

    def inverse(self, kept: Tensor, z: Tensor) -> Found:
        mean, log_std = self.gaussian(kept, z)
        return torch.cat([kept, mean + z * torch.exp(log_std)], 1), log_std.flatten(1).sum(1)


class _MultiScale(torch.nn.Module):
    """Dinh et al. 2017, eq. 14 to 16: z has what each split puts out, flat, and what the last level does."""

    def __init__(self, levels: Sequence[_Chain], splits: Sequence[_Split], shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.levels, self.splits = torch.nn.ModuleList(levels), torch.nn.ModuleList(splits)
        self.shapes = shapes  # of the parts of z

    def forward(self, x: Tensor, context: Tensor | None) -> Found:
        parts, total = [], _zeros(x)
        for index, level in enumerate(self.levels):
            x, log_abs_det = level(x, context)
            total = total + log_abs_det
            if index < len(self.splits):
                x, part, log_abs_det = self.splits[index](x)
                total = total + log_abs_det
                parts.append(part.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), total

    def inverse(self, z: Tensor, context: Tensor | None) -> Found:
        sizes = [math.prod(shape) for shape in self.shapes]
        pairs = zip(z.split(sizes, 1), self.shapes, strict=True)  # type: ignore[no-untyped-call]
        parts = [part.reshape(-1, *shape) for part, shape in pairs]
        x, total = parts[-1], _zeros(z)
        for index in reversed(range(len(self.levels))):
            if index < len(self.splits):
                x, log_abs_det = self.splits[index].inverse(x, parts[index])  # type: ignore[operator]
                total = total + log_abs_det
            x, log_abs_det = self.levels[index].inverse(x, context)  # type: ignore[operator]
            total = total + log_abs_det
        return x, total


# ---- models ----------------------------------------------------------------------------------------------------------


class _StandardNormal(torch.nn.Module):
    def log_prob(self, z: Tensor) -> Tensor:
        return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(1)

    def place(self, noise: Tensor) -> Tensor:
        return noise


class _DiagonalNormal(torch.nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(features))
        self.log_std = torch.nn.Parameter(torch.zeros(features))

    def log_prob(self, z: Tensor) -> Tensor:
        whitened = (z - self.mean) / self.log_std.exp()
        return (-0.5 * whitened.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(1)

    def place(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * noise


class _FlowModel(torch.nn.Module):
    """log p(x) = log p(z) + ln |det dz/dx| (Rezende and Mohamed 2015, arXiv 1505.05770, eq. 5)."""

    def __init__(
        self,
        flow: Any,
        event_shape: Sequence[int],
        base: str,
        pixels: tuple[int, float] | None,
        flatten: bool = False,
    ) -> None:
        super().__init__()
        self.event_shape, self.pixels, self.flatten = tuple(event_shape), pixels, flatten
        self.features = math.prod(event_shape)
        self.flow = flow
        self.base: Any = _StandardNormal() if base == "standard" else _DiagonalNormal(self.features)

    def _like(self) -> Tensor:
        return next(self.parameters())

    def transform(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """z and ln |det|, of whole numbers with dequantisation noise u."""
        before = _zeros(x.to(self._like().dtype))
        if self.pixels is not None:
            rng = draw_rng(x.device, generator) if u is None else None
            x = x.to(self._like().dtype)
            x, before = dequantize_logit(x, levels=self.pixels[0], alpha=self.pixels[1], u=u, rng=rng)
        z, log_abs_det = self.flow(x.flatten(1) if self.flatten else x, context)
        return z, before + log_abs_det

    def log_prob(self, x: Tensor, context: Tensor | None = None, **noise: Any) -> Tensor:
        """``[B]``, nats."""
        z, log_abs_det = self.transform(x, context, **noise)
        found: Tensor = self.base.log_prob(z) + log_abs_det
        return found

    def loss(self, x: Tensor, context: Tensor | None = None, **noise: Any) -> Tensor:
        """The mean of the negative `log_prob`."""
        return -self.log_prob(x, context, **noise).mean()

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None, **noise: Any) -> Tensor:
        """The negative `log_prob` in bits for each number of x."""
        return -self.log_prob(x, context, **noise) / (self.features * math.log(2))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``[n, *event_shape]``, whole numbers where the model dequantises."""
        like = self._like()
        z = self.base.place(
            temperature * philox_normal((n, self.features), draw_rng(like.device, generator), like.dtype)
        )
        x: Tensor = self.flow.inverse(z, context)[0]
        if self.flatten:
            x = x.view(n, *self.event_shape)
        if self.pixels is not None:
            x = logit_quantize(x, levels=self.pixels[0], alpha=self.pixels[1])
        return x


def _half(index: int) -> str:
    return "first" if index % 2 else "second"


def _checkerboard(height: int, width: int, odd: bool) -> Tensor:
    board: Tensor = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == (1 if odd else 0)
    return board[None]


class RealNVP(_FlowModel):
    """The plain twin of `genfuse.models.RealNVP` (Dinh, Sohl-Dickstein and Bengio 2017, arXiv 1605.08803).

    Example:
        >>> model = RealNVP((1, 8, 8), channels=8)
        >>> model.log_prob(torch.randint(256, (2, 1, 8, 8))).shape, model.sample(3).shape
        (torch.Size([2]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        input_shape: int | Sequence[int],
        *,
        transforms: int = 8,
        hidden: Sequence[int] = (128, 128),
        channels: int = 64,
        scales: int = 2,
        scale: str = "tanh",
        actnorm: bool = True,
        context_features: int | None = None,
        base: str = "standard",
        dequantize: bool = True,
        levels: int = 256,
        alpha: float = 0.05,
    ) -> None:
        if isinstance(input_shape, int):
            steps: list[torch.nn.Module] = []
            for index in range(transforms):
                steps += [_ActNorm(input_shape)] if actnorm else []
                steps.append(
                    _AffineCoupling(
                        input_shape,
                        _half(index),
                        lambda ins, outs: _MLP(ins, outs, hidden, context_features, True),
                        scale,
                    )
                )
            super().__init__(_Chain(*steps), (input_shape,), base, None)
            return

        def net(ins: int, outs: int) -> torch.nn.Module:
            return _ConvNet(ins, outs, channels, context_features)

        size, height, width = input_shape
        chains, splits, shapes = [], [], []
        for level in range(scales):
            last = level == scales - 1
            steps = []
            for index in range(4 if last else 3):
                steps += [_ActNorm(size)] if actnorm else []
                steps.append(_AffineCoupling(size, _checkerboard(height, width, index % 2 == 0), net, scale))
            if not last:
                steps.append(_Squeeze())
                size, height, width = 4 * size, height // 2, width // 2
                for index in range(3):
                    steps += [_ActNorm(size)] if actnorm else []
                    steps.append(_AffineCoupling(size, _half(index), net, scale))
                splits.append(_Split(size, False))
                shapes.append((size - splits[-1].kept, height, width))
                size = splits[-1].kept
            chains.append(_Chain(*steps))
        shapes.append((size, height, width))
        flow = _MultiScale(chains, splits, shapes)
        super().__init__(flow, input_shape, base, (levels, alpha) if dequantize else None)


class Glow(_FlowModel):
    """The plain twin of `genfuse.models.Glow` (Kingma and Dhariwal 2018, arXiv 1807.03039).

    Example:
        >>> model = Glow((1, 8, 8), levels=2, steps=2, channels=8)
        >>> model.log_prob(torch.randint(256, (2, 1, 8, 8))).shape, model.sample(3).shape
        (torch.Size([2]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        levels: int = 3,
        steps: int = 16,
        channels: int = 128,
        additive: bool = False,
        lu: bool = True,
        learn_top: bool = True,
        context_features: int | None = None,
        base: str = "standard",
        dequantize: bool = True,
        pixel_levels: int = 256,
        alpha: float = 0.05,
    ) -> None:
        def net(ins: int, outs: int) -> torch.nn.Module:
            return _ConvNet(ins, outs, channels, context_features)

        size, height, width = input_shape
        chains, splits, shapes = [], [], []
        for level in range(levels):
            size, height, width = 4 * size, height // 2, width // 2
            chain: list[torch.nn.Module] = [_Squeeze()]
            chain += [_GlowStep(size, net, lu, additive) for _ in range(steps)]
            if level < levels - 1:
                splits.append(_Split(size, True))
                shapes.append((size - splits[-1].kept, height, width))
                size = splits[-1].kept
            elif learn_top:
                chain.append(_TopPrior(size))
            chains.append(_Chain(*chain))
        shapes.append((size, height, width))
        flow = _MultiScale(chains, splits, shapes)
        super().__init__(flow, input_shape, base, (pixel_levels, alpha) if dequantize else None)


class NeuralSplineFlow(_FlowModel):
    """The plain twin of `genfuse.models.NeuralSplineFlow` (Durkan et al. 2019, arXiv 1906.04032).

    Example:
        >>> model = NeuralSplineFlow(3, hidden=(8,), transforms=2)
        >>> model.log_prob(torch.randn(2, 3)).shape, model.sample(3).shape
        (torch.Size([2]), torch.Size([3, 3]))
    """

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        transforms: int = 5,
        hidden: Sequence[int] = (128, 128),
        num_bins: int = 8,
        tail_bound: float = 3.0,
        normalizer: str = "softmax",
        coupling: bool = True,
        linear: str | None = None,
        residual: bool = False,
        context_features: int | None = None,
        base: str = "standard",
        levels: int = 256,
        alpha: float = 0.05,
    ) -> None:
        shape = (features,) if isinstance(features, int) else tuple(features)
        features, images = math.prod(shape), len(shape) > 1

        def net(ins: int, outs: int) -> torch.nn.Module:
            if residual:
                return _ResidualNet(ins, outs, hidden, context_features)
            return _MLP(ins, outs, hidden, context_features, False)

        steps: list[torch.nn.Module] = []
        units = hidden[0] if residual else hidden[-1]
        for index in range(transforms):
            if linear == "lu":
                steps.append(_Matrix(torch.eye(features), True, True))
            elif linear == "permutation":
                steps.append(_Permutation(torch.randperm(features)))
            if coupling:
                steps.append(_SplineCoupling(features, _half(index), net, num_bins, tail_bound, normalizer, units))
                continue
            steps.append(_SplineAutoregressive(features, hidden, context_features, num_bins, tail_bound, normalizer))
            if linear is None and index < transforms - 1:
                steps.append(_Permutation(torch.arange(features).flip(0)))
        super().__init__(_Chain(*steps), shape, base, (levels, alpha) if images else None, images)


class MAF(_FlowModel):
    """The plain twin of `genfuse.models.MAF` (Papamakarios et al. 2017, arXiv 1705.07057).

    Example:
        >>> model = MAF(3, hidden=(8,), transforms=2)
        >>> model.log_prob(torch.randn(2, 3)).shape, model.sample(3).shape
        (torch.Size([2]), torch.Size([3, 3]))
    """

    normalised = True  # whether there are actnorms by default

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        transforms: int = 5,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        scale: str = "sigmoid",
        actnorm: bool | None = None,
        context_features: int | None = None,
        base: str = "standard",
        levels: int = 256,
        alpha: float = 0.05,
    ) -> None:
        shape = (features,) if isinstance(features, int) else tuple(features)
        features, images = math.prod(shape), len(shape) > 1
        steps: list[torch.nn.Module] = []
        for index in range(transforms):
            steps += [_ActNorm(features)] if (self.normalised if actnorm is None else actnorm) else []
            steps.append(self.directed(_AffineAutoregressive(features, hidden, context_features, activation, scale)))
            if index < transforms - 1:
                steps.append(_Permutation(torch.arange(features).flip(0)))
        super().__init__(_Chain(*steps), shape, base, (levels, alpha) if images else None, images)

    @staticmethod
    def directed(layer: torch.nn.Module) -> torch.nn.Module:
        return layer


class IAF(MAF):
    """The plain twin of `genfuse.models.IAF` (Kingma et al. 2016, arXiv 1606.04934).

    Example:
        >>> model = IAF(3, hidden=(8,), transforms=2)
        >>> model.log_prob(torch.randn(2, 3)).shape, model.sample(3).shape
        (torch.Size([2]), torch.Size([3, 3]))
    """

    normalised = False

    @staticmethod
    def directed(layer: torch.nn.Module) -> torch.nn.Module:
        return _Inverse(layer)
