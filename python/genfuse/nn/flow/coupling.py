"""Couplings: some channels are transformed, with parameters that a network makes of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genfuse import ops
from genfuse.nn.sampling import _check_number, _check_size

from .base import Transform, zero_log_det
from .conditioners import MLP
from .linear import ActNorm, InvertibleConv2d, at_least_float32, check_channels, multiply, positions, times

__all__ = ["AdditiveCoupling", "AffineCoupling", "GlowStep", "SplineCoupling", "checkerboard_mask"]

Chosen = str | Tensor | Sequence[int]
Network = torch.nn.Module | Callable[[int, int], torch.nn.Module]


def checkerboard_mask(height: int, width: int, *, invert: bool = False) -> Tensor:
    """The mask of a checkerboard, ``[1, height, width]``, bool: True where row + column is odd (even with `invert`).

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803), figure 3.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is below 1.

    Example:
        >>> checkerboard_mask(2, 3).int()
        tensor([[[0, 1, 0],
                 [1, 0, 1]]], dtype=torch.int32)
    """
    height = _check_size("checkerboard_mask", "height", height)
    width = _check_size("checkerboard_mask", "width", width)
    rows, columns = torch.arange(height).unsqueeze(1), torch.arange(width)
    mask: Tensor = (rows + columns) % 2 == (0 if invert else 1)
    return mask.unsqueeze(0)


SCALES = (
    "exp",
    "sigmoid",
    "inverse_sigmoid",
    "softplus",
    "tanh",
    "atan",
    "sigmoid_clamp",
    "softclip",
    "clip",
)


def check_scale(module: str, scale: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"{module}: scale must be one of {', '.join(SCALES)}; got {scale!r}")


class _Coupling(Transform):
    """What couplings share: which channels are transformed, and the network that sees the others."""

    indices: Tensor | None
    others: Tensor | None
    mask: Tensor | None

    def __init__(
        self,
        features: int,
        net: Network | None,
        hidden: Sequence[int],
        split: Chosen,
        context_features: int | None,
        activation: str,
        each: int,
        zero_init: bool,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.features = _check_size(self.name, "features", features)
        self.context_features = context_features
        indices = others = mask = None
        if isinstance(split, str):
            if split not in ("first", "second", "even", "odd"):
                raise ValueError(
                    f"{self.name}: split must be 'first', 'second', 'even', 'odd', a mask or indices, got {split!r}"
                )
            self.split = split
            half = (self.features + 1) // 2
            self.transformed = half if split in ("first", "even") else self.features - half
            self.seen = self.features - self.transformed
        elif isinstance(split, Tensor) and split.dtype == torch.bool:
            self.split, mask = "mask", split.clone()
            self.transformed = self.seen = self.features
        else:
            self.split, indices = "indices", torch.as_tensor(split, dtype=torch.int64).clone()
            left = torch.ones(self.features, dtype=torch.bool)
            if indices.dim() != 1 or not bool(((indices >= 0) & (indices < self.features)).all()):
                raise ValueError(f"{self.name}: split must hold channels below {self.features}, got {indices.tolist()}")
            left[indices] = False
            others = left.nonzero().squeeze(1)
            self.transformed, self.seen = len(indices), len(others)
            if self.transformed + self.seen != self.features:
                raise ValueError(f"{self.name}: split must hold each channel once, got {indices.tolist()}")
        if min(self.transformed, self.seen) < 1:
            raise ValueError(
                f"{self.name}: split must leave at least one channel to transform and one to see, got "
                f"{self.transformed} and {self.seen} of {self.features}"
            )
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("others", others, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        outputs = self.transformed * each
        if net is None:
            net = MLP(
                self.seen,
                outputs,
                hidden,
                context_features=context_features,
                activation=activation,
                zero_init=zero_init,
            )
        elif not isinstance(net, torch.nn.Module):
            make: Any = net
            if not callable(make):
                raise TypeError(f"{self.name}: net must be a Module or make one, got {type(net).__name__}")
            net = make(self.seen, outputs)
        self.net: Any = net

    def extra_repr(self) -> str:
        return f"{self.features}, split={self.split!r}"

    def _where(self) -> Any:
        """The split as the operators take it."""
        return self.mask if self.mask is not None else self.indices if self.indices is not None else self.split

    def _seen(self, x: Tensor) -> Tensor:
        """What the network sees: a view if it can be."""
        if self.split == "first":
            return x[:, self.transformed :]
        if self.split == "second":
            return x[:, : self.seen]
        if self.split == "even":
            return x[:, 1::2]
        if self.split == "odd":
            return x[:, 0::2]
        if self.mask is not None:
            return x.masked_fill(self.mask, 0.0)
        return x.index_select(1, self.others)  # type: ignore[arg-type]

    def _parameters_of(self, seen: Tensor, context: Tensor | None) -> Tensor:
        if self.context_features is None:
            found: Tensor = self.net(seen)
            return found
        if context is None:
            raise ValueError(f"{self.name}: context must be [B, {self.context_features}], got None")
        given: Tensor = self.net(seen, context)
        return given

    def _given(self, x: Tensor, context: Tensor | None, argument: str) -> Tensor:
        check_channels(self.name, x, self.features, argument)
        return self._parameters_of(self._seen(x), context)


class AffineCoupling(_Coupling):
    """``z = x * s + t`` of some channels, with a network's s and t of the others: `ops.affine_coupling` with a network.

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803), eq. 7 and 8.

    Args:
        features: channels C of x ``[B, C, *]``.
        net: the network: a Module, or a function ``(channels_in, channels_out) -> Module``. It is called with the
            channels that stay (of x with zeros elsewhere for a mask), and with the context if there is one, and returns
            ``[B, 2 * transformed, *]``. By default an `MLP`, for vectors.
        hidden: the `MLP`'s units.
        split: which channels are transformed: ``"first"`` (the larger half of an odd number), ``"second"``, ``"even"``,
            ``"odd"``, indices, or a bool mask that broadcasts with x[0].
        scale: how the scale is made of what the network returns, as for `ops.affine_coupling`; by default e to the
            power of something between -2 and 2, which no depth makes overflow in a few steps.
        layout, order, offset, eps, clamp: as for `ops.affine_coupling`.
        context_features: of the context, if there is one.
        activation: the `MLP`'s.
        zero_init: start the `MLP`'s last layer at zero.

    Raises:
        TypeError: features is no int, or net neither a Module nor a function.
        ValueError: no channel is transformed or none stays, an unknown split, or a channel twice; from `forward`, x has
            other channels, or the context is missing.

    Example:
        >>> layer = AffineCoupling(4, hidden=(16,), context_features=2)
        >>> x, context = torch.randn(5, 4), torch.randn(5, 2)
        >>> z, log_abs_det = layer(x, context)
        >>> bool((layer.inverse(z, context)[0] - x).abs().max() < 1e-5), log_abs_det.shape
        (True, torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        net: Network | None = None,
        *,
        hidden: Sequence[int] = (128, 128),
        split: Chosen = "second",
        scale: str = "tanh",
        layout: str = "shift_scale",
        order: str = "multiply_add",
        offset: float | None = None,
        eps: float | None = None,
        clamp: Any = None,
        context_features: int | None = None,
        activation: str = "relu",
        zero_init: bool = True,
    ) -> None:
        check_scale("AffineCoupling", scale)
        super().__init__(features, net, hidden, split, context_features, activation, 2, zero_init)
        self.scale, self.layout, self.order = scale, layout, order
        self.offset, self.eps, self.clamp = offset, eps, clamp

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale!r}"

    def _couple(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(
            x,
            params.to(x.dtype),
            scale=self.scale,
            layout=self.layout,
            order=self.order,
            split=self._where(),
            inverse=inverse,
            offset=self.offset,
            eps=self.eps,
            clamp=self.clamp,
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(x, self._given(x, context, "x"), False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(z, self._given(z, context, "z"), True)


class AdditiveCoupling(_Coupling):
    """``z = x + t`` of some channels, with a network's t of the others; the volume stays.

    Dinh, Krueger and Bengio 2015 (arXiv 1410.8516), eq. 9. The arguments are those of `AffineCoupling` that apply; the
    network returns ``[B, transformed, *]``.

    Example:
        >>> layer = AdditiveCoupling(4, hidden=(16,))
        >>> x = torch.randn(5, 4)
        >>> z, log_abs_det = layer(x)
        >>> bool((layer.inverse(z)[0] - x).abs().max() < 1e-5), log_abs_det
        (True, tensor([0., 0., 0., 0., 0.]))
    """

    def __init__(
        self,
        features: int,
        net: Network | None = None,
        *,
        hidden: Sequence[int] = (128, 128),
        split: Chosen = "second",
        context_features: int | None = None,
        activation: str = "relu",
        zero_init: bool = True,
    ) -> None:
        super().__init__(features, net, hidden, split, context_features, activation, 1, zero_init)

    def _shift(self, x: Tensor, context: Tensor | None, argument: str, inverse: bool) -> tuple[Tensor, Tensor]:
        shift = self._given(x, context, argument).to(x.dtype)
        return ops.additive_coupling(x, shift, split=self._where(), inverse=inverse), zero_log_det(x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._shift(x, context, "x", False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._shift(z, context, "z", True)


SPLINES = ("rational_quadratic", "linear", "quadratic", "cubic")


def spline_parameters(module: str, kind: str, tails: str | None, bins: int) -> int:
    """How many parameters an element's spline has, packed."""
    if kind not in SPLINES:
        raise ValueError(f"{module}: kind must be one of {', '.join(SPLINES)}; got {kind!r}")
    if tails not in ("linear", "circular", None) or (tails == "circular" and kind != "rational_quadratic"):
        raise ValueError(f"{module}: tails of a {kind} spline are unknown: {tails!r}")
    if kind == "linear":
        return bins
    if kind == "quadratic":
        return 2 * bins - 1 if tails == "linear" else 2 * bins + 1
    if kind == "cubic":
        return 2 * bins + 2
    return 3 * bins + {"linear": -1, "circular": 0, None: 1}[tails]


class SplineOptions:
    """The options of an element's spline, and its call."""

    def __init__(
        self,
        module: str,
        kind: str,
        num_bins: int,
        tails: str | None,
        tail_bound: float,
        normalizer: str,
        minima: tuple[float, float, float],
        logit_scale: float,
    ) -> None:
        self.bins = _check_size(module, "num_bins", num_bins)
        _check_number(module, "tail_bound", tail_bound, above=True)
        self.parameters = spline_parameters(module, kind, tails, self.bins)
        self.kind, self.tails, self.tail_bound = kind, tails, float(tail_bound)
        self.options: dict[str, Any] = {"tails": tails}
        if tails is None:
            ends = {"left": -1.0, "right": 1.0, "bottom": -1.0, "top": 1.0}
            self.options |= {name: side * self.tail_bound for name, side in ends.items()}
        else:
            self.options["tail_bound"] = self.tail_bound
        if kind != "linear":
            self.options |= {"min_bin_width": minima[0], "min_bin_height": minima[1], "logit_scale": float(logit_scale)}
        if kind == "rational_quadratic":
            self.options |= {"min_derivative": minima[2], "normalizer": normalizer}
        self.call = getattr(ops, f"{kind}_spline")

    def __call__(self, x: Tensor, params: Tensor, inverse: bool, reduce: bool) -> tuple[Tensor, Tensor]:
        dims = tuple(range(1, x.dim())) if reduce else None
        found: tuple[Tensor, Tensor] = self.call(
            x, params.to(x.dtype), inverse=inverse, reduce_dims=dims, **self.options
        )
        return found

    def of_solver(self) -> dict[str, Any]:
        """The options as `ops.autoregressive_inverse` takes them."""
        return {name: value for name, value in self.options.items() if name != "tails"}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.call = getattr(ops, f"{self.kind}_spline")


class SplineCoupling(_Coupling):
    """A monotone spline of each of some channels, with a network's parameters of the others.

    Durkan et al. 2019 (arXiv 1906.04032), section 3. Normalising the parameters, the spline and the sum of the
    log-slopes are one operator, `ops.rational_quadratic_spline` (or the one of another `kind`).

    Args:
        features: channels C of x ``[B, C, *]``.
        net: the network, as for `AffineCoupling`; it returns ``[B, transformed * P, *]``, the P parameters of a channel
            side by side: of widths, heights and slopes 3 num_bins - 1 with linear tails, 3 num_bins with circular ones,
            3 num_bins + 1 without.
        num_bins: of the spline.
        tail_bound: the spline is on [-tail_bound, tail_bound] both ways.
        tails: outside of it, ``"linear"``, the identity; ``"circular"``, on a circle (Rezende et al. 2020, arXiv
            2002.02428); None: nothing is, and x there is refused as the operator does.
        kind: ``"rational_quadratic"``, ``"linear"``, ``"quadratic"`` or ``"cubic"``.
        hidden, split, context_features, activation, zero_init: as for `AffineCoupling`.
        normalizer: ``"softmax"``, or ``"identity"``, for which zero parameters give the identity (rational-quadratic).
        logit_scale: what the logits of widths and heights are multiplied by; by default 1 / sqrt(units of the
            network's last hidden layer), as nflows has it, if the network tells (`hidden_features`), else 1.
        min_bin_width, min_bin_height, min_derivative: as for the operator.

    Raises:
        TypeError: a size is no int, or net neither a Module nor a function.
        ValueError: as for `AffineCoupling`; an unknown kind, or tails it does not have.

    Example:
        >>> layer = SplineCoupling(4, num_bins=8, hidden=(16,))
        >>> x = torch.randn(5, 4)
        >>> z, log_abs_det = layer(x)
        >>> bool((layer.inverse(z)[0] - x).abs().max() < 1e-4), log_abs_det.shape
        (True, torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        net: Network | None = None,
        *,
        num_bins: int = 8,
        tail_bound: float = 3.0,
        tails: str | None = "linear",
        kind: str = "rational_quadratic",
        hidden: Sequence[int] = (128, 128),
        split: Chosen = "second",
        context_features: int | None = None,
        activation: str = "relu",
        zero_init: bool = False,
        normalizer: str = "softmax",
        logit_scale: float | None = None,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ) -> None:
        each = spline_parameters("SplineCoupling", kind, tails, _check_size("SplineCoupling", "num_bins", num_bins))
        super().__init__(features, net, hidden, split, context_features, activation, each, zero_init)
        if logit_scale is None:
            units = getattr(self.net, "hidden_features", None)
            logit_scale = 1.0 if units is None else 1.0 / math.sqrt(units)
        minima = (min_bin_width, min_bin_height, min_derivative)
        self.spline = SplineOptions(self.name, kind, num_bins, tails, tail_bound, normalizer, minima, logit_scale)

    def extra_repr(self) -> str:
        spline = self.spline
        return f"{super().extra_repr()}, kind={spline.kind!r}, num_bins={spline.bins}, tail_bound={spline.tail_bound}"

    def _bend(self, x: Tensor, context: Tensor | None, argument: str, inverse: bool) -> tuple[Tensor, Tensor]:
        check_channels(self.name, x, self.features, argument)
        if self.split in ("first", "second"):
            # One operator for both halves, whose gradients come back as one.
            sizes = (self.transformed, self.seen) if self.split == "first" else (self.seen, self.transformed)
            first, second = torch.split_with_sizes(x, sizes, 1)
            bent, seen = (first, second) if self.split == "first" else (second, first)
        else:
            seen, bent = self._seen(x), x
            if self.split in ("even", "odd"):
                bent = x[:, 0::2] if self.split == "even" else x[:, 1::2]
            elif self.indices is not None:
                bent = x.index_select(1, self.indices)
        params = self._parameters_of(seen, context)
        params = params.view(x.size(0), self.transformed, self.spline.parameters, *x.shape[2:])
        if x.dim() > 2:
            params = params.movedim(2, -1)
        new, log_abs_det = self.spline(bent, params, inverse, self.mask is None)
        if self.mask is not None:
            each = at_least_float32(log_abs_det).masked_fill(~self.mask, 0.0)
            return torch.where(self.mask, new, x), each.flatten(1).sum(1)
        if self.split == "first":
            return torch.cat([new, second], 1), log_abs_det
        if self.split == "second":
            return torch.cat([first, new], 1), log_abs_det
        if self.indices is not None:
            return x.index_copy(1, self.indices, new), log_abs_det
        merged = (
            torch.stack([new, seen] if self.split == "even" else [seen, new], 2)
            if (self.transformed == self.seen)
            else None
        )
        if merged is not None:
            return merged.flatten(1, 2), log_abs_det
        place = torch.arange(0 if self.split == "even" else 1, self.features, 2, device=x.device)
        return x.index_copy(1, place, new), log_abs_det

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._bend(x, context, "x", False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._bend(z, context, "z", True)


class GlowStep(Transform):
    """A step of Glow: `ActNorm`, then `InvertibleConv2d`, then a coupling, with the first two as one convolution.

    Kingma and Dhariwal 2018 (arXiv 1807.03039), table 1 and figure 2a. With weight W and actnorm's ``x e^s + b``, the
    convolution has the weight ``W diag(e^s)`` and the bias ``W b``, so the activations are passed over once for both.
    ``nn.Flow([step.actnorm, step.conv, step.coupling])`` is the same, step by step.

    Args:
        channels: C of x ``[B, C, *]``.
        net: the coupling's network, as for `AffineCoupling`. By default an `MLP`, for vectors; for images
            ``lambda ins, outs: nn.ConvNet(ins, outs, 512)``.
        hidden: the `MLP`'s units.
        lu: as for `InvertibleConv2d`.
        additive: an `AdditiveCoupling` instead of an affine one.
        scale, split, order, context_features: the coupling's; by default ``sigmoid(r + 2)``, on the second half,
            ``(x + t) * s``, as the paper's authors have it.

    Raises:
        TypeError, ValueError: as `InvertibleConv2d` and `AffineCoupling`.

    Example:
        >>> from genfuse import nn
        >>> step = GlowStep(4, lambda ins, outs: nn.ConvNet(ins, outs, 8))
        >>> x = torch.randn(5, 4, 6, 6)
        >>> z, log_abs_det = step(x)
        >>> bool((step.inverse(z)[0] - x).abs().max() < 1e-4), log_abs_det.shape
        (True, torch.Size([5]))
    """

    def __init__(
        self,
        channels: int,
        net: Network | None = None,
        *,
        hidden: Sequence[int] = (128, 128),
        lu: bool = True,
        additive: bool = False,
        scale: str = "sigmoid",
        split: Chosen = "second",
        order: str = "add_multiply",
        context_features: int | None = None,
    ) -> None:
        super().__init__()
        self.actnorm, self.conv = ActNorm(channels), InvertibleConv2d(channels, lu=lu)
        coupling: Any = AdditiveCoupling if additive else AffineCoupling
        more = {} if additive else {"scale": scale, "order": order}
        self.coupling: Transform = coupling(
            channels, net, hidden=hidden, split=split, context_features=context_features, **more
        )

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution."""
        log_scale, bias = at_least_float32(self.actnorm.log_scale), at_least_float32(self.actnorm.bias)
        weight = self.conv._matrix()
        return weight * log_scale.exp(), times(weight, bias)

    def _log_det(self, x: Tensor) -> Tensor:
        return positions(x) * (self.conv._log_det() + at_least_float32(self.actnorm.log_scale).sum())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("GlowStep", x, self.conv.channels)
        if self.training and not self.actnorm._ready:
            self.actnorm._initialize(x, anew=False)
        z, log_abs_det = self.coupling(multiply(x, *self._folded()), context)
        return z, log_abs_det + self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("GlowStep", z, self.conv.channels, "z")
        y, log_abs_det = self.coupling.inverse(z, context)
        # W^-1 y = x e^s + b, so x is e^-s W^-1 y - e^-s b.
        log_scale, bias = at_least_float32(self.actnorm.log_scale), at_least_float32(self.actnorm.bias)
        scale = torch.exp(-log_scale)
        x = multiply(y, scale.unsqueeze(1) * self.conv._matrix_inverse(), -scale * bias)
        return x, log_abs_det - self._log_det(z)
