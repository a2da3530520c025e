"""A matrix over the channels of images: the 1x1 convolution of Glow, forward and backward without reordering memory.

The definition is in `genfuse.reference.flow.linear`; one registered operator with the rules of `operator.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genfuse.ops.operator import Operator, on_cpu, under_autocast
from genfuse.ops.sampling import check_tensor
from genfuse.reference.flow import linear as reference

__all__ = ["conv1x1"]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]))


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    return (reference.conv1x1(x, weight, bias),)


_CONV1X1 = Operator(
    name="conv1x1",
    arguments=("x", "weight", "bias"),
    tensors=3,
    differentiable=3,
    outputs=1,
    reference=_reference,
    fake=_fake,
    module="flow",
)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A matrix over the channels, the same at every position: :math:`y_{bns} = \sum_c W_{nc} x_{bcs} + b_n`.

    The invertible 1x1 convolution of Kingma and Dhariwal 2018 (arXiv 1807.03039), section 3.2, is this with a square
    matrix; with actnorm before it, the matrix is W diag(e^s) and the bias W b, which is how `genfuse.nn.GlowStep`
    passes over the activations once for both. ``torch.nn.functional.conv2d`` with a kernel of 1 x 1 is the same
    function; a log-determinant, the number of positions times ln \|det W\|, is the caller's. Under autocast it stays in
    float32: an inverse in half precision would not be one.

    Args:
        x: ``[B, C, *S]``, any strides; float32, float64, bfloat16 or float16 (computed in float32); differentiable.
        weight: ``[N, C]`` of x's dtype; differentiable.
        bias: ``[N]`` of x's dtype; differentiable.

    Returns:
        ``[B, N, *S]`` of x's dtype. The weight's gradient is summed in an order that no number of threads changes.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating.
        RuntimeError: shapes do not fit, dtypes or devices differ.

    Example:
        >>> import torch
        >>> conv1x1(torch.ones(1, 2, 1, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).flatten()
        tensor([3., 7.])
    """
    op = "conv1x1"
    x, weight, bias = under_autocast(x, x, weight, bias)
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight, ("x", x))
    if x.dim() < 2:
        raise RuntimeError(f"{op}: x must be [B, C, ...], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise RuntimeError(
            f"{op}: weight must be [N, {x.shape[1]}], a column for each channel of x; got {list(weight.shape)}"
        )
    if bias is not None:
        check_tensor(op, "bias", bias, ("x", x))
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise RuntimeError(f"{op}: bias must be [{weight.shape[0]}], the rows of weight; got {list(bias.shape)}")
    arguments: tuple[Any, ...] = (x, weight, bias)
    (y,) = _CONV1X1.run(op, x, arguments)
    return y


_CONV1X1.enter(conv1x1, "x", triton=False)
if on_cpu:
    _CONV1X1.register()
