"""nflows: splines, couplings, activation normalisation and autoregressive transforms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genfuse import ops

from .networks import of_made
from .patching import ByPeer, Peer, Rebind, Target
from .serving import OUTSIDE, is_number, objection, own

__all__ = ["PEER"]

Pair = tuple[Tensor, Tensor]

_SPLINES = "nflows.transforms.splines"
_COUPLING = "nflows.transforms.coupling"
_AUTOREGRESSIVE = "nflows.transforms.autoregressive"
_NONLINEAR = "nflows.transforms.nonlinearities"
_SHAPES = "shapes that the peer refuses or broadcasts"
_TAILS = "tails other than 'linear'"
_LIMITS = "a bound or a least size is a tensor"
_LEAST = "least bin sizes that leave no room"


# ---- splines ---------------------------------------------------------------------------------------------------------


def _spline_objection(
    op: str,
    inputs: Tensor,
    parameters: tuple[Tensor, ...],
    least: tuple[float, ...] = (),
    interval: tuple[float, ...] | None = None,
) -> str | None:
    """`least` are the sizes of a bin's width and height, and of a slope; `interval` is left, right, bottom, top."""
    reason = objection(op, inputs, *parameters)
    if reason is not None:
        return reason
    if any(parameter.shape[:-1] != inputs.shape for parameter in parameters) or parameters[0].shape[-1] < 1:
        return _SHAPES
    return limits_objection(parameters[0].shape[-1], least, interval)


def limits_objection(bins: int, least: tuple[float, ...], interval: tuple[float, ...] | None) -> str | None:
    """Why a spline cannot have these limits."""
    if not all(map(is_number, (*least, *(interval or ())))):
        return _LIMITS
    if any(size < 0.0 or size * bins > 1.0 for size in least[:2]) or any(not 0.0 <= size < 1.0 for size in least[2:]):
        return _LEAST
    if interval is not None and not (interval[0] < interval[1] and interval[2] < interval[3]):
        return "an empty interval"
    return None


def _unconstrained(tails: object, tail_bound: object) -> str | None:
    if tails != "linear":
        return _TAILS
    return bound_objection(tail_bound)


def bound_objection(tail_bound: Any) -> str | None:
    """Why a spline cannot have this bound."""
    if not is_number(tail_bound):
        return _LIMITS
    return None if tail_bound > 0 else "an empty interval"


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Pair | str:
    parameters = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    reason = _unconstrained(tails, tail_bound) or _spline_objection(
        "rational_quadratic_spline", inputs, parameters, (min_bin_width, min_bin_height, min_derivative)
    )
    if reason is not None:
        return reason
    bins = unnormalized_widths.shape[-1]
    if unnormalized_heights.shape[-1] != bins or unnormalized_derivatives.shape[-1] != bins - 1:
        return _SHAPES
    return ops.rational_quadratic_spline(
        inputs,
        *parameters,
        inverse=inverse,
        tails="linear",
        tail_bound=tail_bound,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
    )


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Pair | str:
    parameters = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    least, interval = (min_bin_width, min_bin_height, min_derivative), (left, right, bottom, top)
    reason = _spline_objection("rational_quadratic_spline", inputs, parameters, least, interval)
    if reason is not None:
        return reason
    bins = unnormalized_widths.shape[-1]
    if unnormalized_heights.shape[-1] != bins or unnormalized_derivatives.shape[-1] != bins + 1:
        return _SHAPES
    if inverse and (left, right) != (bottom, top):
        return "an inverse with another codomain, whose input the peer compares with the domain"
    try:
        return ops.rational_quadratic_spline(
            inputs,
            *parameters,
            inverse=inverse,
            tails=None,
            left=left,
            right=right,
            bottom=bottom,
            top=top,
            min_bin_width=min_bin_width,
            min_bin_height=min_bin_height,
            min_derivative=min_derivative,
        )
    except ops.InputOutsideDomain:
        return OUTSIDE


def unconstrained_linear_spline(
    inputs: Tensor, unnormalized_pdf: Tensor, inverse: bool = False, tail_bound: float = 1.0, tails: str = "linear"
) -> Pair | str:
    reason = _unconstrained(tails, tail_bound) or _spline_objection("linear_spline", inputs, (unnormalized_pdf,))
    if reason is not None:
        return reason
    return ops.linear_spline(inputs, unnormalized_pdf, inverse=inverse, tails="linear", tail_bound=tail_bound)


def linear_spline(
    inputs: Tensor,
    unnormalized_pdf: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
) -> Pair | str:
    reason = _spline_objection("linear_spline", inputs, (unnormalized_pdf,), (), (left, right, bottom, top))
    if reason is not None:
        return reason
    if (left, right) != (bottom, top):
        return "a codomain other than the domain"
    try:
        return ops.linear_spline(
            inputs, unnormalized_pdf, inverse=inverse, tails=None, left=left, right=right, bottom=bottom, top=top
        )
    except ops.InputOutsideDomain:
        return OUTSIDE


def unconstrained_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    inverse: bool = False,
    tail_bound: float = 1.0,
    tails: str = "linear",
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
) -> Pair | str:
    parameters = unnormalized_widths, unnormalized_heights
    reason = _unconstrained(tails, tail_bound) or _spline_objection(
        "quadratic_spline", inputs, parameters, (min_bin_width, min_bin_height)
    )
    if reason is not None:
        return reason
    if not 1 <= unnormalized_heights.shape[-1] == unnormalized_widths.shape[-1] - 1:
        return _SHAPES
    return ops.quadratic_spline(
        inputs,
        *parameters,
        inverse=inverse,
        tails="linear",
        tail_bound=tail_bound,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
    )


def quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
) -> Pair | str:
    parameters = unnormalized_widths, unnormalized_heights
    least, interval = (min_bin_width, min_bin_height), (left, right, bottom, top)
    reason = _spline_objection("quadratic_spline", inputs, parameters, least, interval)
    if reason is not None:
        return reason
    if unnormalized_heights.shape[-1] != unnormalized_widths.shape[-1] + 1:
        return _SHAPES
    if (left, right) != (bottom, top):
        return "a codomain other than the domain"
    try:
        return ops.quadratic_spline(
            inputs,
            *parameters,
            inverse=inverse,
            tails=None,
            left=left,
            right=right,
            bottom=bottom,
            top=top,
            min_bin_width=min_bin_width,
            min_bin_height=min_bin_height,
        )
    except ops.InputOutsideDomain:
        return OUTSIDE


_CUBIC_EPS, _CUBIC_THRESHOLD = 1e-5, 1e-3  # of nflows' root finder, which ours does without


def unconstrained_cubic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnorm_derivatives_left: Tensor,
    unnorm_derivatives_right: Tensor,
    inverse: bool = False,
    tail_bound: float = 1.0,
    tails: str = "linear",
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    eps: float = _CUBIC_EPS,
    quadratic_threshold: float = _CUBIC_THRESHOLD,
) -> Pair | str:
    parameters = unnormalized_widths, unnormalized_heights, unnorm_derivatives_left, unnorm_derivatives_right
    reason = _unconstrained(tails, tail_bound) or _cubic_objection(
        inputs, parameters, min_bin_width, min_bin_height, eps, quadratic_threshold
    )
    if reason is not None:
        return reason
    return ops.cubic_spline(
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        torch.cat([unnorm_derivatives_left, unnorm_derivatives_right], dim=-1),
        inverse=inverse,
        tails="linear",
        tail_bound=tail_bound,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
    )


def cubic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnorm_derivatives_left: Tensor,
    unnorm_derivatives_right: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    eps: float = _CUBIC_EPS,
    quadratic_threshold: float = _CUBIC_THRESHOLD,
) -> Pair | str:
    parameters = unnormalized_widths, unnormalized_heights, unnorm_derivatives_left, unnorm_derivatives_right
    interval = left, right, bottom, top
    reason = _cubic_objection(inputs, parameters, min_bin_width, min_bin_height, eps, quadratic_threshold, interval)
    if reason is not None:
        return reason
    if (left, right) != (bottom, top):
        return "a codomain other than the domain"
    try:
        return ops.cubic_spline(
            inputs,
            unnormalized_widths,
            unnormalized_heights,
            torch.cat([unnorm_derivatives_left, unnorm_derivatives_right], dim=-1),
            inverse=inverse,
            tails=None,
            left=left,
            right=right,
            bottom=bottom,
            top=top,
            min_bin_width=min_bin_width,
            min_bin_height=min_bin_height,
        )
    except ops.InputOutsideDomain:
        return OUTSIDE


def _cubic_objection(
    inputs: Tensor,
    parameters: tuple[Tensor, ...],
    min_width: float,
    min_height: float,
    eps: float,
    threshold: float,
    interval: tuple[float, ...] | None = None,
) -> str | None:
    reason = _spline_objection("cubic_spline", inputs, parameters, (min_width, min_height), interval)
    if reason is not None:
        return reason
    widths, heights, *ends = (parameter.shape[-1] for parameter in parameters)
    if heights != widths or ends != [1, 1]:
        return _SHAPES
    if (eps, threshold) != (_CUBIC_EPS, _CUBIC_THRESHOLD):
        return "settings of the root finder"
    return None


# ---- transforms with a spline ----------------------------------------------------------------------------------------


def logit_scale(net: Any) -> float | None:
    """What a conditioner's logits are multiplied by; None if it does not say how wide it is.

    Example:
        >>> from types import SimpleNamespace
        >>> logit_scale(SimpleNamespace(hidden_features=64))
        0.125
    """
    for name in ("hidden_features", "hidden_channels"):
        if hasattr(net, name):
            return 1.0 / math.sqrt(getattr(net, name))
    return None


def warn_of_unscaled_logits() -> None:
    """The warning of nflows and normflows, in our words."""
    warnings.warn(
        "the conditioner has neither hidden_features nor hidden_channels, so the spline's logits are not scaled down",
        stacklevel=6,
    )


def parameters_last(inputs: Tensor, params: Tensor) -> Tensor | None:
    """What a conditioner gives, with the parameters of each element in the last dimension; None if that cannot be."""
    if inputs.dim() == 4 and params.dim() == 4:
        b, c, h, w = inputs.shape
        if c > 0 and params.shape[1] % c == 0 and (params.shape[0], *params.shape[2:]) == (b, h, w):
            return params.reshape(b, c, params.shape[1] // c, h, w).permute(0, 1, 3, 4, 2)
    elif inputs.dim() == 2 and params.dim() == 2:
        b, c = inputs.shape
        if c > 0 and params.shape[1] % c == 0 and params.shape[0] == b:
            return params.reshape(b, c, params.shape[1] // c)
    return None


def domain(tails: str | None, tail_bound: float) -> dict[str, Any]:
    """The arguments of a spline with tails, or of one on the unit interval."""
    if tails is None:
        return {"tails": None, "left": 0.0, "right": 1.0, "bottom": 0.0, "top": 1.0}
    return {"tails": tails, "tail_bound": tail_bound}


def _coupling_spline(self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> Pair | str:
    """PiecewiseCouplingTransform._coupling_transform"""
    for kind in ("RationalQuadratic", "Linear", "Quadratic", "Cubic"):
        if own(self, f"{_COUPLING}.Piecewise{kind}CouplingTransform", "_piecewise_cdf"):
            break
    else:
        return "a subclass with a transform of its own"
    if self.tails not in (None, "linear"):
        return _TAILS
    reason = bound_objection(self.tail_bound)
    if reason is not None:
        return reason
    function: Callable[..., Pair]
    options: dict[str, Any] = {"inverse": inverse, **domain(self.tails, self.tail_bound)}
    if kind == "RationalQuadratic":
        op, function = "rational_quadratic_spline", ops.rational_quadratic_spline
        each = 3 * self.num_bins + (1 if self.tails is None else -1)
        least: tuple[float, ...] = self.min_bin_width, self.min_bin_height, self.min_derivative
        options["min_derivative"] = self.min_derivative
    elif kind == "Linear":
        op, function, each, least = "linear_spline", ops.linear_spline, self.num_bins, ()
    elif kind == "Quadratic":
        op, function, least = "quadratic_spline", ops.quadratic_spline, (self.min_bin_width, self.min_bin_height)
        each = 2 * self.num_bins + (1 if self.tails is None else -1)
    else:
        op, function, least = "cubic_spline", ops.cubic_spline, (self.min_bin_width, self.min_bin_height)
        each = 2 * self.num_bins + 2
    reason = objection(op, inputs, transform_params) or limits_objection(self.num_bins, least, None)
    if reason is not None:
        return reason
    params = parameters_last(inputs, transform_params)
    if params is None or params.shape[-1] != each:
        return _SHAPES
    if kind != "Linear":
        options["min_bin_width"], options["min_bin_height"] = self.min_bin_width, self.min_bin_height
        scale = logit_scale(self.transform_net)
        if kind == "RationalQuadratic":
            if scale is None:
                warn_of_unscaled_logits()
        elif not hasattr(self.transform_net, "hidden_features"):
            scale = None
        if scale is not None:
            options["logit_scale"] = scale
    try:
        return function(inputs, params, reduce_dims=tuple(range(1, inputs.dim())), **options)
    except ops.InputOutsideDomain:
        return OUTSIDE


def _autoregressive_spline(
    self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
) -> Pair | str:
    """MaskedPiecewiseRationalQuadraticAutoregressiveTransform._elementwise"""
    cls = f"{_AUTOREGRESSIVE}.MaskedPiecewiseRationalQuadraticAutoregressiveTransform"
    if not own(self, cls, "_output_dim_multiplier"):
        return "a subclass with a transform of its own"
    if self.tails not in (None, "linear"):
        return _TAILS
    least = self.min_bin_width, self.min_bin_height, self.min_derivative
    reason = (
        bound_objection(self.tail_bound)
        or objection("rational_quadratic_spline", inputs, autoregressive_params)
        or limits_objection(self.num_bins, least, None)
    )
    if reason is not None:
        return reason
    each = 3 * self.num_bins + (1 if self.tails is None else -1)
    if inputs.dim() != 2 or autoregressive_params.shape != (inputs.shape[0], inputs.shape[1] * each):
        return _SHAPES
    net = self.autoregressive_net
    try:
        return ops.rational_quadratic_spline(
            inputs,
            autoregressive_params.reshape(*inputs.shape, each),
            inverse=inverse,
            min_bin_width=self.min_bin_width,
            min_bin_height=self.min_bin_height,
            min_derivative=self.min_derivative,
            logit_scale=1.0 / math.sqrt(net.hidden_features) if hasattr(net, "hidden_features") else 1.0,
            reduce_dims=(1,),
            **domain(self.tails, self.tail_bound),
        )
    except ops.InputOutsideDomain:
        return OUTSIDE


def _shared_spline(self: Any, inputs: Tensor, inverse: bool = False) -> Pair | str:
    """PiecewiseRationalQuadraticCDF._spline: one spline for each feature, whatever the row."""
    if self.tails not in (None, "linear"):
        return _TAILS
    parameters = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
    least = self.min_bin_width, self.min_bin_height, self.min_derivative
    reason = (
        bound_objection(self.tail_bound)
        or objection("rational_quadratic_spline", inputs, *parameters)
        or limits_objection(parameters[0].shape[-1], least, None)
    )
    if reason is not None:
        return reason
    if inputs.dim() < 2 or any(parameter.shape[:-1] != inputs.shape[1:] for parameter in parameters):
        return _SHAPES
    try:
        return ops.rational_quadratic_spline(
            inputs,
            *parameters,
            inverse=inverse,
            min_bin_width=self.min_bin_width,
            min_bin_height=self.min_bin_height,
            min_derivative=self.min_derivative,
            reduce_dims=tuple(range(1, inputs.dim())),
            **domain(self.tails, self.tail_bound),
        )
    except ops.InputOutsideDomain:
        return OUTSIDE


# ---- affine transforms -----------------------------------------------------------------------------------------------


def _coupling(self: Any, inputs: Tensor, context: Tensor | None, inverse: bool) -> Pair | str | ByPeer:
    """An affine or additive CouplingTransform, split and merge included."""
    affine, additive = f"{_COUPLING}.AffineCouplingTransform", f"{_COUPLING}.AdditiveCouplingTransform"
    if own(self, affine, "_scale_and_shift", "_coupling_transform_forward", "_coupling_transform_inverse"):
        op = "affine_coupling"
    elif own(self, additive, "_scale_and_shift") and own(
        self, affine, "_coupling_transform_forward", "_coupling_transform_inverse"
    ):
        op = "additive_coupling"
    else:
        return "a subclass with a transform of its own"
    if self.unconditional_transform is not None:
        return "the identity features have a transform of their own"
    if inputs.dim() not in (2, 4) or inputs.shape[1] != self.features:
        return _SHAPES
    reason = objection(op, inputs)
    if reason is not None:
        return reason
    params = self.transform_net(inputs[:, self.identity_features, ...], context)
    # The net has run, so there is no going back, as it may draw random numbers (dropout) or keep statistics.
    transformed = self.transform_features
    channels = len(transformed) * (2 if op == "affine_coupling" else 1)
    if (
        objection(op, inputs, params) is not None
        or params.shape[:1] + params.shape[2:] != inputs.shape[:1] + inputs.shape[2:]
        or params.shape[1] != channels
    ):
        return ByPeer(_unfused_coupling(self, inputs, params, inverse), "a conditioner with parameters of another kind")
    if op == "additive_coupling":
        outputs = ops.additive_coupling(inputs, params, split=transformed, inverse=inverse)
        return outputs, inputs.new_zeros(inputs.shape[0])
    return ops.affine_coupling(
        inputs,
        params,
        scale="sigmoid",
        offset=2.0,
        eps=1e-3,
        layout="shift_scale",
        split=transformed,
        inverse=inverse,
    )


def _unfused_coupling(self: Any, inputs: Tensor, params: Tensor, inverse: bool) -> Pair:
    """The rest of a coupling by the peer's own pieces, for parameters that genfuse does not take."""
    name = "_coupling_transform_inverse" if inverse else "_coupling_transform_forward"
    changed, logabsdet = getattr(self, name)(inputs[:, self.transform_features, ...], params)
    outputs = torch.empty_like(inputs)
    outputs[:, self.identity_features] = inputs[:, self.identity_features]
    outputs[:, self.transform_features] = changed
    return outputs, logabsdet


def _coupling_forward(self: Any, inputs: Tensor, context: Tensor | None = None) -> Pair | str | ByPeer:
    """AffineCouplingTransform.forward"""
    return _coupling(self, inputs, context, False)


def _coupling_inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Pair | str | ByPeer:
    """AffineCouplingTransform.inverse"""
    return _coupling(self, inputs, context, True)


def _actnorm(self: Any, inputs: Tensor, inverse: bool) -> Pair | str:
    if inputs.dim() not in (2, 4) or inputs.shape[1] != self.log_scale.shape[0]:
        return _SHAPES
    reason = objection("actnorm", inputs, self.log_scale, self.shift)
    if reason is not None:
        return reason
    if not own(self, "nflows.transforms.normalization.ActNorm", "scale", "_broadcastable_scale_shift"):
        return "a subclass with a transform of its own"
    if not inverse and self.training and not self.initialized:
        self._initialize(inputs)
    return ops.actnorm(inputs, self.log_scale, self.shift, inverse=inverse)


def _actnorm_forward(self: Any, inputs: Tensor, context: Tensor | None = None) -> Pair | str:
    """ActNorm.forward"""
    return _actnorm(self, inputs, False)


def _actnorm_inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Pair | str:
    """ActNorm.inverse"""
    return _actnorm(self, inputs, True)


def _masked_affine(self: Any, inputs: Tensor, params: Tensor, inverse: bool) -> Pair | str:
    cls = f"{_AUTOREGRESSIVE}.MaskedAffineAutoregressiveTransform"
    if not own(self, cls, "_unconstrained_scale_and_shift", "_output_dim_multiplier"):
        return "a subclass with a transform of its own"
    reason = objection("affine_coupling", inputs, params)
    if reason is not None:
        return reason
    if inputs.dim() != 2 or params.shape != (inputs.shape[0], 2 * inputs.shape[1]) or inputs.shape[1] != self.features:
        return _SHAPES
    return ops.affine_coupling(
        inputs, params, scale="softplus", eps=self._epsilon, layout="interleaved_scale_shift", inverse=inverse
    )


def _masked_affine_forward(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> Pair | str:
    """MaskedAffineAutoregressiveTransform._elementwise_forward"""
    return _masked_affine(self, inputs, autoregressive_params, False)


def _masked_affine_inverse(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> Pair | str:
    """MaskedAffineAutoregressiveTransform._elementwise_inverse"""
    return _masked_affine(self, inputs, autoregressive_params, True)


def _inverted(self: Any, inputs: Tensor, context: Tensor | None, **options: Any) -> Pair | str:
    """An autoregressive transform: each column once."""
    if inputs.dim() != 2 or inputs.shape[1] < 1:
        return _SHAPES
    reason = objection("autoregressive_inverse", inputs)
    if reason is not None:
        return reason
    net = self.autoregressive_net
    found = of_made(net, "nflows.transforms.made", context, inputs.shape[0], getattr(net, "activation", None))
    if isinstance(found, str):
        return found
    layers, degrees = found
    if len(degrees) != inputs.shape[1]:
        return _SHAPES
    reason = objection("autoregressive_inverse", inputs, *(layer.weight for layer in layers))
    if reason is not None:
        return reason
    return ops.autoregressive_inverse(inputs, layers, degrees=degrees, **options)


def _maf_inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Pair | str:
    """MaskedAffineAutoregressiveTransform.inverse"""
    cls = f"{_AUTOREGRESSIVE}.MaskedAffineAutoregressiveTransform"
    if not own(self, cls, "_elementwise_inverse", "_unconstrained_scale_and_shift", "_output_dim_multiplier"):
        return "a subclass with a transform of its own"
    return _inverted(self, inputs, context, scale="softplus", eps=self._epsilon, layout="scale_shift")


def _rqs_maf_inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Pair | str:
    """MaskedPiecewiseRationalQuadraticAutoregressiveTransform.inverse"""
    cls = f"{_AUTOREGRESSIVE}.MaskedPiecewiseRationalQuadraticAutoregressiveTransform"
    if not own(self, cls, "_elementwise_inverse", "_elementwise", "_output_dim_multiplier"):
        return "a subclass with a transform of its own"
    if self.tails != "linear":
        return "no tails: an input outside of the domain is an error, which is found column by column"
    least = self.min_bin_width, self.min_bin_height, self.min_derivative
    reason = bound_objection(self.tail_bound) or limits_objection(self.num_bins, least, None)
    if reason is not None:
        return reason
    net = self.autoregressive_net
    return _inverted(
        self,
        inputs,
        context,
        transform="rational_quadratic",
        num_bins=self.num_bins,
        tail_bound=self.tail_bound,
        min_bin_width=self.min_bin_width,
        min_bin_height=self.min_bin_height,
        min_derivative=self.min_derivative,
        logit_scale=1.0 / math.sqrt(net.hidden_features) if hasattr(net, "hidden_features") else 1.0,
    )


# ---- the table -------------------------------------------------------------------------------------------------------

_RQS = "genfuse.ops.rational_quadratic_spline"
_PARAMETERS = "inputs unnormalized_widths unnormalized_heights"
_BOX = "inverse left right bottom top"


def _targets() -> tuple[Target, ...]:
    spline: dict[str, tuple[Callable[..., Any], Callable[..., Any], str, str, str]] = {
        "rational_quadratic": (
            unconstrained_rational_quadratic_spline,
            rational_quadratic_spline,
            f"{_PARAMETERS} unnormalized_derivatives",
            "inverse tails tail_bound",
            "min_bin_width min_bin_height min_derivative",
        ),
        "linear": (
            unconstrained_linear_spline,
            linear_spline,
            "inputs unnormalized_pdf",
            "inverse tail_bound tails",
            "",
        ),
        "quadratic": (
            unconstrained_quadratic_spline,
            quadratic_spline,
            _PARAMETERS,
            "inverse tail_bound tails",
            "min_bin_width min_bin_height",
        ),
        "cubic": (
            unconstrained_cubic_spline,
            cubic_spline,
            f"{_PARAMETERS} unnorm_derivatives_left unnorm_derivatives_right",
            "inverse tail_bound tails",
            "min_bin_width min_bin_height eps quadratic_threshold",
        ),
    }
    found = []
    for kind, (unconstrained, constrained, parameters, tails, least) in spline.items():
        module, by = f"{_SPLINES}.{kind}", f"genfuse.ops.{kind}_spline"
        for attempt, middle in ((unconstrained, tails), (constrained, _BOX)):
            found.append(Target(module, attempt.__name__, f"{parameters} {middle} {least}".strip(), by, attempt))
    coupling, maf = "AffineCouplingTransform", "MaskedAffineAutoregressiveTransform"
    rqs_maf = "MaskedPiecewiseRationalQuadraticAutoregressiveTransform"
    elementwise = "self inputs autoregressive_params"
    affine = "genfuse.ops.affine_coupling"
    return (
        *found,
        Target(
            _COUPLING,
            "PiecewiseCouplingTransform._coupling_transform",
            "self inputs transform_params inverse",
            "genfuse.ops.*_spline of packed parameters, log-determinant summed inside",
            _coupling_spline,
        ),
        *(
            Target(
                _COUPLING,
                f"{coupling}.{name}",
                "self inputs context",
                f"{affine} or additive_coupling, split and merge inside",
                attempt,
                inherited=True,
            )
            for name, attempt in (("forward", _coupling_forward), ("inverse", _coupling_inverse))
        ),
        Target(
            _NONLINEAR,
            "PiecewiseRationalQuadraticCDF._spline",
            "self inputs inverse",
            f"{_RQS} of parameters that rows share",
            _shared_spline,
        ),
        Target(
            _AUTOREGRESSIVE,
            f"{rqs_maf}._elementwise",
            f"{elementwise} inverse",
            f"{_RQS} of packed parameters",
            _autoregressive_spline,
        ),
        Target(_AUTOREGRESSIVE, f"{maf}._elementwise_forward", elementwise, affine, _masked_affine_forward),
        Target(_AUTOREGRESSIVE, f"{maf}._elementwise_inverse", elementwise, affine, _masked_affine_inverse),
        *(
            Target(
                _AUTOREGRESSIVE,
                f"{cls}.inverse",
                "self inputs context",
                "genfuse.ops.autoregressive_inverse, each column once",
                attempt,
                inherited=True,
            )
            for cls, attempt in ((maf, _maf_inverse), (rqs_maf, _rqs_maf_inverse))
        ),
        *(
            Target(
                "nflows.transforms.normalization",
                f"ActNorm.{name}",
                "self inputs context",
                "genfuse.ops.actnorm",
                attempt,
            )
            for name, attempt in (("forward", _actnorm_forward), ("inverse", _actnorm_inverse))
        ),
    )


def _rebinds() -> tuple[Rebind, ...]:
    found = []
    for kind in ("linear", "quadratic", "cubic"):
        functions = f"unconstrained_{kind}_spline", f"{kind}_spline"
        found.append(Rebind(_NONLINEAR, f"Piecewise{kind.title()}CDF._spline", functions, "splines"))
        name = f"MaskedPiecewise{kind.title()}AutoregressiveTransform"
        bound = functions if kind == "quadratic" else functions[1:]
        found.append(Rebind(_AUTOREGRESSIVE, f"{name}._elementwise", bound))
    return tuple(found)


PEER = Peer(
    name="nflows",
    distribution="nflows",
    sources={
        "0.14": {
            "nflows.transforms.splines.rational_quadratic": "68c23311a0f8e056",
            "nflows.transforms.splines.linear": "4dcb7cd192de2b9d",
            "nflows.transforms.splines.quadratic": "7a0b0f896b3dbc24",
            "nflows.transforms.splines.cubic": "b72794629ba7137e",
            "nflows.transforms.coupling": "0d131487a2efcfea",
            "nflows.transforms.nonlinearities": "ff086b0c716dc9ea",
            "nflows.transforms.autoregressive": "eb52e2841c1cb5fd",
            "nflows.transforms.normalization": "10edd6cfad19d754",
            "nflows.transforms.made": "5e621fa91b7fc0e8",
        },
    },
    targets=_targets(),
    rebinds=_rebinds(),
    left=(
        ("nflows.transforms.lu.LULinear", "two matrix products, which the vendor's BLAS serves"),
        ("nflows.transforms.conv.OneByOneConvolution", "two matrix products, which the vendor's BLAS serves"),
        (
            "nflows.transforms.linear.NaiveLinear",
            "a matrix product; its inverse calls torch.solve, which torch removed",
        ),
        ("nflows.transforms.normalization.BatchNorm", "normalises by statistics of the batch"),
        (
            "nflows.transforms.coupling.CouplingTransform.forward",
            "split and merge of couplings with a spline: indexing",
        ),
        ("nflows.transforms.made.MADE", "its forward pass is matrix products, which the vendor's BLAS serves"),
    ),
)
