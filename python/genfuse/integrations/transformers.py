"""transformers: the spline of VITS' stochastic duration predictor."""

from __future__ import annotations

from torch import Tensor

from genfuse import ops

from .nflows import bound_objection, limits_objection
from .patching import Peer, Target
from .serving import OUTSIDE, objection

__all__ = ["PEER"]

Pair = tuple[Tensor, Tensor]

_VITS = "transformers.models.vits.modeling_vits"
_SHAPES = "shapes that the peer refuses or broadcasts"


def _reason(
    inputs: Tensor, parameters: tuple[Tensor, Tensor, Tensor], more: int, tail_bound: float, least: tuple[float, ...]
) -> str | None:
    reason = objection("rational_quadratic_spline", inputs, *parameters) or bound_objection(tail_bound)
    if reason is not None:
        return reason
    bins = parameters[0].shape[-1]
    wanted = bins, bins, bins + more
    if bins < 1 or any(p.shape != (*inputs.shape, n) for p, n in zip(parameters, wanted, strict=True)):
        return _SHAPES
    return limits_objection(bins, least, None)


def _unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    reverse: bool = False,
    tail_bound: float = 5.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Pair | str:
    parameters = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    reason = _reason(inputs, parameters, -1, tail_bound, (min_bin_width, min_bin_height, min_derivative))
    if reason is not None:
        return reason
    return ops.rational_quadratic_spline(
        inputs,
        *parameters,
        inverse=reverse,
        tail_bound=tail_bound,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
    )


def _rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    reverse: bool,
    tail_bound: float,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
) -> Pair | str:
    parameters = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    reason = _reason(inputs, parameters, 1, tail_bound, (min_bin_width, min_bin_height, min_derivative))
    if reason is not None:
        return reason
    try:
        return ops.rational_quadratic_spline(
            inputs,
            *parameters,
            inverse=reverse,
            tails=None,
            tail_bound=tail_bound,
            min_bin_width=min_bin_width,
            min_bin_height=min_bin_height,
            min_derivative=min_derivative,
        )
    except ops.InputOutsideDomain:
        return OUTSIDE


_PARAMETERS = "inputs unnormalized_widths unnormalized_heights unnormalized_derivatives reverse tail_bound"
_LEAST = "min_bin_width min_bin_height min_derivative"

PEER = Peer(
    name="transformers",
    distribution="transformers",
    sources={
        "5.24.0": {
            "transformers.models.vits.modeling_vits:_unconstrained_rational_quadratic_spline": "b02af719c323cb48",
            "transformers.models.vits.modeling_vits:_rational_quadratic_spline": "429374a2109b3a87",
        },
    },
    by_source=True,  # a release every other week, none of which has touched these two functions for years
    targets=tuple(
        Target(_VITS, attempt.__name__, f"{_PARAMETERS} {_LEAST}", "genfuse.ops.rational_quadratic_spline", attempt)
        for attempt in (_unconstrained_rational_quadratic_spline, _rational_quadratic_spline)
    ),
    left=(
        (f"{_VITS}.VitsConvFlow", "its network is convolutions; its spline is served"),
        (f"{_VITS}.VitsResidualCouplingLayer", "a shift alone (its log-scale is 0): one addition"),
        (f"{_VITS}.VitsElementwiseAffine", "two channels: too little to gain"),
    ),
)
