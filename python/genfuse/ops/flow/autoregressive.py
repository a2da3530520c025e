"""Masked linear layers, and the inverse of an autoregressive flow with each unit of its network computed once.

The definitions are in `genfuse.reference.flow.autoregressive`; each function is one registered operator with the rules
of `operator.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genfuse import backends
from genfuse.ops.operator import Operator, can_look_at, lowered, native_objection, on_cpu, under_autocast
from genfuse.ops.sampling import check_number, check_tensor, wide_dtype
from genfuse.reference.flow import autoregressive as reference
from genfuse.reference.flow.autoregressive import MaskedLayer
from genfuse.reference.flow.coupling import constants as scale_constants

__all__ = ["MaskedLayer", "autoregressive_inverse", "masked_linear"]

_ACTIVATIONS = {name: code for code, name in enumerate(reference.ACTIVATIONS)}
_MAX_BINS = 256  # of the kernels; beyond it the reference serves


class _Masked(Operator):
    """An operator without a kernel on CUDA, where the reference serves."""

    def _on_cuda(self, name: str) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            raise NotImplementedError(
                f"torch.ops.genfuse.{name} has no CUDA kernel; genfuse.ops.{self.name} takes CUDA tensors, by the "
                "reference"
            )

        return kernel

    def enter_masked(self, function: Callable[..., Any], subject: str) -> None:
        """Enter the public function into the registry of backends."""
        name = function.__name__
        backends.register_op(name, function, subject)
        backends.register(backends.Kernel(name, "native", ("cpu",), objection=native_objection))
        backends.register(backends.Kernel(name, "reference", (), note="serves CUDA, which has no kernel of its own"))


def _fake_masked_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_inverse(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[:1], dtype=wide_dtype(u))


_MASKED_LINEAR = _Masked(
    name="masked_linear",
    arguments=("x", "weight", "bias", "in_degrees", "out_degrees", "strict"),
    tensors=5,
    differentiable=3,
    outputs=1,
    reference=reference.masked_linear,
    fake=_fake_masked_linear,
    lowers=True,
)
_INVERSE = _Masked(
    name="autoregressive_inverse",
    arguments=("u", "parameters", "additions", "degrees", "program", "constants"),
    tensors=4,
    differentiable=3,
    outputs=2,
    saved=(0,),
    reference=reference.autoregressive_inverse,
    fake=_fake_inverse,
)


def _autocast_is_on(subject: object) -> bool:
    return isinstance(subject, Tensor) and not subject.is_meta and torch.is_autocast_enabled(subject.device.type)


def _check_degrees(op: str, name: str, degrees: object, count: int, what: str, like: Tensor) -> Tensor:
    if not isinstance(degrees, Tensor):
        raise TypeError(f"{op}: {name} must be an int64 Tensor, got {type(degrees).__name__}")
    if degrees.dtype != torch.int64:
        raise ValueError(f"{op}: {name} must be torch.int64, got {degrees.dtype}")
    if degrees.dim() != 1 or degrees.size(0) != count:
        raise RuntimeError(f"{op}: {name} must be [{count}], one for each {what}; got {list(degrees.shape)}")
    if degrees.device != like.device:
        raise RuntimeError(f"{op}: {name} must be on {like.device}, as the first argument is; got {degrees.device}")
    return degrees


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor,
    out_degrees: Tensor,
    *,
    strict: bool = False,
) -> Tensor:
    r"""A linear layer in which an output sees the inputs of no larger degree.

    .. math:: y_{bo} = \sum_{i: d^{\mathrm{in}}_i \le d^{\mathrm{out}}_o} W_{oi} x_{bi} + \beta_o

    Germain et al. 2015 (arXiv 1502.03509), eq. 8 to 11. Equal to ``F.linear(x, mask * weight, bias)``, but that what
    the mask makes 0 is not computed, in either direction: about half of a MADE. Dead weights are never read, so they
    may be NaN, and their gradients are exactly 0. (A NaN in x makes NaN of every output that sees it, and perhaps of
    others of its row.)

    Args:
        x: ``[..., inputs]``, any strides; float32, float64, bfloat16 or float16 (computed in float32). Differentiable,
            as weight and bias are.
        weight: ``[outputs, inputs]``, of x's dtype.
        bias: ``[outputs]`` or None.
        in_degrees: int64 ``[inputs]``.
        out_degrees: int64 ``[outputs]``.
        strict: outputs see inputs of lower degree only, as the last layer of a MADE.

    Returns:
        ``[..., outputs]``, of x's dtype. Under autocast x, weight and bias follow it, as those of a linear layer do.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that does not fit.
        RuntimeError: shapes, dtypes or devices do not fit each other.

    Example:
        >>> degrees = torch.arange(3)
        >>> masked_linear(torch.ones(1, 3), torch.ones(3, 3), None, degrees, degrees, strict=True)
        tensor([[0., 1., 2.]])
    """
    op = "masked_linear"
    if _autocast_is_on(x):
        x, weight, bias = lowered(x.device.type, x, weight, bias)
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight, ("x", x))
    if weight.dim() != 2:
        raise RuntimeError(f"{op}: weight must be [outputs, inputs], got {list(weight.shape)}")
    outputs, inputs = weight.shape
    if x.dim() < 1 or x.size(-1) != inputs:
        raise RuntimeError(f"{op}: x must be [..., {inputs}], the inputs of weight; got {list(x.shape)}")
    if bias is not None:
        check_tensor(op, "bias", bias, ("x", x))
        if bias.dim() != 1 or bias.size(0) != outputs:
            raise RuntimeError(f"{op}: bias must be [{outputs}], the outputs of weight; got {list(bias.shape)}")
    _check_degrees(op, "in_degrees", in_degrees, inputs, "input", x)
    _check_degrees(op, "out_degrees", out_degrees, outputs, "output", x)
    if not isinstance(strict, bool):
        raise TypeError(f"{op}: strict must be a bool, got {type(strict).__name__}")
    return _MASKED_LINEAR.run(op, x, (x, weight, bias, in_degrees, out_degrees, strict))[0]


def _choice(op: str, name: str, value: object, among: Sequence[str]) -> int:
    if value not in among:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, among))}, got {value!r}")
    return among.index(str(value))


def _column_degrees(op: str, degrees: object, columns: int) -> list[int]:
    if degrees is None:
        return list(range(1, columns + 1))
    if isinstance(degrees, Tensor):
        if degrees.is_floating_point():
            raise TypeError(f"{op}: degrees must be whole numbers, got {degrees.dtype}")
        degrees = degrees.tolist()
    if not isinstance(degrees, Sequence) or not all(
        isinstance(one, int) and not isinstance(one, bool) for one in degrees
    ):
        raise TypeError(f"{op}: degrees must be a sequence of ints, a Tensor of them or None, got {degrees!r}")
    if len(degrees) != columns:
        raise RuntimeError(f"{op}: degrees must be {columns}, one for each column of u; got {len(degrees)}")
    return list(degrees)


def _pack(op: str, u: Tensor, layers: Any, units: int) -> tuple[Tensor, Tensor | None, Tensor, list[int]]:
    """Check the layers; all weights and biases, all additions, all degrees, each in one tensor; the layers' program."""
    if not isinstance(layers, Sequence) or not all(isinstance(layer, MaskedLayer) for layer in layers):
        raise TypeError(f"{op}: layers must be a sequence of MaskedLayer, got {type(layers).__name__}")
    if len(layers) == 0:
        raise ValueError(f"{op}: layers must hold at least one layer")
    batch, columns = u.shape
    sizes = [columns]
    parameters: list[Tensor] = []
    additions: list[Tensor] = []
    degrees: list[Tensor] = []
    program: list[int] = []
    for index, layer in enumerate(layers):
        name, last = f"layers[{index}]", index == len(layers) - 1
        source = index - 1 if layer.source is None else layer.source
        residual = -1 if layer.residual is None else layer.residual
        for field, value, least in (
            ("source", source, -1),
            ("residual", residual, -1 if layer.residual is None else 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{op}: {name}.{field} must be an int or None, got {type(value).__name__}")
            if not least <= value < index:
                raise ValueError(f"{op}: {name}.{field} must be a layer before it, at least {least}; got {value}")
        weight = layer.weight
        check_tensor(op, f"{name}.weight", weight, ("u", u))
        if weight.dim() != 2 or weight.size(1) != sizes[source + 1]:
            wants = f"[units, {sizes[source + 1]}]"
            raise RuntimeError(f"{op}: {name}.weight must be {wants}, got {list(weight.shape)}")
        own = weight.size(0)
        if last and own != units:
            raise RuntimeError(
                f"{op}: {name}.weight must be [{units}, inputs]: the last layer gives the {units // max(columns, 1)} "
                f"parameters of each of {columns} columns; got {list(weight.shape)}"
            )
        if residual >= 0 and sizes[residual + 1] != own:
            raise RuntimeError(
                f"{op}: {name} has {own} units, its residual layers[{residual}] has {sizes[residual + 1]}"
            )
        if layer.activation not in _ACTIVATIONS:
            _choice(op, f"{name}.activation", layer.activation, tuple(_ACTIVATIONS))
        parameters.append(weight.reshape(-1))
        if layer.bias is not None:
            check_tensor(op, f"{name}.bias", layer.bias, ("u", u))
            if layer.bias.dim() != 1 or layer.bias.size(0) != own:
                raise RuntimeError(f"{op}: {name}.bias must be [{own}], got {list(layer.bias.shape)}")
            parameters.append(layer.bias)
        if layer.add is not None:
            check_tensor(op, f"{name}.add", layer.add, ("u", u))
            if layer.add.dim() != 2 or layer.add.size(0) != batch or layer.add.size(1) != own:
                raise RuntimeError(f"{op}: {name}.add must be {[batch, own]}, got {list(layer.add.shape)}")
            additions.append(layer.add)
        if last:
            if layer.degrees is not None:
                raise ValueError(f"{op}: {name}.degrees must be None: the last layer's follow from the columns'")
        else:
            degrees.append(_check_degrees(op, f"{name}.degrees", layer.degrees, own, "unit", u))
        has = (int(layer.bias is not None), int(layer.add is not None))
        program += [own, source, _ACTIVATIONS[layer.activation], *has, residual]
        sizes.append(own)
    for index, layer in enumerate(layers):
        if layer.residual is not None:
            _check_residual(op, index, layer, layers)
    added = None if not additions else additions[0] if len(additions) == 1 else torch.cat(additions, 1)
    all_degrees = torch.cat(degrees) if degrees else torch.empty(0, dtype=torch.int64, device=u.device)
    return torch.cat(parameters), added, all_degrees, program


def _check_residual(op: str, index: int, layer: MaskedLayer, layers: Sequence[MaskedLayer]) -> None:
    below = layers[layer.residual].degrees if layer.residual is not None else None
    if below is None or layer.degrees is None or below is layer.degrees:
        return
    if can_look_at(below) and can_look_at(layer.degrees) and bool((below > layer.degrees).any()):
        raise ValueError(
            f"{op}: layers[{index}] has units of lower degree than the units of its residual, "
            f"layers[{layer.residual}], that are added to them"
        )


def autoregressive_inverse(
    u: Tensor,
    layers: Sequence[MaskedLayer],
    *,
    degrees: Sequence[int] | Tensor | None = None,
    transform: str = "affine",
    scale: str = "exp",
    layout: str = "shift_scale",
    interleaved: bool = True,
    offset: float | None = None,
    eps: float | None = None,
    clamp: float | tuple[float, float] | None = None,
    num_bins: int = 8,
    tail_bound: float = 3.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    normalizer: str = "softmax",
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""x with f(x) = u, for a flow f whose columns are transformed by parameters that a network makes of those before.

    .. math:: u_i = \tau(x_i; \theta_i(x_{<i})), \qquad x_i = \tau^{-1}(u_i; \theta_i(x_{<i}))

    Papamakarios et al. 2017 (arXiv 1705.07057), eq. 4, solved for x. Libraries run the network once for each column;
    here every unit is computed once, as soon as the columns that it sees are known, so the whole costs one masked
    forward pass. So does backward, in the opposite order; it keeps the inputs and x alone.

    The network is a list of `MaskedLayer`, which covers MADE with residual or feed-forward blocks (nflows, normflows),
    zuko's MaskedMLP and pyro's AutoRegressiveNN with its skip connection (a layer of x, without strict masks but with
    degrees lower by 1, as the residual of the last). Every column and unit has a degree; a unit sees what has no larger
    one, and the parameters of a column of degree d are units of degree d - 1. Columns of one degree are found at once
    and do not see each other. Units that no column sees are never computed, and their gradients are 0.

    Errors grow through the columns, as they do in any inverse of an autoregressive flow.

    Args:
        u: ``[B, D]``, any strides; float32, float64, bfloat16 or float16 (computed in float32). Differentiable, as all
            weights, biases and additions are; they are of u's dtype.
        layers: at least one; the last has D P units, the parameters.
        degrees: of the columns, any whole numbers; default 1 to D. (Under ``torch.compile`` a sequence of ints.)
        transform: "affine", u = x s + t (P = 2); "additive", u = x + t (P = 1); "rational_quadratic", the spline of
            `rational_quadratic_spline` with linear tails (P = 3 K - 1: widths, heights, derivatives).
        scale: how s comes from its parameter: "exp", "sigmoid", "inverse_sigmoid", "softplus", "tanh", "atan",
            "sigmoid_clamp", "softclip" or "clip", as for `affine_coupling`.
        layout: "shift_scale" or "scale_shift": which of a column's two parameters comes first.
        interleaved: a column's parameters lie together in the last layer; else the first ones of all columns, then the
            second ones, and so on (pyro's).
        offset: of a sigmoid, as for `affine_coupling`; default 2.
        eps: least scale of "sigmoid" (default 0) and "softplus" (default 1e-3).
        clamp: of the scales that have one.
        num_bins: K of the spline.
        tail_bound: the spline's interval is [-tail_bound, tail_bound]; it is the identity outside.
        min_bin_width: smallest part of the interval that a bin takes.
        min_bin_height: likewise for heights.
        min_derivative: smallest slope at a knot.
        normalizer: "softmax", "identity" or "zuko".
        logit_scale: multiplies the logits of widths and heights.

    Returns:
        ``(x, log_abs_det)``: x ``[B, D]`` of u's dtype; log_abs_det ``[B]``, :math:`\ln |\det \partial x / \partial
        u|`, float32, or float64 for float64. Second derivatives differentiate the reference, with a pass of the
        network for each column.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a value that is none of those it may have, dtypes that do not fit.
        RuntimeError: shapes, dtypes or devices do not fit each other.

    Example:
        >>> columns = torch.arange(1, 4)
        >>> layers = [
        ...     MaskedLayer(torch.randn(8, 3), torch.randn(8), degrees=torch.arange(8) % 2 + 1),
        ...     MaskedLayer(torch.randn(6, 8), activation="relu"),
        ... ]
        >>> x, log_abs_det = autoregressive_inverse(torch.randn(5, 3), layers)
        >>> x.shape, log_abs_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    op = "autoregressive_inverse"
    if _autocast_is_on(u):
        (u,) = under_autocast(u, u)
        layers = [_widened(u, layer) for layer in layers]
    check_tensor(op, "u", u)
    if u.dim() != 2:
        raise RuntimeError(f"{op}: u must be [B, D], got {list(u.shape)}")
    columns = u.size(1)
    code = _choice(op, "transform", transform, reference.TRANSFORMS)
    scale_first = _choice(op, "layout", layout, ("shift_scale", "scale_shift"))
    if not isinstance(interleaved, bool):
        raise TypeError(f"{op}: interleaved must be a bool, got {type(interleaved).__name__}")
    kind, each, numbers = 0, 1, (0.0, 0.0, 0.0, 1.0)
    if transform == "affine":
        kind, each = _choice(op, "scale", scale, reference.SCALES), 2
        numbers = scale_constants(scale, offset, eps, clamp)
    elif transform == "rational_quadratic":
        kind = _choice(op, "normalizer", normalizer, reference.NORMALIZERS)
        each = _check_spline(op, num_bins, tail_bound, min_bin_width, min_bin_height, min_derivative, logit_scale)
    parameters, additions, unit_degrees, fields = _pack(op, u, layers, columns * each)
    of_columns = _column_degrees(op, degrees, columns)
    program = (code, kind, each, scale_first, int(interleaved), *of_columns, *fields)
    constants = tuple(map(float, (*numbers, tail_bound, min_bin_width, min_bin_height, min_derivative, logit_scale)))
    arguments = (u, parameters, additions, unit_degrees, program, constants)
    if transform == "rational_quadratic" and num_bins > _MAX_BINS:
        x, log_abs_det = _INVERSE.run_reference(arguments)
    else:
        x, log_abs_det = _INVERSE.run(op, u, arguments)
    return x, log_abs_det


def _widened(u: Tensor, layer: Any) -> Any:
    if not isinstance(layer, MaskedLayer):
        return layer  # which is refused with a message of its own
    weight, bias, add = under_autocast(u, layer.weight, layer.bias, layer.add)
    return MaskedLayer(weight, bias, layer.degrees, layer.source, layer.activation, add, layer.residual)


def _check_spline(
    op: str,
    num_bins: object,
    tail_bound: object,
    min_bin_width: object,
    min_bin_height: object,
    min_derivative: object,
    logit_scale: object,
) -> int:
    """Raise what is wrong with a spline's options; how many parameters it has."""
    if isinstance(num_bins, bool) or not isinstance(num_bins, int):
        raise TypeError(f"{op}: num_bins must be an int, got {type(num_bins).__name__}")
    if num_bins < 1:
        raise ValueError(f"{op}: num_bins must be at least 1, got {num_bins}")
    check_number(op, "tail_bound", tail_bound, above=0.0)
    check_number(op, "min_derivative", min_derivative, least=0.0)
    check_number(op, "logit_scale", logit_scale)
    for name, value in (("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height)):
        if check_number(op, name, value, least=0.0) * num_bins > 1.0:
            raise ValueError(f"{op}: {name} must be at most 1 / num_bins = {1.0 / num_bins:g}, got {value}")
    return 3 * num_bins - 1


_MASKED_LINEAR.enter_masked(masked_linear, "x")
_INVERSE.enter_masked(autoregressive_inverse, "u")
if on_cpu:
    _MASKED_LINEAR.register()
    _INVERSE.register()
