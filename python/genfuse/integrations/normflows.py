"""normflows: splines, affine couplings (Glow's blocks included), activation normalisation, autoregressive flows."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from genfuse import ops

from .networks import of_made
from .nflows import (
    bound_objection,
    domain,
    limits_objection,
    logit_scale,
    parameters_last,
    warn_of_unscaled_logits,
)
from .patching import ByPeer, Peer, Target
from .serving import OUTSIDE, hooked, objection, own

__all__ = ["PEER"]

Pair = tuple[Tensor, Tensor]

_SPLINES = "normflows.utils.splines"
_SPLINE_COUPLING = "normflows.flows.neural_spline.coupling"
_SPLINE_AUTOREGRESSIVE = "normflows.flows.neural_spline.autoregressive"
_AFFINE = "normflows.flows.affine.coupling"
_AUTOREGRESSIVE = "normflows.flows.affine.autoregressive"
_SHAPES = "shapes that the peer refuses or broadcasts"
_TAILS = "tails other than 'linear' and 'circular'"
_SUBCLASS = "a subclass with a transform of its own"
_DERIVATIVES = {"linear": -1, "circular": 0, None: 1}  # more than bins


def _tails_objection(tails: Any) -> str | None:
    if isinstance(tails, (list, tuple)):
        return "a list of tails"
    return None if tails in ("linear", "circular") else _TAILS


# ---- splines ---------------------------------------------------------------------------------------------------------


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
    reason = (
        _tails_objection(tails)
        or bound_objection(tail_bound)
        or objection("rational_quadratic_spline", inputs, *parameters)
    )
    if reason is not None:
        return reason
    bins = unnormalized_widths.shape[-1]
    reason = limits_objection(bins, (min_bin_width, min_bin_height, min_derivative), None)
    if reason is not None:
        return reason
    wanted = bins, bins, bins + _DERIVATIVES[tails]
    if (
        any(parameter.shape != (*inputs.shape, count) for parameter, count in zip(parameters, wanted, strict=True))
        or bins < 1
    ):
        return _SHAPES
    return ops.rational_quadratic_spline(
        inputs,
        *parameters,
        inverse=inverse,
        tails=tails,
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
    reason = objection("rational_quadratic_spline", inputs, *parameters)
    if reason is not None:
        return reason
    bins = unnormalized_widths.shape[-1]
    reason = limits_objection(bins, (min_bin_width, min_bin_height, min_derivative), (left, right, bottom, top))
    if reason is not None:
        return reason
    wanted = bins, bins, bins + 1
    if (
        any(parameter.shape != (*inputs.shape, count) for parameter, count in zip(parameters, wanted, strict=True))
        or bins < 1
    ):
        return _SHAPES
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


def _packed(self: Any, inputs: Tensor, params: Tensor | None, scale: float | None, inverse: bool) -> Pair | str:
    """The spline of a layer, by what its network gives: [*inputs.shape, P]."""
    if self.tails is not None:
        reason = _tails_objection(self.tails)
        if reason is not None:
            return reason
    reason = bound_objection(self.tail_bound) or limits_objection(
        self.num_bins, (self.min_bin_width, self.min_bin_height, self.min_derivative), None
    )
    if reason is not None:
        return reason
    if params is None or params.shape[-1] != 3 * self.num_bins + _DERIVATIVES[self.tails]:
        return _SHAPES
    try:
        return ops.rational_quadratic_spline(
            inputs,
            params,
            inverse=inverse,
            min_bin_width=self.min_bin_width,
            min_bin_height=self.min_bin_height,
            min_derivative=self.min_derivative,
            logit_scale=1.0 if scale is None else scale,
            reduce_dims=tuple(range(1, inputs.dim())),
            **domain(self.tails, self.tail_bound),
        )
    except ops.InputOutsideDomain:
        return OUTSIDE


def _coupling_spline(self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> Pair | str:
    """PiecewiseCoupling._coupling_transform"""
    if not own(self, f"{_SPLINE_COUPLING}.PiecewiseRationalQuadraticCoupling", "_piecewise_cdf"):
        return _SUBCLASS
    reason = objection("rational_quadratic_spline", inputs, transform_params)
    if reason is not None:
        return reason
    scale = logit_scale(self.transform_net)
    result = _packed(self, inputs, parameters_last(inputs, transform_params), scale, inverse)
    if scale is None and not isinstance(result, str):
        warn_of_unscaled_logits()
    return result


def _autoregressive_spline(
    self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
) -> Pair | str:
    """MaskedPiecewiseRationalQuadraticAutoregressive._elementwise"""
    if not own(
        self, f"{_SPLINE_AUTOREGRESSIVE}.MaskedPiecewiseRationalQuadraticAutoregressive", "_output_dim_multiplier"
    ):
        return _SUBCLASS
    reason = objection("rational_quadratic_spline", inputs, autoregressive_params)
    if reason is not None:
        return reason
    if inputs.dim() != 2:
        return _SHAPES
    net = self.autoregressive_net
    scale = 1.0 / math.sqrt(net.hidden_features) if hasattr(net, "hidden_features") else None
    return _packed(self, inputs, parameters_last(inputs, autoregressive_params), scale, inverse)


def _shared_spline(self: Any, inputs: Tensor, inverse: bool = False) -> Pair | str:
    """PiecewiseRationalQuadraticCDF._spline: one spline for each feature, whatever the row."""
    parameters = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
    least = self.min_bin_width, self.min_bin_height, self.min_derivative
    reason = (
        (None if self.tails is None else _tails_objection(self.tails))
        or bound_objection(self.tail_bound)
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


# ---- affine couplings ------------------------------------------------------------------------------------------------

# normflows' maps of the scale in its direction from noise to data.
_SCALE_MAPS = {"exp": "exp", "sigmoid": "inverse_sigmoid", "sigmoid_inv": "sigmoid"}


def _map_objection(coupling: Any) -> str | None:
    if not coupling.scale:
        return "a shift alone: one addition"
    return None if coupling.scale_map in _SCALE_MAPS else "another map of the scale"


def _affine(coupling: Any, x: Tensor, params: Tensor, split: str, inverse: bool) -> Pair:
    return ops.affine_coupling(
        x,
        params,
        scale=_SCALE_MAPS[coupling.scale_map],
        layout="interleaved_shift_scale",
        split=split,
        inverse=inverse,
    )


def _fits(params: Any, x: Tensor, channels: int) -> bool:
    return (
        objection("affine_coupling", x, params) is None
        and params.shape[:1] + params.shape[2:] == x.shape[:1] + x.shape[2:]
        and params.shape[1] == 2 * channels
    )


def _on_pair(self: Any, z: Any, inverse: bool) -> tuple[list[Tensor], Tensor] | str | ByPeer:
    reason = _map_objection(self)
    if reason is not None:
        return reason
    if not isinstance(z, (list, tuple)) or len(z) != 2:
        return _SHAPES
    z1, z2 = z
    reason = objection("affine_coupling", z2)
    if reason is not None:
        return reason
    if z2.dim() < 2:
        return _SHAPES
    params = self.param_map(z1)
    if not _fits(params, z2, z2.shape[1]):
        return ByPeer(_by_peer(self, z, params, inverse), _SHAPES)
    y, log_det = _affine(self, z2, params, "all", inverse)
    return [z1, y], log_det


def _by_peer(self: Any, z: Any, params: Tensor, inverse: bool) -> Any:
    """The peer's own code with a network that has run already."""
    twin = object.__new__(type(self))
    vars(twin).update(vars(self))
    vars(twin)["_modules"] = {**self._modules, "param_map": _Given(params)}
    original = getattr(type(self), "inverse" if inverse else "forward")
    return getattr(original, "__wrapped__", original)(twin, z)


class _Given(torch.nn.Module):
    """A network that has run already."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def _pair_forward(self: Any, z: Any) -> Any:
    """AffineCoupling.forward"""
    return _on_pair(self, z, False)


def _pair_inverse(self: Any, z: Any) -> Any:
    """AffineCoupling.inverse"""
    return _on_pair(self, z, True)


def _block(self: Any, z: Tensor, inverse: bool) -> Pair | str | ByPeer:
    """AffineCouplingBlock: split, coupling and merge at once."""
    if len(self.flows) != 3:
        return _SUBCLASS
    first, coupling, last = self.flows
    reshape = "normflows.flows.reshape"
    names = [f"{type(one).__module__}.{type(one).__qualname__}" for one in self.flows]
    if names != [f"{reshape}.Split", f"{_AFFINE}.AffineCoupling", f"{reshape}.Merge"] or first.mode != last.mode:
        return _SUBCLASS
    if any(map(hooked, self.flows)):
        return "hooks on a part of the block"
    if first.mode not in ("channel", "channel_inv"):
        return "a checkerboard: its coupling is served by itself"
    reason = _map_objection(coupling) or objection("affine_coupling", z)
    if reason is not None:
        return reason
    if z.dim() < 2 or z.shape[1] < 2:
        return _SHAPES
    half = (z.shape[1] + 1) // 2
    if first.mode == "channel":
        kept, split, channels = z[:, :half], "second", z.shape[1] - half
    else:
        kept, split, channels = z[:, half:], "first", half
    params = coupling.param_map(kept)
    if _fits(params, z, channels):
        return _affine(coupling, z, params, split, inverse)
    parts = [kept, z[:, half:] if split == "second" else z[:, :half]]
    (kept, changed), log_det = _by_peer(coupling, parts, params, inverse)
    merged = torch.cat([kept, changed] if split == "second" else [changed, kept], 1)
    return ByPeer((merged, log_det), _SHAPES)


def _block_forward(self: Any, z: Tensor) -> Pair | str | ByPeer:
    """AffineCouplingBlock.forward"""
    return _block(self, z, False)


def _block_inverse(self: Any, z: Tensor) -> Pair | str | ByPeer:
    """AffineCouplingBlock.inverse"""
    return _block(self, z, True)


# The masks found to hold zeros and ones alone, by module: the tensor, its version, and which elements are transformed.
_MASKS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Tensor, int, Tensor | None]] = weakref.WeakKeyDictionary()


def _transformed(module: Any) -> Tensor | None:
    """Where the mask of a MaskedAffineFlow is 0; None if it holds other numbers than 0 and 1."""
    mask = module.b
    known = _MASKS.get(module)
    if known is None or known[0] is not mask or known[1] != mask._version:
        binary = bool(((mask == 0) | (mask == 1)).all())
        known = (mask, mask._version, (mask == 0)[0] if binary else None)
        _MASKS[module] = known
    return known[2]


def _nan_for_infinite(value: Tensor) -> Tensor:
    return torch.add(value, value, alpha=0)  # infinity times 0 is NaN


def _masked(self: Any, z: Tensor, inverse: bool) -> Pair | str | ByPeer:
    """MaskedAffineFlow: two networks of full width."""
    reason = objection("affine_coupling", z, self.b)
    if reason is not None:
        return reason
    if z.dim() < 2 or z.shape[1:] != self.b.shape[1:]:
        return _SHAPES
    transformed = _transformed(self)
    if transformed is None:
        return "a mask that is not of zeros and ones"
    masked = self.b * z
    scale, shift = _nan_for_infinite(self.s(masked)), _nan_for_infinite(self.t(masked))
    if scale.shape != z.shape or shift.shape != z.shape or objection("affine_coupling", z, scale, shift) is not None:
        return ByPeer(_masked_by_peer(self.b, z, masked, scale, shift, inverse), _SHAPES)
    return ops.affine_coupling(z, scale, shift, split=transformed, inverse=inverse)


def _masked_by_peer(b: Tensor, z: Tensor, masked: Tensor, scale: Tensor, shift: Tensor, inverse: bool) -> Pair:
    free = 1 - b
    log_det = (free * scale).sum(tuple(range(1, b.dim())))
    if inverse:
        return masked + free * (z - shift) * torch.exp(-scale), -log_det
    return masked + free * (z * torch.exp(scale) + shift), log_det


def _masked_forward(self: Any, z: Tensor) -> Pair | str | ByPeer:
    """MaskedAffineFlow.forward"""
    return _masked(self, z, False)


def _masked_inverse(self: Any, z: Tensor) -> Pair | str | ByPeer:
    """MaskedAffineFlow.inverse"""
    return _masked(self, z, True)


def _constant(self: Any, z: Tensor, inverse: bool) -> Pair | str:
    """AffineConstFlow, and by it ActNorm: a scale and shift of each channel."""
    reason = objection("actnorm", z, self.s, self.t)
    if reason is not None:
        return reason
    channels = self.s.numel()
    if z.dim() < 2 or self.s.shape != (1, channels, *(1,) * (z.dim() - 2)) or z.shape[1] != channels:
        return "a scale for more than the channels"
    y, _ = ops.actnorm(z, self.s.flatten(), self.t.flatten(), inverse=inverse)
    # The peer's is one number for all rows.
    positions = math.prod(z.size(dim) for dim in self.batch_dims[1:])
    return y, (-positions if inverse else positions) * self.s.sum()


def _constant_forward(self: Any, z: Tensor) -> Pair | str:
    """AffineConstFlow.forward"""
    return _constant(self, z, False)


def _constant_inverse(self: Any, z: Tensor) -> Pair | str:
    """AffineConstFlow.inverse"""
    return _constant(self, z, True)


def _masked_affine(self: Any, inputs: Tensor, params: Tensor, inverse: bool) -> Pair | str:
    cls = f"{_AUTOREGRESSIVE}.MaskedAffineAutoregressive"
    if not own(self, cls, "_unconstrained_scale_and_shift", "_output_dim_multiplier"):
        return _SUBCLASS
    reason = objection("affine_coupling", inputs, params)
    if reason is not None:
        return reason
    if inputs.dim() != 2 or params.shape != (inputs.shape[0], 2 * inputs.shape[1]) or inputs.shape[1] != self.features:
        return _SHAPES
    return ops.affine_coupling(
        inputs, params, scale="sigmoid", offset=2.0, eps=1e-3, layout="interleaved_scale_shift", inverse=inverse
    )


def _masked_affine_forward(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> Pair | str:
    """MaskedAffineAutoregressive._elementwise_forward"""
    return _masked_affine(self, inputs, autoregressive_params, False)


def _masked_affine_inverse(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> Pair | str:
    """MaskedAffineAutoregressive._elementwise_inverse"""
    return _masked_affine(self, inputs, autoregressive_params, True)


def _inverted(self: Any, inputs: Tensor, context: Tensor | None, **options: Any) -> Pair | str:
    """An autoregressive flow: each column once."""
    if inputs.dim() != 2 or inputs.shape[1] < 1:
        return _SHAPES
    reason = objection("autoregressive_inverse", inputs)
    if reason is not None:
        return reason
    found = of_made(self.autoregressive_net, "normflows.nets.made", context, inputs.shape[0], None)
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
    """MaskedAffineAutoregressive.inverse"""
    cls = f"{_AUTOREGRESSIVE}.MaskedAffineAutoregressive"
    if not own(self, cls, "_elementwise_inverse", "_unconstrained_scale_and_shift", "_output_dim_multiplier"):
        return _SUBCLASS
    return _inverted(self, inputs, context, scale="sigmoid", offset=2.0, eps=1e-3, layout="scale_shift")


def _rqs_maf_inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Pair | str:
    """MaskedPiecewiseRationalQuadraticAutoregressive.inverse"""
    cls = f"{_SPLINE_AUTOREGRESSIVE}.MaskedPiecewiseRationalQuadraticAutoregressive"
    if not own(self, cls, "_elementwise_inverse", "_elementwise", "_output_dim_multiplier"):
        return _SUBCLASS
    if isinstance(self.tails, (list, tuple)):
        return "a list of tails"
    if self.tails != "linear":
        return "tails other than 'linear'"
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


def _targets() -> tuple[Target, ...]:
    rqs, affine = "genfuse.ops.rational_quadratic_spline", "genfuse.ops.affine_coupling"
    parameters = "inputs unnormalized_widths unnormalized_heights unnormalized_derivatives inverse"
    least = "min_bin_width min_bin_height min_derivative"
    elementwise = "self inputs autoregressive_params"
    maf, rqs_maf = "MaskedAffineAutoregressive", "MaskedPiecewiseRationalQuadraticAutoregressive"
    return (
        Target(
            _SPLINES,
            "unconstrained_rational_quadratic_spline",
            f"{parameters} tails tail_bound {least}",
            rqs,
            unconstrained_rational_quadratic_spline,
        ),
        Target(
            _SPLINES,
            "rational_quadratic_spline",
            f"{parameters} left right bottom top {least}",
            rqs,
            rational_quadratic_spline,
        ),
        Target(
            _SPLINE_COUPLING,
            "PiecewiseCoupling._coupling_transform",
            "self inputs transform_params inverse",
            f"{rqs} of packed parameters, log-determinant summed inside",
            _coupling_spline,
        ),
        Target(
            _SPLINE_COUPLING,
            "PiecewiseRationalQuadraticCDF._spline",
            "self inputs inverse",
            f"{rqs} of parameters that rows share",
            _shared_spline,
        ),
        Target(
            _SPLINE_AUTOREGRESSIVE,
            f"{rqs_maf}._elementwise",
            f"{elementwise} inverse",
            f"{rqs} of packed parameters",
            _autoregressive_spline,
        ),
        Target(_AUTOREGRESSIVE, f"{maf}._elementwise_forward", elementwise, affine, _masked_affine_forward),
        Target(_AUTOREGRESSIVE, f"{maf}._elementwise_inverse", elementwise, affine, _masked_affine_inverse),
        *(
            Target(
                module,
                f"{cls}.inverse",
                "self inputs context",
                "genfuse.ops.autoregressive_inverse, each column once",
                attempt,
                inherited=True,
            )
            for module, cls, attempt in (
                (_AUTOREGRESSIVE, maf, _maf_inverse),
                (_SPLINE_AUTOREGRESSIVE, rqs_maf, _rqs_maf_inverse),
            )
        ),
        Target(_AFFINE, "AffineCouplingBlock.forward", "self z", f"{affine}, split and merge inside", _block_forward),
        Target(_AFFINE, "AffineCouplingBlock.inverse", "self z", f"{affine}, split and merge inside", _block_inverse),
        Target(_AFFINE, "AffineCoupling.forward", "self z", affine, _pair_forward),
        Target(_AFFINE, "AffineCoupling.inverse", "self z", affine, _pair_inverse),
        Target(_AFFINE, "MaskedAffineFlow.forward", "self z", f"{affine} with a mask", _masked_forward),
        Target(_AFFINE, "MaskedAffineFlow.inverse", "self z", f"{affine} with a mask", _masked_inverse),
        Target(_AFFINE, "AffineConstFlow.forward", "self z", "genfuse.ops.actnorm", _constant_forward),
        Target(_AFFINE, "AffineConstFlow.inverse", "self z", "genfuse.ops.actnorm", _constant_inverse),
    )


PEER = Peer(
    name="normflows",
    distribution="normflows",
    sources={
        "1.7.3": {
            "normflows.utils.splines": "78656d2c910db8d6",
            "normflows.flows.neural_spline.coupling": "e8b874c1cc40e7a9",
            "normflows.flows.neural_spline.autoregressive": "2612704d9b73086d",
            "normflows.flows.affine.autoregressive": "bf6d83bff6dda732",
            "normflows.flows.affine.coupling": "951e2db00090627a",
            "normflows.flows.reshape": "9bd595bfc131a01a",
            "normflows.nets.made": "48e3ee1ca2ad9686",
        },
    },
    targets=_targets(),
    left=(
        ("normflows.flows.normalization.ActNorm", "its initialisation; the rest of it is AffineConstFlow, replaced"),
        ("normflows.flows.mixing.Invertible1x1Conv", "a convolution, which the vendor's library serves"),
        ("normflows.flows.mixing.LULinearPermute", "matrix products, which the vendor's BLAS serves"),
        ("normflows.flows.affine.coupling.CCAffineConst", "parameters by class: broadcasts that no operator has"),
        ("normflows.flows.reshape.Split", "views; and checkerboards, by indexing"),
        ("normflows.flows.residual.Residual", "genfuse has no operator for it"),
        ("normflows.nets.made.MADE", "its forward pass is matrix products, which the vendor's BLAS serves"),
    ),
)
