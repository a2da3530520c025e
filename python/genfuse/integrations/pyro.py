"""Pyro: the quadratic rational spline, affine couplings, the inverse of affine autoregressive transforms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import ops

from .networks import Network, activation, is_exactly, masked_layers, plain
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


def _network(net: Any, context: int) -> Network | str:
    """An AutoRegressiveNN as a network of masked layers; its skip connection is a layer of x added to the last."""
    linear = "pyro.nn.auto_reg_nn.MaskedLinear"
    name = activation(net.f)
    if name is None:
        return "an activation that genfuse does not know"
    if not plain(net, linear):
        return "a network of another class"
    modules, count = list(net.layers), len(net.layers)
    sources, activations = list(range(-1, count - 1)), ["none", *[name] * (count - 1)]
    residuals: list[int | None] = [None] * count
    strict: tuple[int, ...] = ()
    if net.skip_layer is not None:
        modules.insert(count - 1, net.skip_layer)
        sources.insert(count - 1, -1)
        activations.insert(count - 1, "none")
        residuals = [*residuals, count - 1]
        strict = (count - 1,)
    degrees = torch.empty_like(net.permutation)
    degrees[net.permutation] = torch.arange(1, len(degrees) + 1, device=degrees.device)
    return Network(
        modules,
        sources,
        activations,
        residuals,
        degrees,
        interleaved=False,
        context=context,
        context_first=True,
        strict=strict,
    )


def _autoregressive_inverse(self: Any, y: Tensor) -> Tensor | str:
    """AffineAutoregressive._inverse"""
    if self.stable:
        return "the stable variant, which the operator does not have"
    reason = objection("autoregressive_inverse", y)
    if reason is not None:
        return reason
    net: Any = self.arn
    context: Tensor | None = None
    if isinstance(net, partial):
        if net.args or set(net.keywords) != {"context"}:
            return "a network of another class"
        net, context = net.func, net.keywords["context"]
    wanted = "AutoRegressiveNN" if context is None else "ConditionalAutoRegressiveNN"
    if not is_exactly(net, f"pyro.nn.auto_reg_nn.{wanted}"):
        return "a network of another class"
    if net.param_dims != [1, 1] or y.dim() < 1 or y.shape[-1] != net.input_dim or net.input_dim < 1:
        return _SHAPES
    batch = y.shape[:-1]
    rows: Tensor | None = None
    if context is not None:
        reason = objection("autoregressive_inverse", y, context)
        if reason is not None:
            return reason
        try:
            rows = context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
        except RuntimeError:
            return _SHAPES
    low, high = self.log_scale_min_clip, self.log_scale_max_clip
    if not low <= high:
        return "an empty interval"
    network = _network(net, net.context_dim)
    if isinstance(network, str):
        return network
    layers = masked_layers(net, network, rows)
    if isinstance(layers, str):
        return layers
    reason = objection("autoregressive_inverse", y, *(layer.weight for layer in layers))
    if reason is not None:
        return reason
    x, log_abs_det = ops.autoregressive_inverse(
        y.reshape(-1, y.shape[-1]),
        layers,
        degrees=network.columns,
        scale="clip",
        clamp=(float(low), float(high)),
        interleaved=False,
    )
    # The peer keeps the log-scales, of which it only ever takes the sum over the columns.
    self._cached_log_scale = -log_abs_det.view(*batch, 1)
    return x.view(y.shape)


PEER = Peer(
    name="pyro",
    distribution="pyro-ppl",
    sources={
        "1.9.2": {
            "pyro.distributions.transforms.spline": "46554dd9c3a637e4",
            "pyro.distributions.transforms.affine_coupling": "68e042e7bf114c49",
            "pyro.distributions.transforms.affine_autoregressive": "a2f16bf1d4b712c0",
            "pyro.nn.auto_reg_nn": "29a0415437086f8e",
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
        Target(
            "pyro.distributions.transforms.affine_autoregressive",
            "AffineAutoregressive._inverse",
            "self y",
            "genfuse.ops.autoregressive_inverse, each column once",
            _autoregressive_inverse,
        ),
    ),
    left=(
        ("pyro.distributions.transforms.AffineAutoregressive._call", "its network is matrix products, and little else"),
        ("pyro.distributions.transforms.SplineAutoregressive", "its spline is served if order='quadratic'"),
        ("pyro.distributions.transforms.Polynomial", "genfuse has no operator for it"),
        ("pyro.distributions.transforms.NeuralAutoregressive", "genfuse has no operator for it"),
        ("pyro.distributions.transforms.BlockAutoregressive", "genfuse has no operator for it"),
        ("pyro.distributions.transforms.Householder", "matrix products, which the vendor's BLAS serves"),
    ),
)
