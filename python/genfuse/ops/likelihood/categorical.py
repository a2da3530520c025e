"""The negative log-likelihood of levels under a softmax, where the logits lie.

The definition is in `genfuse.reference.likelihood.categorical`; the function is one registered operator with the rules
of `operator.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfuse.ops.likelihood.mixture import check_reduction, reduced
from genfuse.ops.operator import Operator, can_look_at, on_cpu, under_autocast
from genfuse.ops.sampling import check_tensor, wide_dtype
from genfuse.reference.likelihood import categorical as reference

__all__ = ["categorical_nll"]

_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _fake(logits: Tensor, target: Tensor, dim: int, by_position: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide, shape = wide_dtype(logits), target.shape
    nll = logits.new_empty(shape if by_position else shape[:1], dtype=wide)
    return nll, logits.new_empty(shape, dtype=wide), logits.new_empty(shape, dtype=wide)


_NLL = Operator(
    name="categorical_nll",
    arguments=("logits", "target", "dim", "by_position"),
    tensors=2,
    differentiable=1,
    outputs=3,
    constants=(1, 2),
    saved=(1, 2),
    reference=reference.categorical_nll,
    fake=_fake,
    fake_gradient=lambda index, tensor: torch.empty_like(tensor),
    module="likelihood",
)


def categorical_nll(logits: Tensor, target: Tensor, *, dim: int = 1, reduction: str = "none") -> Tensor:
    r"""Negative log-likelihood of levels under the softmax of logits: :math:`\ln \sum_l e^{z_l} - z_x`.

    The likelihood of PixelCNN's 256 levels (van den Oord, Kalchbrenner and Kavukcuoglu 2016, arXiv 1601.06759, "Pixels
    as Discrete Variables"); ``torch.nn.functional.cross_entropy`` with the levels in any dimension, summed over each
    image. The logits are read where they lie, in whatever view and memory format, once; backward keeps the inputs and
    two numbers for each position. What all logits of a position have in common costs no precision.

    Args:
        logits: ``[B, ..., L, ...]``, with the levels in dimension ``dim``, say ``[B, L, H, W]``, or ``[B, C, L, H, W]``
            with ``dim=2``; any strides; float32, float64, bfloat16 or float16 (computed in float32).
        target: levels in [0, L), of logits' shape without ``dim``: int64, int32, int16 or uint8.
        dim: the dimension of the levels; not 0, that of the batch.
        reduction: "none": nats of each image, ``[B]``; "pixel": of each position, of target's shape; "sum" and "mean"
            of the former over the batch; "bits_per_dim": the mean, divided by ln 2 and by an image's number of
            positions.

    Returns:
        float32, or float64 for float64.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an unknown reduction; a dtype that logits or target may not have.
        IndexError: a level outside [0, L); dim is no dimension of logits. (Levels are looked at on the CPU alone.)
        RuntimeError: shapes do not fit; devices differ; no levels.

    Example:
        >>> pixels = torch.zeros(2, 4, 4, dtype=torch.uint8)
        >>> categorical_nll(torch.zeros(2, 256, 4, 4), pixels, reduction="bits_per_dim")
        tensor(8.)
    """
    op = "categorical_nll"
    (logits,) = under_autocast(logits, logits)
    check_tensor(op, "logits", logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a Tensor, got {type(target).__name__}")
    if target.dtype not in _INTEGERS:
        raise ValueError(f"{op}: target must be int64, int32, int16 or uint8, got {target.dtype}")
    if target.device != logits.device:
        raise RuntimeError(f"{op}: target must be on {logits.device}, as logits is; got {target.device}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    dims = logits.dim()
    if not -dims <= dim < dims:
        raise IndexError(f"{op}: dim must be a dimension of logits, in [{-dims}, {dims - 1}], got {dim}")
    dim %= dims
    if dim == 0:
        raise RuntimeError(f"{op}: dim must not be 0, the dimension of the batch, of logits {list(logits.shape)}")
    shape = (*logits.shape[:dim], *logits.shape[dim + 1 :])
    if target.dim() != dims - 1 or tuple(target.shape) != shape:
        raise RuntimeError(
            f"{op}: target must have the shape of logits without dimension {dim}, {list(shape)}; got "
            f"{list(target.shape)}"
        )
    levels = logits.shape[dim]
    if levels == 0:
        raise RuntimeError(f"{op}: logits must have at least one level in dimension {dim}, got {list(logits.shape)}")
    check_reduction(op, reduction)
    if can_look_at(target) and target.numel() > 0 and not (target.dtype == torch.uint8 and levels >= 256):
        low, high = (int(value) for value in torch.aminmax(target))
        if low < 0 or high >= levels:
            wrong = low if low < 0 else high
            raise IndexError(f"{op}: target must hold levels in [0, {levels}), got {wrong}")
    nll, _, _ = _NLL.run(op, logits, (logits, target, dim, reduction == "pixel"))
    return nll if reduction in ("none", "pixel") else reduced(nll, reduction, math.prod(target.shape[1:]))


_NLL.enter(categorical_nll, "logits")
if on_cpu:
    _NLL.register()
