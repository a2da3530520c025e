"""Actnorm, and dequantisation followed by a logit: elementwise transforms of flows with their log-determinants.

The definitions are in `genfuse.reference.flow.pointwise`; each function is one registered operator with the rules of
`operator.py`. Backward recomputes from the inputs, and draws noise again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfuse.ops.operator import Operator, on_cpu, under_autocast
from genfuse.ops.sampling import check_noise, check_number, check_rng, check_tensor
from genfuse.reference.flow import pointwise as reference

from .coupling import _ORDERS, _check_flag, _one_of, _wide, check_rows

__all__ = ["actnorm", "dequantize_logit", "logit_quantize"]


def _actnorm_reference(
    x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool, add_first: bool
) -> tuple[Tensor, Tensor]:
    return reference.actnorm(x, log_scale, bias, inverse=inverse, order=_ORDERS[add_first])


_ACTNORM = Operator(
    name="actnorm",
    arguments=("x", "log_scale", "bias", "inverse", "add_first"),
    tensors=3,
    differentiable=3,
    outputs=2,
    reference=_actnorm_reference,
    fake=lambda x, log_scale, bias, *rest: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:1], dtype=_wide(x, log_scale, bias)),
    ),
    module="flow",
)


def _noisy_dtype(x: Tensor, u: Tensor | None) -> torch.dtype:
    """That of y."""
    if x.is_floating_point():
        return x.dtype
    return torch.float32 if u is None else u.dtype


def _dequantize_fake(x: Tensor, u: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=_noisy_dtype(x, u))
    return y, x.new_empty(x.shape[:1], dtype=_wide(x, u))


_DEQUANTIZE = Operator(
    name="dequantize_logit",
    arguments=("x", "u", "rng", "levels", "alpha"),
    tensors=3,
    differentiable=2,
    outputs=2,
    reference=reference.dequantize_logit,
    fake=_dequantize_fake,
    fake_gradient=lambda index, tensor: tensor.new_empty(
        tensor.shape, dtype=tensor.dtype if tensor.is_floating_point() else torch.float32
    ),
    module="flow",
)

_QUANTIZE = Operator(
    name="logit_quantize",
    arguments=("y", "levels", "alpha"),
    tensors=1,
    differentiable=0,
    outputs=1,
    reference=lambda y, levels, alpha: (reference.logit_quantize(y, levels=levels, alpha=alpha),),
    fake=lambda y, levels, alpha: y.new_empty(y.shape),
    module="flow",
)


def actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False, order: str = "multiply_add"
) -> tuple[Tensor, Tensor]:
    r"""Scale and shift each channel, y = x s + b with s = e^log_scale; and ln \|det dy/dx\|.

    Kingma and Dhariwal 2018 (arXiv 1807.03039), section 3.1. nflows' ActNorm has x s + b as here, with ``log_scale``
    and ``shift``; rosinality's Glow s (x + b), which is ``order="add_multiply"``. It has no initialisation from data:
    that is `genfuse.nn.ActNorm`'s.

    Args:
        x: ``[B, C, *S]``, any strides; float32, float64, bfloat16 or float16; differentiable, as are the others.
        log_scale: ``[C]``, of x's dtype or another.
        bias: ``[C]``, likewise.
        inverse: the inverse transform: (x - b) / s, or x / s - b.
        order: "multiply_add", x s + b, or "add_multiply", (x + b) s.

    Returns:
        ``(y, log_abs_det)``: y of x's shape and dtype; log_abs_det ``[B]``, each the number of positions times the sum
        of log_scale (or minus that, of the inverse); float32, or float64 if an argument is float64, which is what is
        computed in. Gradients of log_scale and bias are summed in an order that no number of threads changes.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating; an unknown order.
        RuntimeError: shapes or devices do not fit.

    Example:
        >>> actnorm(torch.ones(1, 2), torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.0]))
        (tensor([[2.0000, 1.6487]]), tensor([0.5000]))
    """
    op = "actnorm"
    add_first = _one_of(op, "order", order, _ORDERS) == 1
    _check_flag(op, "inverse", inverse)
    x, log_scale, bias = under_autocast(x, x, log_scale, bias)
    check_rows(op, x)
    for name, value in (("log_scale", log_scale), ("bias", bias)):
        check_tensor(op, name, value)
        if value.device != x.device:
            raise RuntimeError(f"{op}: {name} must be on {x.device}, as x is; got {value.device}")
        if value.dim() != 1 or value.shape[0] != x.shape[1]:
            raise RuntimeError(f"{op}: {name} must be [{x.shape[1]}], one for each channel, got {list(value.shape)}")
    y, log_abs_det = _ACTNORM.run(op, x, (x, log_scale, bias, inverse, add_first))
    return y, log_abs_det


def _check_levels(op: str, levels: object, alpha: object) -> tuple[int, float]:
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"{op}: levels must be an int, got {type(levels).__name__}")
    if not 2 <= levels <= 2**24:
        raise ValueError(f"{op}: levels must be in [2, 2^24], got {levels}")
    number = check_number(op, "alpha", alpha, least=0.0)
    if number >= 0.5:
        raise ValueError(f"{op}: alpha must be below 0.5, got {alpha}")
    return levels, number


def _is_bytes(op: str, x: object) -> bool:
    if isinstance(x, Tensor) and x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"{op}: x must be uint8 or of a floating dtype, got {x.dtype}")
    return isinstance(x, Tensor) and x.dtype == torch.uint8


def dequantize_logit(
    x: Tensor,
    *,
    levels: int = 256,
    alpha: float = 0.05,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Whole numbers to the real line: uniform noise within each level, then a logit; and ln \|det dy/dx\| of each row.

    .. math:: y = \mathrm{logit}(p), \quad p = \alpha + (1 - 2 \alpha) \frac{x + u}{\mathrm{levels}},
        \qquad \ln \left|\frac{\partial y}{\partial x}\right| = \sum \ln \frac{1 - 2 \alpha}{\mathrm{levels}} - \ln p
        - \ln(1 - p)

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803), section 4.1, whose alpha is here 2 alpha; the noise after
    Uria, Murray and Larochelle 2013 (arXiv 1306.0186), with which a flow's density bounds the probability of the level.

    Args:
        x: ``[B, ...]``, whole numbers in [0, levels); uint8, or float32, float64, bfloat16 or float16 (computed in
            float32; bfloat16 holds whole numbers up to 256), which is differentiable.
        levels: how many values there are, up to 2^24.
        alpha: how far p keeps from 0 and 1, in [0, 0.5). With 0, p may be 0 and y infinite.
        u: noise in [0, 1) of x's shape (and dtype, if that is floating); differentiable. Default: uniforms by address
            (docs/random.md), element e for x's element e, which backward draws again.
        generator: where the random pair comes from if neither u nor rng is given; default torch's of x's device.
        rng: int64 ``[2]`` on x's device, the pair (seed, offset): u is then `philox_uniform` of it, in float32.

    Returns:
        ``(y, log_abs_det)``: y of x's shape and dtype, for uint8 of u's (or float32); log_abs_det ``[B]``, float32 or
        for float64 float64. bits/dim is ``-(log p(y) + log_abs_det) / (n ln 2)`` of n elements a row.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: x is neither uint8 nor floating; levels or alpha out of their range.
        RuntimeError: x has no dimensions; u or rng have another shape, dtype or device than wanted.

    Example:
        >>> x = torch.tensor([[0, 1]], dtype=torch.uint8)
        >>> dequantize_logit(x, levels=2, alpha=0.0, u=torch.full((1, 2), 0.5))
        (tensor([[-1.0986,  1.0986]]), tensor([1.9617]))
    """
    op = "dequantize_logit"
    levels, alpha = _check_levels(op, levels, alpha)
    x, u = under_autocast(x, x, u)
    if _is_bytes(op, x):
        if u is not None:
            check_tensor(op, "u", u)
            if u.device != x.device:
                raise RuntimeError(f"{op}: u must be on {x.device}, as x is; got {u.device}")
            check_noise(op, "u", u, ("x", x.new_empty(x.shape, dtype=u.dtype)))
    else:
        check_tensor(op, "x", x)
        u = check_noise(op, "u", u, ("x", x))
    if x.dim() == 0:
        raise RuntimeError(f"{op}: x must have at least 1 dimension, the batch")
    pair = check_rng(op, x, generator, rng) if u is None else None
    y, log_abs_det = _DEQUANTIZE.run(op, x, (x, u, pair, levels, alpha))
    return y, log_abs_det


def logit_quantize(y: Tensor, *, levels: int = 256, alpha: float = 0.05) -> Tensor:
    """The inverse of `dequantize_logit`: the level that y lies in, floor(levels (sigmoid(y) - alpha) / (1 - 2 alpha)).

    Args:
        y: of any shape; float32, float64, bfloat16 or float16 (computed in float32).
        levels: how many values there are, up to 2^24.
        alpha: as of `dequantize_logit`.

    Returns:
        Whole numbers within [0, levels), of y's shape and dtype (``.to(torch.uint8)`` for an image); NaN where y is
        NaN. It has no gradient. Noise within a few units in the last place of a level's edge may come back as its
        neighbour.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating; levels or alpha out of their range.

    Example:
        >>> logit_quantize(torch.tensor([-9.0, -1.0, 1.0, 9.0]), levels=2)
        tensor([0., 0., 1., 1.])
    """
    op = "logit_quantize"
    levels, alpha = _check_levels(op, levels, alpha)
    (y,) = under_autocast(y, y)
    check_tensor(op, "y", y)
    (x,) = _QUANTIZE.run(op, y, (y.detach(), levels, alpha))
    return x


_ACTNORM.enter(actnorm, "x")
_DEQUANTIZE.enter(dequantize_logit, "x", integers=(torch.uint8,))
_QUANTIZE.enter(logit_quantize, "y")
if on_cpu:
    for _one in (_ACTNORM, _DEQUANTIZE, _QUANTIZE):
        _one.register()
