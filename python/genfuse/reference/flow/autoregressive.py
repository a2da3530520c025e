"""Masked linear layers, and the inverse of a flow whose parameters come from a network of them.

One rule masks everything: each column of x and each unit has a degree, and a unit sees what has no larger degree
(Germain et al. 2015, arXiv 1502.03509, eq. 10 and 11). The parameters of a column of degree d are units of degree
d - 1, so they see the columns of lower degrees alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .coupling import SCALES as _SCALES
from .coupling import _scaled
from .spline import spline

__all__ = [
    "ACTIVATIONS",
    "NORMALIZERS",
    "SCALES",
    "TRANSFORMS",
    "MaskedLayer",
    "autoregressive_inverse",
    "masked_linear",
    "masked_network",
]

# The order is that of the kernels' codes.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda h: h,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}
TRANSFORMS = ("affine", "additive", "rational_quadratic")
SCALES = tuple(_SCALES)
NORMALIZERS = ("softmax", "identity", "zuko")
HEADER = 5  # integers of a program before the columns' degrees
FIELDS = 6  # and for each layer


@dataclass(frozen=True)
class MaskedLayer:
    """One layer of an autoregressive network: ``act(source) @ (mask * weight).T + bias + add + residual``.

    Attributes:
        weight: ``[units, inputs]``. Where the mask is 0 it counts for nothing, and its gradient is 0.
        bias: ``[units]`` or None.
        degrees: int64 ``[units]``: unit m sees the units of its source whose degree is at most ``degrees[m]``. None for
            the last layer, whose units are the columns' parameters, each a unit of its column's degree - 1.
        source: what is multiplied: the number of a layer before this one, -1 for x; None for the layer just before
            (x for the first).
        activation: applied to the source: "none", "relu", "tanh", "elu", "leaky_relu", "sigmoid", "silu" or "gelu".
        add: ``[B, units]``, added as it is: what comes of the context. None for nothing.
        residual: the number of a layer before this one that has as many units, none of larger degree; added as it is.
    """

    weight: Tensor
    bias: Tensor | None = None
    degrees: Tensor | None = None
    source: int | None = None
    activation: str = "none"
    add: Tensor | None = None
    residual: int | None = None


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> tuple[Tensor]:
    """``x @ (mask * weight).T + bias`` with mask[o, i] = out_degrees[o] >= in_degrees[i], or > if strict.

    Example:
        >>> degrees = torch.arange(3)
        >>> masked_linear(torch.ones(3), torch.ones(3, 3), None, degrees, degrees, False)
        (tensor([1., 2., 3.]),)
    """
    mask = out_degrees[:, None] > in_degrees if strict else out_degrees[:, None] >= in_degrees
    return (F.linear(x, torch.where(mask, weight, 0), bias),)  # not a product: what is dead may be NaN


def _parameter_order(columns: int, each: int, columns_first: bool) -> list[int]:
    """The column of each unit of the last layer."""
    if columns_first:
        return [unit // each for unit in range(columns * each)]
    return [unit % columns for unit in range(columns * each)]


def masked_network(
    x: Tensor, layers: Sequence[MaskedLayer], degrees: Sequence[int], *, columns_first: bool = True
) -> Tensor:
    """The parameters of all columns, ``[B, D, P]``, from x ``[B, D]``.

    Example:
        >>> layers = [MaskedLayer(torch.ones(2, 2), degrees=torch.tensor([1, 1])), MaskedLayer(torch.ones(2, 2))]
        >>> masked_network(torch.tensor([[3.0, 5.0]]), layers, [1, 2])[..., 0]
        tensor([[0., 6.]])
    """
    columns = x.size(-1)
    of_x = torch.tensor(list(degrees), dtype=torch.int64, device=x.device)
    of_layer: list[Tensor] = []
    found: list[Tensor] = []
    for index, layer in enumerate(layers):
        source = index - 1 if layer.source is None else layer.source
        own = layer.degrees
        if own is None:
            each = layer.weight.size(0) // max(columns, 1)
            own = of_x[_parameter_order(columns, each, columns_first)] - 1
        inputs, sees = (x, of_x) if source < 0 else (found[source], of_layer[source])
        (h,) = masked_linear(ACTIVATIONS[layer.activation](inputs), layer.weight, layer.bias, sees, own, False)
        if layer.add is not None:
            h = h + layer.add
        if layer.residual is not None:
            h = h + found[layer.residual]
        found.append(h)
        of_layer.append(own)
    each = found[-1].size(-1) // max(columns, 1)
    if columns_first:
        return found[-1].reshape(*x.shape[:-1], columns, each)
    return found[-1].reshape(*x.shape[:-1], each, columns).transpose(-1, -2)


def _columns_inverse(
    u: Tensor, parameters: Tensor, program: Sequence[int], constants: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """x and ln |dx/du| of each element: u [B, D], parameters [B, D, P]."""
    transform, kind, _, scale_first, _ = program[:HEADER]
    offset, eps, low, clamp, bound, min_width, min_height, min_derivative, logit_scale = constants
    if TRANSFORMS[transform] == "additive":
        return u - parameters[..., 0], torch.zeros_like(u)
    if TRANSFORMS[transform] == "affine":
        raw, shift = parameters[..., 1 - scale_first], parameters[..., scale_first]
        return _scaled(u - shift, raw, SCALES[kind], offset, eps, low, clamp, True)
    return spline(
        u,
        parameters,
        None,
        None,
        kind="rational_quadratic",
        normalizer=NORMALIZERS[kind],
        ends="one",
        tails=True,
        inverse=True,
        left=-bound,
        right=bound,
        bottom=-bound,
        top=bound,
        min_width=min_width,
        min_height=min_height,
        min_derivative=min_derivative,
        logit_scale=logit_scale,
        bins=(parameters.size(-1) + 1) // 3,
        batch_dims=u.dim(),
    )


def _unpack(
    u: Tensor,
    parameters: Tensor,
    additions: Tensor | None,
    degrees: Tensor,
    program: Sequence[int],
) -> tuple[list[MaskedLayer], list[int]]:
    """The layers and the columns' degrees of a packed call."""
    columns = u.size(-1)
    of_columns = list(program[HEADER : HEADER + columns])
    fields = program[HEADER + columns :]
    sizes = [columns]
    layers = []
    at = added = unit = 0
    for place in range(0, len(fields), FIELDS):
        units, source, activation, has_bias, has_add, residual = fields[place : place + FIELDS]
        last = place + FIELDS == len(fields)
        inputs = sizes[source + 1]
        weight = parameters[at : at + units * inputs].view(units, inputs)
        at += units * inputs
        bias = parameters[at : at + units] if has_bias else None
        at += units if has_bias else 0
        add = additions[:, added : added + units] if has_add and additions is not None else None
        added += units if has_add else 0
        layers.append(
            MaskedLayer(
                weight,
                bias,
                None if last else degrees[unit : unit + units],
                source,
                list(ACTIVATIONS)[activation],
                add,
                residual if residual >= 0 else None,
            )
        )
        unit += units
        sizes.append(units)
    return layers, of_columns


def autoregressive_inverse(
    u: Tensor,
    parameters: Tensor,
    additions: Tensor | None,
    degrees: Tensor,
    program: Sequence[int],
    constants: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """x with f(x) = u, one degree of columns after the other, and ln |det dx/du|.

    Papamakarios et al. 2017 (arXiv 1705.07057), eq. 4, solved for x: x_i = g(u_i; parameters_i(x_1 .. x_{i-1})). The
    whole network runs once for each degree.

    Args:
        u: ``[B, D]``.
        parameters: weights and biases of all layers, flat: weight, bias, weight, ...
        additions: ``[B, sum of units]``: of the layers that have any, side by side.
        degrees: int64 ``[sum of units]`` of all layers but the last.
        program: transform, its kind, P, whether the scale comes first, whether a column's parameters lie together; the
            columns' degrees; for each layer: units, source, activation, has_bias, has_add, residual (-1 for none).
        constants: offset, eps, low, clamp, tail_bound, min_bin_width, min_bin_height, min_derivative, logit_scale.
    """
    dtype, wide = u.dtype, torch.float64 if u.dtype == torch.float64 else torch.float32
    u, parameters = u.to(wide), parameters.to(wide)
    additions = None if additions is None else additions.to(wide)
    layers, of_columns = _unpack(u, parameters, additions, degrees, program)
    x, log_slope = torch.zeros_like(u), torch.zeros_like(u)
    for degree in sorted(set(of_columns)):
        found = masked_network(x, layers, of_columns, columns_first=bool(program[4]))
        now, slope = _columns_inverse(u, found, program, constants)
        mine = torch.tensor([one == degree for one in of_columns], dtype=torch.bool, device=u.device)
        x, log_slope = torch.where(mine, now, x), torch.where(mine, slope, log_slope)
    return x.to(dtype), log_slope.sum(-1)
