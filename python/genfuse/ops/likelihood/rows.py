"""Negative log-likelihoods, summed over each row in one pass; the gradient is one more, and keeps the inputs alone.

The definitions are in `genfuse.reference.likelihood.rows`; each function is one registered operator with the rules of
`operator.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfuse.ops.operator import Operator, on_cpu, under_autocast
from genfuse.ops.sampling import (
    check_batch_dims,
    check_tensor,
    common_shape,
    rows_shape,
    same_shape,
    scale_of,
    spread,
    wide_dtype,
)
from genfuse.reference.likelihood import rows as reference

__all__ = ["bernoulli_nll", "discretized_gaussian_nll", "gaussian_nll"]


def _fake(first: Tensor, *rest: Any) -> Tensor:
    batch_dims = next(value for value in rest if not isinstance(value, Tensor))
    return first.new_empty(rows_shape(first, batch_dims), dtype=wide_dtype(first))


def _operator(name: str, arguments: tuple[str, ...], tensors: int) -> Operator:
    return Operator(
        name=name,
        arguments=arguments,
        tensors=tensors,
        differentiable=tensors,
        outputs=1,
        reference=getattr(reference, name),
        fake=_fake,
        module="likelihood",
    )


_BERNOULLI = _operator("bernoulli_nll", ("logits", "target", "batch_dims"), 2)
_GAUSSIAN = _operator("gaussian_nll", ("x", "mean", "scale", "batch_dims", "log_std"), 3)
_DISCRETIZED = _operator("discretized_gaussian_nll", ("x", "mean", "scale", "batch_dims", "log_std", "levels"), 3)


def _in_unit(nll: Tensor, unit: str, shape: torch.Size, batch_dims: int) -> Tensor:
    if unit == "nats":
        return nll
    return nll * (1.0 / (math.log(2.0) * max(math.prod(shape[batch_dims:]), 1)))


def _check_unit(op: str, unit: object) -> None:
    if unit not in ("nats", "bits_per_dim"):
        raise ValueError(f"{op}: unit must be 'nats' or 'bits_per_dim', got {unit!r}")


def bernoulli_nll(logits: Tensor, target: Tensor, *, batch_dims: int = 1, unit: str = "nats") -> Tensor:
    r"""Negative log-likelihood of each row under independent Bernoullis, from logits.

    .. math:: -\sum_j x_j \ln p_j + (1 - x_j) \ln(1 - p_j), \quad p = \sigma(\mathrm{logits})

    The reconstruction term of a VAE of binary images (Kingma and Welling 2013, arXiv 1312.6114, appendix C.1);
    ``torch.nn.functional.binary_cross_entropy_with_logits`` summed over each row.

    Args:
        logits: ``[B, ...]`` log-odds, any strides; float32, float64, bfloat16 or float16 (computed in float32).
        target: x, of a shape that broadcasts with logits', bits or probabilities, of logits' dtype; differentiable.
        batch_dims: how many leading dimensions are the batch; the others are summed over.
        unit: "nats", or "bits_per_dim": divided by ln 2 and by the number of summed elements.

    Returns:
        ``[B]``: float32, or float64 for float64.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating, an unknown unit.
        RuntimeError: shapes do not broadcast, dtypes or devices differ, fewer dimensions than ``batch_dims``.

    Example:
        >>> bernoulli_nll(torch.zeros(2, 4), torch.ones(2, 4), unit="bits_per_dim")
        tensor([1., 1.])
    """
    op = "bernoulli_nll"
    _check_unit(op, unit)
    logits, target = under_autocast(logits, logits, target)
    check_tensor(op, "logits", logits)
    check_tensor(op, "target", target, ("logits", logits))
    shape = common_shape(op, ("logits", logits), ("target", target))
    logits, target = spread(op, "logits", logits, shape, "target"), spread(op, "target", target, shape, "logits")
    check_batch_dims(op, batch_dims, "logits", len(shape))
    (nll,) = _BERNOULLI.run(op, logits, (logits, target, batch_dims))
    return _in_unit(nll, unit, shape, batch_dims)


def _gaussian(
    operator: Operator,
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None,
    log_std: Tensor | None,
    batch_dims: int,
    unit: str,
    *options: Any,
) -> Tensor:
    op = operator.name
    _check_unit(op, unit)
    name, scale = scale_of(op, logvar, log_std)
    x, mean, scale = under_autocast(x, x, mean, scale)
    check_tensor(op, "x", x)
    check_tensor(op, "mean", mean, ("x", x))
    scale = check_tensor(op, name, scale, ("x", x))
    shape = common_shape(op, ("x", x), ("mean", mean))
    if not same_shape(scale.shape, shape):
        shape = common_shape(op, ("x and mean", mean.expand(shape)), (name, scale))
    x, mean = spread(op, "x", x, shape, "mean"), spread(op, "mean", mean, shape, "x")
    scale = spread(op, name, scale, shape, "x")
    check_batch_dims(op, batch_dims, "x", len(shape))
    (nll,) = operator.run(op, x, (x, mean, scale, batch_dims, log_std is not None, *options))
    return _in_unit(nll, unit, shape, batch_dims)


def gaussian_nll(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None = None,
    *,
    log_std: Tensor | None = None,
    batch_dims: int = 1,
    unit: str = "nats",
) -> Tensor:
    r"""Negative log-density of each row under independent Gaussians, constant included.

    .. math:: \sum_j \tfrac{1}{2} \ln 2\pi + \ln \sigma_j + \tfrac{1}{2} \left(\frac{x_j - \mu_j}{\sigma_j}\right)^2

    Args:
        x: ``[B, ...]``, any strides; float32, float64, bfloat16 or float16 (computed in float32); differentiable.
        mean: :math:`\mu`, of a shape that broadcasts with x's.
        logvar: :math:`\ln \sigma^2`, likewise. Either this or ``log_std``.
        log_std: :math:`\ln \sigma`.
        batch_dims: how many leading dimensions are the batch; the others are summed over.
        unit: "nats", or "bits_per_dim": divided by ln 2 and by the number of summed elements.

    Returns:
        ``[B]``: float32, or float64 for float64.

    Raises:
        TypeError: an argument is of the wrong type; both or none of logvar and log_std.
        ValueError: a dtype that is not floating, an unknown unit.
        RuntimeError: shapes do not broadcast, dtypes or devices differ, fewer dimensions than ``batch_dims``.

    Example:
        >>> gaussian_nll(torch.zeros(1, 2), torch.zeros(2), torch.zeros(2))
        tensor([1.8379])
    """
    return _gaussian(_GAUSSIAN, x, mean, logvar, log_std, batch_dims, unit)


def discretized_gaussian_nll(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None = None,
    *,
    log_std: Tensor | None = None,
    levels: int = 256,
    batch_dims: int = 1,
    unit: str = "bits_per_dim",
) -> Tensor:
    r"""Negative log-probability of quantised values under independent Gaussians: the mass of the bin around each.

    .. math:: -\sum_j \ln\left(\Phi\left(\frac{x_j + h - \mu_j}{\sigma_j}\right)
        - \Phi\left(\frac{x_j - h - \mu_j}{\sigma_j}\right)\right), \quad h = \frac{1}{\mathrm{levels} - 1}

    Ho, Jain and Abbeel 2020 (arXiv 2006.11239), eq. 13: the bins of the lowest and highest level reach to infinity, so
    that the levels' probabilities sum to 1. Exact in both tails and for narrow bins (their code takes an approximation
    of :math:`\Phi` and cuts logarithms off), with a gradient everywhere.

    Args:
        x: ``[B, ...]``, one of ``levels`` equally spaced values in [-1, 1], say ``pixel / 127.5 - 1``; float32,
            float64, bfloat16 or float16 (computed in float32). (bfloat16 cannot tell 256 levels apart.)
        mean: :math:`\mu`, of a shape that broadcasts with x's.
        logvar: :math:`\ln \sigma^2`, likewise. Either this or ``log_std``.
        log_std: :math:`\ln \sigma`.
        levels: how many values there are, 2 or more.
        batch_dims: how many leading dimensions are the batch; the others are summed over.
        unit: "bits_per_dim", the sum divided by ln 2 and by the number of elements; or "nats".

    Returns:
        ``[B]``: float32, or float64 for float64.

    Raises:
        TypeError: an argument is of the wrong type; both or none of logvar and log_std.
        ValueError: a dtype that is not floating, an unknown unit, fewer than two levels.
        RuntimeError: shapes do not broadcast, dtypes or devices differ, fewer dimensions than ``batch_dims``.

    Example:
        >>> bins = torch.linspace(-1, 1, 4).view(4, 1)
        >>> nll = discretized_gaussian_nll(bins, torch.zeros(1), torch.zeros(1), levels=4, unit="nats")
        >>> torch.exp(-nll).sum()
        tensor(1.0000)
    """
    op = "discretized_gaussian_nll"
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"{op}: levels must be an int, got {type(levels).__name__}")
    if levels < 2:
        raise ValueError(f"{op}: levels must be at least 2, got {levels}")
    return _gaussian(_DISCRETIZED, x, mean, logvar, log_std, batch_dims, unit, levels)


for _one, _function, _subject in (
    (_BERNOULLI, bernoulli_nll, "logits"),
    (_GAUSSIAN, gaussian_nll, "x"),
    (_DISCRETIZED, discretized_gaussian_nll, "x"),
):
    _one.enter(_function, _subject)
    if on_cpu:
        _one.register()
