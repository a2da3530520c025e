"""Autoregressive transforms: each feature is transformed with parameters that a masked network makes of those before
it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genfuse import ops
from genfuse.nn.sampling import _check_size

from .base import Transform
from .conditioners import activate, check_activation, check_hidden, zero_
from .coupling import SplineOptions, check_scale, spline_parameters

__all__ = ["MADE", "MaskedAffineAutoregressive", "MaskedLinear", "MaskedSplineAutoregressive"]


class MaskedLinear(torch.nn.Linear):
    """A linear layer, in which a unit sees the inputs of no larger degree: `ops.masked_linear` with parameters.

    Germain et al. 2015 (arXiv 1502.03509), eq. 8. Weights that the mask hides are never read and have gradients of 0.

    Args:
        in_degrees: whole numbers, one for each input.
        out_degrees: whole numbers, one for each unit.
        strict: a unit sees the inputs of lower degree only.
        bias: learn one.

    Raises:
        ValueError: degrees are no vector of at least one number.

    Example:
        >>> layer = MaskedLinear([1, 2, 3], [1, 1, 2, 2])
        >>> layer(torch.randn(5, 3)).shape
        torch.Size([5, 4])
    """

    in_degrees: Tensor
    out_degrees: Tensor

    def __init__(
        self,
        in_degrees: Sequence[int] | Tensor,
        out_degrees: Sequence[int] | Tensor,
        *,
        strict: bool = False,
        bias: bool = True,
    ) -> None:
        degrees = []
        for name, given in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
            found = torch.as_tensor(given)
            if found.dim() != 1 or found.numel() == 0 or found.is_floating_point():
                raise ValueError(f"MaskedLinear: {name} must be a vector of whole numbers, got {given!r}")
            degrees.append(found.to(torch.int64, copy=True))
        super().__init__(degrees[0].numel(), degrees[1].numel(), bias)
        self.strict = bool(strict)
        self.register_buffer("in_degrees", degrees[0], persistent=False)
        self.register_buffer("out_degrees", degrees[1], persistent=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, strict={self.strict}"

    def forward(self, x: Tensor) -> Tensor:
        return ops.masked_linear(x, self.weight, self.bias, self.in_degrees, self.out_degrees, strict=self.strict)


class MADE(torch.nn.Module):
    """A dense network whose output for feature i depends on the features before i only.

    Germain et al. 2015 (arXiv 1502.03509), eq. 12 and 13. Feature i has degree i, from 1; hidden units have degrees
    from the lowest to D - 1 in ascending order, so that what is ready when i features are known is the beginning of
    each layer. With a context there are hidden units of degree 0, too, through which it reaches the first feature.

    Args:
        features: D.
        outputs: numbers P for each feature.
        hidden: units of the layers between.
        context_features: of the context, if there is one.
        activation: as for `MLP`.
        zero_init: start the last layer at zero.

    Raises:
        TypeError: a size is no int.
        ValueError: a size below 1, an unknown activation; from `forward`, x or the context has another size.

    Example:
        >>> net = MADE(3, 2, (16,))
        >>> net(torch.randn(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    context_layer: torch.nn.Linear | None

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (128, 128),
        *,
        context_features: int | None = None,
        activation: str = "relu",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.outputs = _check_size("MADE", "features", features), _check_size("MADE", "outputs", outputs)
        widths = check_hidden("MADE", hidden)
        self.activation = check_activation("MADE", activation)
        self.hidden_features = widths[-1]
        inputs = torch.arange(1, self.features + 1)
        degrees = [inputs]
        lowest = 0 if context_features is not None or self.features == 1 else 1
        for units in widths:
            degrees.append(lowest + torch.arange(units) * (self.features - lowest) // units)
        degrees.append((inputs - 1).repeat_interleave(self.outputs))
        self.layers = torch.nn.ModuleList(MaskedLinear(*pair) for pair in itertools.pairwise(degrees))
        self.context_features = self.context_layer = None
        if context_features is not None:
            self.context_features = _check_size("MADE", "context_features", context_features)
            self.context_layer = torch.nn.Linear(self.context_features, widths[0], bias=False)
        if zero_init:
            zero_(self.layers[-1])

    def contexts(self, context: Tensor | None) -> Tensor | None:
        """What the context adds to the first hidden layer; None if there is none."""
        if self.context_layer is None:
            return None
        if context is None or context.size(-1) != self.context_features:
            have = None if context is None else list(context.shape)
            raise ValueError(f"MADE: context must be [B, {self.context_features}], got {have}")
        added: Tensor = self.context_layer(context)
        return added

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The numbers for each feature, ``[B, D, P]``, of x ``[B, D]``."""
        added = self.contexts(context)
        for index, layer in enumerate(self.layers):
            if index:
                x = activate(self.activation, x)
            x = layer(x)
            if index == 0 and added is not None:
                x = x + added
        return x.view(*x.shape[:-1], self.features, self.outputs)


class _Autoregressive(Transform):
    """What the autoregressive transforms share."""

    net: MADE

    def _check(self, x: Tensor, argument: str) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {argument} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 2 or x.size(1) != self.net.features:
            raise ValueError(f"{name}: {argument} must be [B, {self.net.features}], got {list(x.shape)}")

    def _solve(self, z: Tensor, context: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        """`ops.autoregressive_inverse` of the network."""
        net, dtype = self.net, z.dtype
        added, last = net.contexts(context), len(net.layers) - 1
        own: list[Any] = list(net.layers)
        layers = [
            ops.MaskedLayer(
                layer.weight.to(dtype),
                None if layer.bias is None else layer.bias.to(dtype),
                None if index == last else layer.out_degrees,
                activation=net.activation if index else "none",
                add=added.to(dtype) if index == 0 and added is not None else None,
            )
            for index, layer in enumerate(own)
        ]
        return ops.autoregressive_inverse(z, layers, **options)


class MaskedAffineAutoregressive(_Autoregressive):
    """``z_i = x_i * s_i + t_i`` with s_i and t_i from the features before i, by a `MADE`.

    Papamakarios et al. 2017 (arXiv 1705.07057), eq. 3 to 5: a layer of a masked autoregressive flow. `forward` is one
    pass of the network; `inverse` finds one feature after the other, in one operator (`ops.autoregressive_inverse`).

    Args:
        features: D of x ``[B, D]``.
        hidden, context_features, activation: of the `MADE`.
        scale: how the scale is made of what the network returns, as for `ops.affine_coupling`; by default
            ``sigmoid(r + 2)``.
        zero_init: start the last layer at zero.

    Raises:
        TypeError: a size is no int, x no Tensor.
        ValueError: a size below 1, an unknown activation or scale; from `forward`, x has another shape or the context
            is missing.

    Example:
        >>> layer = MaskedAffineAutoregressive(4, (16,))
        >>> x = torch.randn(5, 4)
        >>> z, log_abs_det = layer(x)
        >>> bool((layer.inverse(z)[0] - x).abs().max() < 1e-5), log_abs_det.shape
        (True, torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (128, 128),
        *,
        context_features: int | None = None,
        activation: str = "relu",
        scale: str = "sigmoid",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        check_scale("MaskedAffineAutoregressive", scale)
        self.net = MADE(
            features, 2, hidden, context_features=context_features, activation=activation, zero_init=zero_init
        )
        self.scale = scale

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, "x")
        params = self.net(x, context).flatten(1).to(x.dtype)
        return ops.affine_coupling(x, params, scale=self.scale, layout="interleaved_shift_scale")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(z, "z")
        return self._solve(z, context, transform="affine", scale=self.scale)


class MaskedSplineAutoregressive(_Autoregressive):
    """A monotone rational-quadratic spline of each feature, with parameters from the features before, by a `MADE`.

    Durkan et al. 2019 (arXiv 1906.04032), section 3.3: RQ-NSF (AR). `inverse` is one operator, as for
    `MaskedAffineAutoregressive`.

    Args:
        features: D of x ``[B, D]``.
        num_bins: of the spline.
        tail_bound: the spline is on [-tail_bound, tail_bound] both ways, and the identity outside of it.
        hidden, context_features, activation, zero_init: as for `MaskedAffineAutoregressive`.
        normalizer, logit_scale, min_bin_width, min_bin_height, min_derivative: as for `SplineCoupling`.

    Raises:
        TypeError: a size is no int, x no Tensor.
        ValueError: a size below 1; from `forward`, x has another shape or the context is missing.

    Example:
        >>> layer = MaskedSplineAutoregressive(4, hidden=(16,))
        >>> x = torch.randn(5, 4)
        >>> z, log_abs_det = layer(x)
        >>> bool((layer.inverse(z)[0] - x).abs().max() < 1e-4), log_abs_det.shape
        (True, torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        *,
        num_bins: int = 8,
        tail_bound: float = 3.0,
        hidden: Sequence[int] = (128, 128),
        context_features: int | None = None,
        activation: str = "relu",
        zero_init: bool = False,
        normalizer: str = "softmax",
        logit_scale: float | None = None,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ) -> None:
        super().__init__()
        name, kind = "MaskedSplineAutoregressive", "rational_quadratic"
        each = spline_parameters(name, kind, "linear", _check_size(name, "num_bins", num_bins))
        self.net = MADE(
            features, each, hidden, context_features=context_features, activation=activation, zero_init=zero_init
        )
        if logit_scale is None:
            logit_scale = 1.0 / math.sqrt(self.net.hidden_features)
        minima = (min_bin_width, min_bin_height, min_derivative)
        self.spline = SplineOptions(name, kind, num_bins, "linear", tail_bound, normalizer, minima, logit_scale)

    def extra_repr(self) -> str:
        return f"num_bins={self.spline.bins}, tail_bound={self.spline.tail_bound}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, "x")
        return self.spline(x, self.net(x, context), False, True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(z, "z")
        spline = self.spline
        return self._solve(z, context, transform="rational_quadratic", num_bins=spline.bins, **spline.of_solver())
