"""Pyro: the quadratic rational spline, affine couplings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import ops

from .nflows import bound_objection, limits_objection
from .patching import ByPeer, Peer, Target
from .serving import objection

__all__ = ["PEER"]

Pair = tuple[Tensor, Tensor]

_SPLINE = "pyro.distributions.transforms.spline"
_COUPLING = "pyro.distributions.transforms.affine_coupling"
_SHAPES = "shapes that the peer refuses or broadcasts"


def _monotonic_rational_spline(
    inputs: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    lambdas: Tensor | None = None,
    inverse: bool = False,
    bound: float = 3.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    min_lambda: float = 0.025,
    eps: float = 1e-6,
) -> Pair | str:
    if lambdas is not None:
        return "order 'linear': rational splines of linear order have no operator"
    parameters = widths, heights, derivatives
    reason = (
        objection("rational_quadratic_spline", inputs, *parameters)
        or bound_objection(bound)
        or limits_objection(widths.shape[-1], (min_bin_width, min_bin_height, min_derivative), None)
    )
    if reason is not None:
        return reason
    bins = widths.shape[-1]
    if bins < 1 or heights.shape[-1] != bins or derivatives.shape[-1] != bins - 1:
        return _SHAPES
    try:
        spread = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            inputs.shape, *(parameter.shape[:-1] for parameter in parameters)
        )
    except RuntimeError:
        return _SHAPES
    if spread != inputs.shape:
        return _SHAPES
    # Pyro's slope at both ends is 1 - min_derivative, and the operator adds min_derivative to what it is given.
    return ops.rational_quadratic_spline(
        inputs,
        widths,
        heights,
        F.pad(derivatives, (1, 1), value=1.0 - 2.0 * min_derivative),
        inverse=inverse,
        tail_bound=bound,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
        normalizer="none",
    )


def _coupling(self: Any, x: Tensor, inverse: bool) -> Tensor | str | ByPeer:
    """AffineCoupling: the part that is transformed; its log-scale is kept where the peer's log-determinant looks."""
    reason = objection("affine_coupling", x)
    if reason is not None:
        return reason
    if x.dim() < -self.dim or not 0 < self.split_dim < x.size(self.dim):
        return _SHAPES
    kept, changed = torch.split(x, [self.split_dim, x.size(self.dim) - self.split_dim], dim=self.dim)
    event = changed.shape[self.dim :]
    shift, raw = self.nn(kept.reshape(*kept.shape[: self.dim], -1))
    shift, raw = shift.reshape(*shift.shape[:-1], *event), raw.reshape(*raw.shape[:-1], *event)
    low, high = self.log_scale_min_clip, self.log_scale_max_clip
    if (
        objection("affine_coupling", x, shift, raw) is not None
        or shift.shape != changed.shape
        or raw.shape != changed.shape
        or not low <= high
    ):
        log_scale = raw + (raw.clamp(low, high) - raw).detach()
        made = (changed - shift) * torch.exp(-log_scale) if inverse else torch.exp(log_scale) * changed + shift
        self._cached_log_scale = log_scale
        return ByPeer(torch.cat([kept, made], dim=self.dim), "a network with outputs of another kind")
    rows = [one.reshape(-1, event.numel()) for one in (changed, raw, shift)]
    made, log_abs_det = ops.affine_coupling(
        *rows, scale="clip", clamp=(float(low), float(high)), inverse=inverse, reduce=False
    )
    log_abs_det = log_abs_det.view(changed.shape)
    self._cached_log_scale = -log_abs_det if inverse else log_abs_det
    return torch.cat([kept, made.view(changed.shape)], dim=self.dim)


def _coupling_call(self: Any, x: Tensor) -> Tensor | str | ByPeer:
    """AffineCoupling._call"""
    return _coupling(self, x, False)


def _coupling_inverse(self: Any, y: Tensor) -> Tensor | str | ByPeer:
    """AffineCoupling._inverse"""
    return _coupling(self, y, True)


PEER = Peer(
    name="pyro",
    distribution="pyro-ppl",
    sources={
        "1.9.2": {
            "pyro.distributions.transforms.spline": "46554dd9c3a637e4",
            "pyro.distributions.transforms.affine_coupling": "68e042e7bf114c49",
        },
    },
    targets=(
        Target(
            _SPLINE,
            "_monotonic_rational_spline",
            "inputs widths heights derivatives lambdas inverse bound min_bin_width min_bin_height min_derivative "
            "min_lambda eps",
            "genfuse.ops.rational_quadratic_spline, for order='quadratic'",
            _monotonic_rational_spline,
        ),
        Target(_COUPLING, "AffineCoupling._call", "self x", "genfuse.ops.affine_coupling", _coupling_call),
        Target(_COUPLING, "AffineCoupling._inverse", "self y", "genfuse.ops.affine_coupling", _coupling_inverse),
    ),
    left=(
        ("pyro.distributions.transforms.AffineAutoregressive", "its parameters and its inverse stay the peer's"),
        ("pyro.distributions.transforms.SplineAutoregressive", "its spline is served if order='quadratic'"),
        ("pyro.distributions.transforms.Polynomial", "genfuse has no operator for it"),
        ("pyro.distributions.transforms.NeuralAutoregressive", "genfuse has no operator for it"),
        ("pyro.distributions.transforms.BlockAutoregressive", "genfuse has no operator for it"),
        ("pyro.distributions.transforms.Householder", "matrix products, which the vendor's BLAS serves"),
    ),
)
