"""Monotone splines with the normalisation of their parameters and the logarithm of their slope, in one pass each way.

The definitions are in `genfuse.reference.flow.spline`; the four kinds are one registered operator,
`torch.ops.genfuse.spline`, with the rules of `operator.py`. Its backward pass recomputes from the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genfuse import backends
from genfuse.ops.operator import Operator, can_look_at, native_objection, on_cpu, under_autocast
from genfuse.ops.sampling import check_tensor
from genfuse.reference.flow import spline as reference

__all__ = [
    "InputOutsideDomain",
    "cubic_spline",
    "linear_spline",
    "piecewise_rational_quadratic_transform",
    "quadratic_spline",
    "rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]

_MAX_BINS = 256  # of the kernels; beyond it the reference serves
_MAX_TRITON_BINS = 32  # what a thread's registers hold


class InputOutsideDomain(ValueError):  # noqa: N818  the name that users of nflows know
    """An element lies outside of the interval of a spline without tails."""


def _reference(
    x: Tensor,
    params: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    kind: int,
    normalizer: int,
    ends: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return reference.spline(
        x,
        params,
        heights,
        derivatives,
        reference.KINDS[kind],
        reference.NORMALIZERS[normalizer],
        reference.ENDS[ends],
        **options,
    )


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch_dims = rest[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty(x.shape[:batch_dims], dtype=x.dtype if batch_dims == x.dim() else wide)
    return x.new_empty(x.shape), sums


def _fake_gradient(index: int, tensor: Tensor) -> Tensor:
    # Parameters' gradients lie in memory as the parameters do.
    return torch.empty_like(tensor) if index > 0 else tensor.new_empty(tensor.shape)


_SPLINE = Operator(
    name="spline",
    arguments=(
        "x",
        "params",
        "heights",
        "derivatives",
        "kind",
        "normalizer",
        "ends",
        "tails",
        "inverse",
        "left",
        "right",
        "bottom",
        "top",
        "min_width",
        "min_height",
        "min_derivative",
        "logit_scale",
        "bins",
        "batch_dims",
    ),
    tensors=4,
    differentiable=4,
    outputs=2,
    reference=_reference,
    fake=_fake,
    fake_gradient=_fake_gradient,
    module="flow",
)

_KIND = {name: index for index, name in enumerate(reference.KINDS)}
_NORMALIZER = {name: index for index, name in enumerate(reference.NORMALIZERS)}
_ONE, _WRAP, _GIVEN = range(3)


def _rational_bins(op: str, packed: int, tails: str | None) -> tuple[int, int]:
    """Bins and ends of a packed rational-quadratic spline."""
    wanted = {"linear": -1, "circular": 0, None: 1}[tails]
    bins = (packed - wanted) // 3  # torch.compile knows no divmod of sizes
    if bins * 3 + wanted != packed or bins < 1:
        form = {-1: "3 K - 1", 0: "3 K", 1: "3 K + 1"}[wanted]
        raise RuntimeError(f"{op}: widths must hold {form} packed parameters for tails={tails!r}, got {packed}")
    return bins, {-1: _ONE, 0: _WRAP, 1: _GIVEN}[wanted]


def _interval(
    op: str, tails: str | None, tail_bound: float, sides: tuple[float | None, ...]
) -> tuple[float, float, float, float]:
    known = ("linear", "circular") if op == "rational_quadratic_spline" else ("linear",)
    if tails is not None and tails not in known:
        raise ValueError(f"{op}: tails must be {', '.join(map(repr, known))} or None, got {tails!r}")
    if all(side is None for side in sides):
        if not tail_bound > 0:
            raise ValueError(f"{op}: tail_bound must be above 0, got {tail_bound}")
        return -tail_bound, tail_bound, -tail_bound, tail_bound
    if tails is not None:
        raise ValueError(f"{op}: left, right, bottom and top go with tails=None; with tails give tail_bound")
    left, right, bottom, top = (
        default if side is None else side
        for side, default in zip(sides, (-tail_bound, tail_bound, -tail_bound, tail_bound), strict=True)
    )
    if not left < right:
        raise ValueError(f"{op}: left must be below right, got {left} and {right}")
    if not bottom < top:
        raise ValueError(f"{op}: bottom must be below top, got {bottom} and {top}")
    return left, right, bottom, top


def _spread(op: str, x: Tensor, named: list[tuple[str, Tensor | None]]) -> list[Tensor | None]:
    """x and the parameters, expanded to each other but for the last dimension of parameters."""
    shape = tuple(x.shape)
    if all(t is None or t.shape[:-1] == shape for _, t in named):
        return [x, *(t for _, t in named)]
    for name, t in named:
        if t is None:
            continue
        try:
            shape = tuple(torch.broadcast_shapes(shape, t.shape[:-1]))  # type: ignore[no-untyped-call]
        except RuntimeError:
            raise RuntimeError(
                f"{op}: {name} must broadcast with x in all but its last dimension, got {list(t.shape)} for x of "
                f"{list(x.shape)}"
            ) from None
    return [x.expand(shape), *(None if t is None else t.expand((*shape, t.shape[-1])) for _, t in named)]


def _dims(op: str, reduce_dims: int | Sequence[int] | None, dim: int) -> tuple[int, tuple[int, ...]]:
    """batch_dims for the operator, and the dimensions that are summed after it."""
    if reduce_dims is None:
        return dim, ()
    if not isinstance(reduce_dims, (int, Sequence)):
        raise TypeError(f"{op}: reduce_dims must be integers or None, got {type(reduce_dims).__name__}")
    wanted = (reduce_dims,) if isinstance(reduce_dims, int) else tuple(reduce_dims)
    for one in wanted:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{op}: reduce_dims must hold integers, got {type(one).__name__}")
        if not -dim <= one < dim:
            raise IndexError(f"{op}: reduce_dims must be within [{-dim}, {dim - 1}], the dimensions of x; got {one}")
    places = sorted({one % dim for one in wanted})
    if len(places) != len(wanted):
        raise RuntimeError(f"{op}: reduce_dims must name each dimension once, got {list(wanted)}")
    if places == list(range(dim - len(places), dim)):
        return dim - len(places), ()
    return dim, tuple(places)


def _run(
    op: str,
    kind: str,
    x: Tensor,
    params: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    names: tuple[str, str, str],
    normalizer: str,
    ends: int,
    tails: str | None,
    inverse: bool,
    interval: tuple[float, float, float, float],
    least: tuple[float, float, float],
    logit_scale: float,
    bins: int,
    reduce_dims: int | Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    for value, what in ((least[0], "width"), (least[1], "height")):
        if value * bins > 1.0:
            raise ValueError(f"{op}: min_bin_{what} must be at most 1 / {bins}, for {bins} bins; got {value}")
        if not value >= 0.0:
            raise ValueError(f"{op}: min_bin_{what} must be at least 0, got {value}")
    if not 0.0 <= least[2] < 1.0:
        raise ValueError(f"{op}: min_derivative must be in [0, 1), got {least[2]}")
    spread = _spread(op, x, list(zip(names, (params, heights, derivatives), strict=True)))
    x, params = spread[0], spread[1]  # type: ignore[assignment]  # given, so there
    if tails is None and can_look_at(x) and x.numel() > 0:
        low, high = (interval[2], interval[3]) if inverse else (interval[0], interval[1])
        found = torch.aminmax(x.detach())
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # in which the limits are rounded, too
        if bool(found.min.to(wide) < low) or bool(found.max.to(wide) > high):
            raise InputOutsideDomain(
                f"{op}: x must lie in [{low}, {high}] without tails, got values from {float(found.min):g} to "
                f"{float(found.max):g}"
            )
    batch_dims, later = _dims(op, reduce_dims, x.dim())
    arguments = (
        x,
        params,
        spread[2],
        spread[3],
        _KIND[kind],
        _NORMALIZER[normalizer],
        ends,
        tails is not None,
        inverse,
        *interval,
        *least,
        logit_scale,
        bins,
        batch_dims,
    )
    if bins > _MAX_BINS:
        if (forced := backends.forced()) is not None:
            backends.can_run(op, forced, {"x": x, "bins": bins}, raise_error=True)
        y, log_abs_det = _SPLINE.run_reference(arguments)
    else:
        y, log_abs_det = _SPLINE.run(op, x, arguments)
    if later:
        log_abs_det = (log_abs_det if log_abs_det.dtype == torch.float64 else log_abs_det.float()).sum(later)
    return y, log_abs_det


def _checked(op: str, x: object, **parameters: object) -> list[Any]:
    x, *rest = under_autocast(x, x, *parameters.values())
    x = check_tensor(op, "x", x)
    for name, value in zip(parameters, rest, strict=True):
        if value is None and name in ("heights", "derivatives"):
            continue
        tensor = check_tensor(op, name, value, ("x", x))
        if tensor.dim() < 1:
            raise RuntimeError(f"{op}: {name} must have a last dimension of parameters, got a tensor without any")
    return [x, *rest]


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    *,
    inverse: bool = False,
    tails: str | None = "linear",
    tail_bound: float = 3.0,
    left: float | None = None,
    right: float | None = None,
    bottom: float | None = None,
    top: float | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    normalizer: str = "softmax",
    logit_scale: float = 1.0,
    reduce_dims: int | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Monotone rational-quadratic spline of every element, or its inverse, and the logarithm of its slope.

    In the bin :math:`[x_k, x_{k+1}]` of width w and height h, with :math:`s = h / w`, slopes :math:`d_k, d_{k+1}` at
    its ends and :math:`\theta = (x - x_k) / w`,

    .. math:: y = y_k + \frac{h\,(s \theta^2 + d_k \theta (1 - \theta))}
        {s + (d_k + d_{k+1} - 2 s)\, \theta (1 - \theta)}

    Durkan, Bekasov, Murray and Papamakarios 2019 (arXiv 1906.04032), eq. 4 to 8. The parameters are normalised inside:
    with K bins, the width of a bin is :math:`(\mathrm{right} - \mathrm{left})\,(m + (1 - m K)\,\mathrm{softmax}(u)_k)`
    for the smallest part m = ``min_bin_width``, a height likewise, and a slope is ``min_derivative`` plus softplus. One
    pass over the inputs each way; the backward pass recomputes from them and nothing else is kept.

    Args:
        x: any shape and strides; float32, float64, bfloat16 or float16 (computed in float32); differentiable.
        widths: ``[..., K]`` logits, which broadcast with ``x[..., None]``. Or, without heights, all parameters of an
            element packed, widths first, then heights and derivatives: ``[..., 3 K - 1]`` for linear tails,
            ``[..., 3 K]`` for circular ones, ``[..., 3 K + 1]`` for none.
        heights: ``[..., K]`` logits.
        derivatives: ``[..., K - 1]`` of the inner knots, where the slope at both ends is 1 (linear tails);
            ``[..., K]`` where both ends have that of the first (circular tails); ``[..., K + 1]`` of all knots (no
            tails; or with tails, which then meet at an angle).
        inverse: evaluate the inverse, and its slope.
        tails: "linear" or "circular": outside of the interval y is x and the logarithm 0. None: no element may lie
            outside of it.
        tail_bound: the interval is [-tail_bound, tail_bound] on both axes.
        left, right, bottom, top: without tails, the interval on the axis of the forward map's input and output.
        min_bin_width: smallest part of the interval that a bin takes.
        min_bin_height: likewise for heights.
        min_derivative: smallest slope at a knot, in [0, 1).
        normalizer: "softmax" as above; "identity": with a softplus that is 1 - min_derivative at 0, so that parameters
            of 0 give the identity; "zuko": softmax of softly clipped logits without a least part, and slopes that are
            the exponential of a soft clip (zuko's ``MonotonicRQSTransform``); "none": widths and heights are
            probabilities and derivatives positive already (Pyro's), the least parts are still given.
        logit_scale: a factor of the logits of widths and heights, as the 1 / sqrt(hidden features) of nflows.
        reduce_dims: dimensions of x over which the logarithm is summed, in float32 or wider; None: an element each.

    Returns:
        (y, log_abs_det): y of the shape that x and the parameters broadcast to and of x's dtype; log_abs_det likewise,
        or without the dimensions summed over, and then at least float32. NaN gives NaN.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating; tails, normalizer, an interval or a least size that cannot be.
        InputOutsideDomain: (a ValueError) an element outside of the interval without tails. Where values cannot be
            looked at (on a GPU, under torch.compile) such an element gives NaN instead.
        RuntimeError: shapes do not fit, dtypes or devices differ.

    Example:
        >>> x = torch.tensor([-4.0, 0.5, 1.0])
        >>> y, log_abs_det = rational_quadratic_spline(x, torch.zeros(3, 3 * 8 - 1), normalizer="identity")
        >>> y  # parameters of 0 are the identity
        tensor([-4.0000,  0.5000,  1.0000])
    """
    op = "rational_quadratic_spline"
    if normalizer not in _NORMALIZER:
        raise ValueError(f"{op}: normalizer must be one of {', '.join(_NORMALIZER)}, got {normalizer!r}")
    interval = _interval(op, tails, tail_bound, (left, right, bottom, top))
    x, widths, heights, derivatives = _checked(op, x, widths=widths, heights=heights, derivatives=derivatives)
    if heights is None:
        if derivatives is not None:
            raise TypeError(f"{op}: heights must be given where derivatives are; packed parameters hold both")
        bins, ends = _rational_bins(op, widths.shape[-1], tails)
    else:
        if derivatives is None:
            raise TypeError(f"{op}: derivatives must be given where heights are")
        bins = widths.shape[-1]
        if bins < 1 or heights.shape[-1] != bins:
            raise RuntimeError(f"{op}: heights must have widths' number of bins, got {heights.shape[-1]} and {bins}")
        count = derivatives.shape[-1]
        fits = {"linear": {bins - 1: _ONE}, "circular": {bins: _WRAP}, None: {}}[tails]
        ends = {bins + 1: _GIVEN, **fits}.get(count, -1)
        if ends < 0:
            wanted = " or ".join(str(n) for n in sorted((bins + 1, *fits)))
            raise RuntimeError(f"{op}: derivatives must hold {wanted} for {bins} bins and tails={tails!r}, got {count}")
    least = (min_bin_width, min_bin_height, min_derivative)
    if normalizer == "zuko":
        least = (0.0, 0.0, 0.0)
    return _run(
        op,
        "rational_quadratic",
        x,
        widths,
        heights,
        derivatives,
        ("widths", "heights", "derivatives"),
        normalizer,
        ends,
        tails,
        inverse,
        interval,
        least,
        logit_scale,
        bins,
        reduce_dims,
    )


def linear_spline(
    x: Tensor,
    pdf: Tensor,
    *,
    inverse: bool = False,
    tails: str | None = "linear",
    tail_bound: float = 3.0,
    left: float | None = None,
    right: float | None = None,
    bottom: float | None = None,
    top: float | None = None,
    logit_scale: float = 1.0,
    reduce_dims: int | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Piecewise linear distribution function of K bins of one width, or its inverse, and the logarithm of its slope.

    Müller et al. 2018 (arXiv 1808.03856), section 4.1: the masses of the bins are the softmax of ``pdf``. nflows'
    ``linear_spline``.

    Args:
        x: any shape and strides; float32, float64, bfloat16 or float16 (computed in float32); differentiable.
        pdf: ``[..., K]`` logits, which broadcast with ``x[..., None]``; differentiable.
        inverse: evaluate the inverse, and its slope.
        tails: "linear": outside of the interval y is x and the logarithm 0; None: no element may lie outside.
        tail_bound: the interval is [-tail_bound, tail_bound] on both axes.
        left, right, bottom, top: without tails, the interval on the axis of the forward map's input and output.
        logit_scale: a factor of the logits.
        reduce_dims: dimensions of x over which the logarithm is summed; None: an element each.

    Returns:
        (y, log_abs_det), as `rational_quadratic_spline`.

    Raises:
        TypeError, ValueError, InputOutsideDomain, RuntimeError: as `rational_quadratic_spline`.

    Example:
        >>> y, log_abs_det = linear_spline(torch.tensor([0.5]), torch.zeros(4))
        >>> y, log_abs_det
        (tensor([0.5000]), tensor([0.]))
    """
    op = "linear_spline"
    interval = _interval(op, tails, tail_bound, (left, right, bottom, top))
    x, pdf = _checked(op, x, pdf=pdf)
    bins = pdf.shape[-1]
    if bins < 1:
        raise RuntimeError(f"{op}: pdf must have at least one bin, got {list(pdf.shape)}")
    return _run(
        op,
        "linear",
        x,
        pdf,
        None,
        None,
        ("pdf", "", ""),
        "softmax",
        _GIVEN,
        tails,
        inverse,
        interval,
        (0.0, 0.0, 0.0),
        logit_scale,
        bins,
        reduce_dims,
    )


def quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    *,
    inverse: bool = False,
    tails: str | None = "linear",
    tail_bound: float = 3.0,
    left: float | None = None,
    right: float | None = None,
    bottom: float | None = None,
    top: float | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    logit_scale: float = 1.0,
    reduce_dims: int | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Piecewise quadratic distribution function, of linear density in each bin, or its inverse; and the log-slope.

    Müller et al. 2018 (arXiv 1808.03856), section 4.2, with the normalisation of nflows' ``quadratic_spline``:
    densities at the knots are softplus + 1e-3, divided by their area.

    Args:
        x: any shape and strides; float32, float64, bfloat16 or float16 (computed in float32); differentiable.
        widths: ``[..., K]`` logits, which broadcast with ``x[..., None]``. Or, without heights, both packed, widths
            first: ``[..., 2 K - 1]`` for linear tails, ``[..., 2 K + 1]`` for none.
        heights: ``[..., K + 1]`` unnormalised densities at all knots; or ``[..., K - 1]`` at the inner ones, where
            those at the ends follow.
        inverse: evaluate the inverse, and its slope.
        tails: "linear": outside of the interval y is x and the logarithm 0; None: no element may lie outside.
        tail_bound: the interval is [-tail_bound, tail_bound] on both axes.
        left, right, bottom, top: without tails, the interval on the axis of the forward map's input and output.
        min_bin_width: smallest part of the interval that a bin takes.
        min_bin_height: smallest density.
        logit_scale: a factor of widths and heights.
        reduce_dims: dimensions of x over which the logarithm is summed; None: an element each.

    Returns:
        (y, log_abs_det), as `rational_quadratic_spline`.

    Raises:
        TypeError, ValueError, InputOutsideDomain, RuntimeError: as `rational_quadratic_spline`.

    Example:
        >>> y, _ = quadratic_spline(torch.tensor([0.0]), torch.zeros(4), torch.zeros(3))
        >>> x, _ = quadratic_spline(y, torch.zeros(4), torch.zeros(3), inverse=True)
        >>> bool(x.abs() < 1e-6)
        True
    """
    op = "quadratic_spline"
    interval = _interval(op, tails, tail_bound, (left, right, bottom, top))
    x, widths, heights = _checked(op, x, widths=widths, heights=heights)
    if heights is None:
        fixed = tails is not None
        bins = (widths.shape[-1] + (1 if fixed else -1)) // 2
        if widths.shape[-1] % 2 == 0 or bins < 1:
            form = "2 K - 1" if fixed else "2 K + 1"
            raise RuntimeError(
                f"{op}: widths must hold {form} packed parameters for tails={tails!r}, got {widths.shape[-1]}"
            )
    else:
        bins = widths.shape[-1]
        fixed = heights.shape[-1] == bins - 1
        if bins < 1 or (not fixed and heights.shape[-1] != bins + 1):
            raise RuntimeError(
                f"{op}: heights must hold {bins - 1} or {bins + 1} for {bins} bins, got {heights.shape[-1]}"
            )
    if fixed and bins < 2:
        raise RuntimeError(f"{op}: widths must have at least 2 bins where the ends' densities follow, got {bins}")
    return _run(
        op,
        "quadratic",
        x,
        widths,
        heights,
        None,
        ("widths", "heights", ""),
        "softmax",
        _ONE if fixed else _GIVEN,
        tails,
        inverse,
        interval,
        (min_bin_width, min_bin_height, 0.0),
        logit_scale,
        bins,
        reduce_dims,
    )


def cubic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    *,
    inverse: bool = False,
    tails: str | None = "linear",
    tail_bound: float = 3.0,
    left: float | None = None,
    right: float | None = None,
    bottom: float | None = None,
    top: float | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    logit_scale: float = 1.0,
    reduce_dims: int | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Monotone cubic spline of every element, or its inverse, and the logarithm of its slope.

    Durkan et al. 2019 (arXiv 1906.02145), section 3, after Steffen 1990; nflows' ``cubic_spline``. The inverse is found
    by bisection and Newton's method within the bin, which no vanishing coefficient upsets.

    Args:
        x: any shape and strides; float32, float64, bfloat16 or float16 (computed in float32); differentiable.
        widths: ``[..., K]`` logits, which broadcast with ``x[..., None]``. Or, without heights, all parameters packed,
            ``[..., 2 K + 2]``: widths, heights, and the two derivatives.
        heights: ``[..., K]`` logits.
        derivatives: ``[..., 2]``: of the left and right end, whose slopes are 3 sigmoid(.) times their bin's.
        inverse: evaluate the inverse, and its slope.
        tails: "linear": outside of the interval y is x and the logarithm 0; None: no element may lie outside.
        tail_bound: the interval is [-tail_bound, tail_bound] on both axes.
        left, right, bottom, top: without tails, the interval on the axis of the forward map's input and output.
        min_bin_width: smallest part of the interval that a bin takes.
        min_bin_height: likewise for heights.
        logit_scale: a factor of the logits of widths and heights.
        reduce_dims: dimensions of x over which the logarithm is summed; None: an element each.

    Returns:
        (y, log_abs_det), as `rational_quadratic_spline`.

    Raises:
        TypeError, ValueError, InputOutsideDomain, RuntimeError: as `rational_quadratic_spline`.

    Example:
        >>> y, _ = cubic_spline(torch.tensor([0.3]), torch.zeros(2 * 4 + 2))
        >>> x, _ = cubic_spline(y, torch.zeros(2 * 4 + 2), inverse=True)
        >>> bool((x - 0.3).abs() < 1e-6)
        True
    """
    op = "cubic_spline"
    interval = _interval(op, tails, tail_bound, (left, right, bottom, top))
    x, widths, heights, derivatives = _checked(op, x, widths=widths, heights=heights, derivatives=derivatives)
    if (heights is None) != (derivatives is None):
        raise TypeError(f"{op}: heights and derivatives must both be given, or neither")
    if heights is None:
        bins = (widths.shape[-1] - 2) // 2
        if widths.shape[-1] % 2 != 0 or bins < 1:
            raise RuntimeError(f"{op}: widths must hold 2 K + 2 packed parameters, got {widths.shape[-1]}")
    else:
        bins = widths.shape[-1]
        if bins < 1 or heights.shape[-1] != bins:
            raise RuntimeError(f"{op}: heights must have widths' number of bins, got {heights.shape[-1]} and {bins}")
        if derivatives.shape[-1] != 2:
            raise RuntimeError(f"{op}: derivatives must hold 2, of the left and right end; got {derivatives.shape[-1]}")
    return _run(
        op,
        "cubic",
        x,
        widths,
        heights,
        derivatives,
        ("widths", "heights", "derivatives"),
        "softmax",
        _GIVEN,
        tails,
        inverse,
        interval,
        (min_bin_width, min_bin_height, 0.0),
        logit_scale,
        bins,
        reduce_dims,
    )


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
    enable_identity_init: bool = False,
) -> tuple[Tensor, Tensor]:
    """nflows' function of that name, with its signature, defaults and results; also normflows' (circular tails).

    Args:
        inputs: any shape.
        unnormalized_widths: ``[*inputs.shape, K]``.
        unnormalized_heights: ``[*inputs.shape, K]``.
        unnormalized_derivatives: ``[*inputs.shape, K - 1]``; ``[*inputs.shape, K]`` for circular tails.
        inverse: evaluate the inverse.
        tails: "linear" or "circular".
        tail_bound: the interval is [-tail_bound, tail_bound].
        min_bin_width: smallest part of the interval that a bin takes.
        min_bin_height: likewise for heights.
        min_derivative: smallest slope at a knot.
        enable_identity_init: parameters of 0 give the identity (of nflows after 0.14).

    Returns:
        (outputs, logabsdet), both of inputs' shape and dtype.

    Raises:
        ValueError: min_bin_width or min_bin_height are too large for K.
        RuntimeError: other tails than those; shapes do not fit.

    Example:
        >>> w = torch.zeros(1, 8)
        >>> unconstrained_rational_quadratic_spline(torch.tensor([2.0]), w, w, torch.zeros(1, 7))
        (tensor([2.]), tensor([0.]))
    """
    if tails not in ("linear", "circular"):
        raise RuntimeError(f"{tails} tails are not implemented: tails must be 'linear' or 'circular'")
    return rational_quadratic_spline(
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse=inverse,
        tails=tails,
        tail_bound=tail_bound,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
        normalizer="identity" if enable_identity_init else "softmax",
    )


def piecewise_rational_quadratic_transform(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str | None = None,
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """The function of that name of VITS and the speech models after it, with its signature, defaults and results.

    Args:
        inputs: any shape, say ``[B, 1, T]``.
        unnormalized_widths: ``[*inputs.shape, K]``.
        unnormalized_heights: ``[*inputs.shape, K]``.
        unnormalized_derivatives: ``[*inputs.shape, K - 1]`` with linear tails, ``[*inputs.shape, K + 1]`` without.
        inverse: evaluate the inverse.
        tails: "linear", or None for the unit interval.
        tail_bound: with tails the interval is [-tail_bound, tail_bound].
        min_bin_width: smallest part of the interval that a bin takes.
        min_bin_height: likewise for heights.
        min_derivative: smallest slope at a knot.

    Returns:
        (outputs, logabsdet), both of inputs' shape and dtype.

    Raises:
        ValueError: min_bin_width or min_bin_height are too large for K.
        InputOutsideDomain: (a ValueError) an input outside of [0, 1] without tails.
        RuntimeError: other tails than those; shapes do not fit.

    Example:
        >>> w = torch.zeros(1, 8)
        >>> y, _ = piecewise_rational_quadratic_transform(torch.tensor([0.5]), w, w, torch.zeros(1, 9))
        >>> y
        tensor([0.5000])
    """
    if tails not in ("linear", None):
        raise RuntimeError(f"{tails} tails are not implemented: tails must be 'linear' or None")
    low, high = (None, None) if tails else (0.0, 1.0)
    return rational_quadratic_spline(
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse=inverse,
        tails=tails,
        tail_bound=tail_bound,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
        left=low,
        right=high,
        bottom=low,
        top=high,
    )


def _bins_of(arguments: backends.Arguments) -> int:
    """The bins of a call, by the operator's arguments or a public function's."""
    if "bins" in arguments:
        return int(arguments["bins"])
    for name in ("pdf", "unnormalized_widths"):
        if name in arguments:
            return int(arguments[name].shape[-1])
    count = int(arguments["widths"].shape[-1])
    if arguments["heights"] is not None:
        return count
    if "normalizer" in arguments:  # rational quadratic: 3 K, or one more or less
        return (count + 1) // 3
    if "derivatives" in arguments:  # cubic
        return (count - 2) // 2
    return count // 2 + (arguments["tails"] is not None)


def _objection(arguments: backends.Arguments) -> str | None:
    """Why the native library cannot serve a call."""
    if (bins := _bins_of(arguments)) > _MAX_BINS:
        return f"{bins} bins; it takes at most {_MAX_BINS}"
    return native_objection(arguments)


def _triton_objection(arguments: backends.Arguments) -> str | None:
    """Why the Triton kernel cannot serve a call."""
    if (bins := _bins_of(arguments)) > _MAX_TRITON_BINS:
        return f"{bins} bins; it takes at most {_MAX_TRITON_BINS}"
    return None


for _function in (rational_quadratic_spline, linear_spline, quadratic_spline, cubic_spline):
    _triton = _triton_objection if _function is rational_quadratic_spline else False
    _SPLINE.enter(_function, "x", triton=_triton, native=_objection)
_SPLINE.enter(unconstrained_rational_quadratic_spline, "inputs", triton=_triton_objection, native=_objection)
_SPLINE.enter(piecewise_rational_quadratic_transform, "inputs", triton=_triton_objection, native=_objection)
if on_cpu:
    _SPLINE.register()
