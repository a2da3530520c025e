"""Gated activations and the concatenated ELU: each one pass over its tensors, forward and backward.

The definitions are in `genfuse.reference.masked_conv.gate`; each function is one registered operator with the rules of
`operator.py`. Backward recomputes from the inputs. Both keep x's memory format (contiguous or channels last), and under
autocast x's dtype, as torch's own elementwise functions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genfuse.ops.operator import Operator, Tensors, float64_objection, on_cpu
from genfuse.ops.sampling import check_tensor, same_shape
from genfuse.reference.masked_conv import gate as reference

__all__ = ["concat_elu", "gated_activation"]

_ACTIVATIONS = ("tanh", "linear")  # the operator's codes are places in this


def memory_format(x: Tensor) -> torch.memory_format:
    """That of the results: channels last if that is how the numbers of an image or a volume lie, else contiguous."""
    if x.dim() not in (4, 5) or x.is_contiguous() or x.stride(1) != 1:
        return torch.contiguous_format
    step = 1
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[d] > 1:
            if x.stride(d) < step:
                return torch.contiguous_format
            step = x.stride(d) * x.shape[d]
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _new(x: Tensor, dim: int, channels: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape but for its channels, in x's memory format."""
    shape = (*x.shape[:dim], channels, *x.shape[dim + 1 :])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(x))


def _gated_reference(
    x: Tensor, bias: Tensor | None, conditional: Tensor | None, residual: Tensor | None, dim: int, activation: int
) -> tuple[Tensor]:
    found = reference.gated_activation(
        x, conditional, dim, bias=bias, residual=residual, activation=_ACTIVATIONS[activation]
    )
    return (found,)


def _gated_fake(x: Tensor, bias: Any, conditional: Any, residual: Tensor | None, dim: int, activation: int) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return _new(x, dim, x.shape[dim] // 2, dtype)


class _Gate(Operator):
    """The residual's gradient is y's, and that of a conditional of x's shape is x's: neither is computed twice, nor is
    the residual kept."""

    def save_for_backward(self, ctx: Any, inputs: Sequence[Any], outputs: Tensors) -> None:
        super().save_for_backward(ctx, (*inputs[:3], None, *inputs[4:]), outputs)
        ctx.residual_dtype = None if inputs[3] is None else inputs[3].dtype

    def backward(
        self, ctx: Any, grads: Sequence[Tensor | None], needed: Sequence[bool] | None = None
    ) -> tuple[Tensor | None, ...]:
        x, _, conditional, _ = ctx.saved_tensors
        by_x, by_bias, by_conditional, by_residual = ctx.needs_input_grad[:4]
        same = by_conditional and by_x and same_shape(conditional.shape, x.shape) and conditional.dtype == x.dtype
        found: list[Tensor | None] = [None] * len(self.arguments)
        if by_x or by_bias or by_conditional:
            found = list(super().backward(ctx, grads, (by_x, by_bias, by_conditional and not same, False)))
        if same:
            found[2] = found[0]
        if by_residual and grads[0] is not None:
            found[3] = grads[0].to(ctx.residual_dtype)
        return tuple(found)

    def _fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, x, bias, conditional, residual, dim, _, needs = arguments
        found = []
        for index, tensor in enumerate((x, bias, conditional, residual)):
            if tensor is None or not needs >> index & 1:
                found.append(x.new_empty(0))
            elif index == 1 or (index == 2 and not same_shape(tensor.shape, x.shape)):
                found.append(tensor.new_empty(tensor.shape))
            else:
                found.append(_new(x, dim, tensor.shape[dim], tensor.dtype))
        return tuple(found)


_GATED = _Gate(
    name="gated_activation",
    arguments=("x", "bias", "conditional", "residual", "dim", "activation"),
    tensors=4,
    differentiable=4,
    outputs=1,
    reference=_gated_reference,
    fake=_gated_fake,
    module="masked_conv",
    keeps=True,
)


class _ConcatElu(Operator):
    def _fake_backward(self, *arguments: Any) -> Tensor:
        _, x, dim, needs = arguments
        return _new(x, dim, x.shape[dim], x.dtype) if needs & 1 else x.new_empty(0)


_CONCAT_ELU = _ConcatElu(
    name="concat_elu",
    arguments=("x", "dim"),
    tensors=1,
    differentiable=1,
    outputs=1,
    reference=lambda x, dim: (reference.concat_elu(x, dim),),
    fake=lambda x, dim: _new(x, dim, 2 * x.shape[dim], x.dtype),
    module="masked_conv",
    keeps=True,
)


def _check_dim(op: str, x: Tensor, dim: object) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"{op}: dim must be in [{-x.dim()}, {x.dim() - 1}] for x of {list(x.shape)}, got {dim}")
    return dim % x.dim()


def _check_beside(op: str, name: str, value: object, x: Tensor) -> Tensor:
    tensor = check_tensor(op, name, value)
    if tensor.device != x.device:
        raise RuntimeError(f"{op}: {name} must be on {x.device}, as x is; got {tensor.device}")
    return tensor


def _check_conditional(op: str, value: object, x: Tensor, dim: int) -> Tensor:
    """Of x's shape, or with one position for all dimensions but the batch and `dim`."""
    conditional = _check_beside(op, "conditional", value, x)
    sizes = list(conditional.shape)
    if same_shape(conditional.shape, x.shape):
        return conditional
    if len(sizes) == 2 and x.dim() > 2 and dim > 0 and sizes[0] in (1, x.shape[0]) and sizes[1] == x.shape[dim]:
        sizes = [sizes[0], *(sizes[1] if d == dim else 1 for d in range(1, x.dim()))]
    sizes = [1] * (x.dim() - len(sizes)) + sizes
    if len(sizes) != x.dim() or any(n not in (1, m) for n, m in zip(sizes, x.shape, strict=True)):
        raise RuntimeError(
            f"{op}: conditional must broadcast to x, {list(x.shape)}, or be [batch, channels]; got "
            f"{list(conditional.shape)}"
        )
    short = all(n == 1 for d, n in enumerate(sizes) if d not in (0, dim))
    return conditional.reshape(sizes).expand([m if d in (0, dim) or not short else 1 for d, m in enumerate(x.shape)])


def gated_activation(
    x: Tensor,
    conditional: Tensor | None = None,
    dim: int = 1,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "tanh",
) -> Tensor:
    r"""The gate of autoregressive networks, with the bias, the conditioning and the residual around it, in one pass.

    .. math:: y = \tanh(a) \odot \sigma(b) \; (+ \; \mathrm{residual}), \qquad
        [a; b] = x + \mathrm{bias} + \mathrm{conditional}

    where a and b are the first and the second half of the channels. Gated PixelCNN's, van den Oord et al. 2016 (arXiv
    1606.05328), eqs. 2 and 4; WaveNet's (arXiv 1609.03499), eqs. 2 and 3. With ``activation="linear"`` a sigmoid(b),
    the gated linear unit of Dauphin et al. 2017 (arXiv 1612.08083), eq. 1, and PixelCNN++'s (arXiv 1701.05517).

    Args:
        x: ``[B, 2C, *S]``, any strides; float32, float64, bfloat16 or float16; differentiable, as are the others.
        conditional: what depends on a class or a latent: ``[B, 2C]`` (or ``[1, 2C]``), the same at all positions; or
            whatever broadcasts to x, up to x's shape. Where both could be meant, ``[B, 2C]`` is.
        dim: the dimension of the channels.
        bias: ``[2C]``, of the convolution that made x, say.
        residual: ``[B, C, *S]`` (or what broadcasts to it), added to the result.
        activation: "tanh" or "linear", of a.

    Returns:
        y ``[B, C, *S]`` in x's memory format (contiguous or channels last), of x's dtype or, with a residual, of what
        both promote to. It is computed in float32, or in float64 if an argument is float64. The dtypes of the arguments
        may differ. Gradients of bias and conditional are summed in float32 or wider, in an order that no number of
        threads changes. Only the inputs are kept for backward, and of the residual nothing. NaN in gives NaN out, in
        its own element. Autocast changes nothing: half types stay as they are.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating, or an unknown activation.
        IndexError: a dim that x does not have.
        RuntimeError: an odd number of channels; shapes or devices do not fit.

    Example:
        >>> x = torch.tensor([[1.0, -1.0, 0.0, 2.0]])  # a = (1, -1), b = (0, 2)
        >>> gated_activation(x)
        tensor([[ 0.3808, -0.6708]])
        >>> gated_activation(x, activation="linear", residual=torch.ones(1, 2))
        tensor([[1.5000, 0.1192]])
    """
    op = "gated_activation"
    check_tensor(op, "x", x)
    dim = _check_dim(op, x, dim)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation must be 'tanh' or 'linear', got {activation!r}")
    channels = x.shape[dim]
    if channels % 2 != 0:
        raise RuntimeError(f"{op}: x must have an even number of channels in dimension {dim}, got {list(x.shape)}")
    if bias is not None:
        _check_beside(op, "bias", bias, x)
        if bias.dim() != 1 or bias.shape[0] != channels:
            raise RuntimeError(f"{op}: bias must be [{channels}], one for each channel of x, got {list(bias.shape)}")
    if conditional is not None:
        conditional = _check_conditional(op, conditional, x, dim)
    if residual is not None:
        _check_beside(op, "residual", residual, x)
        shape = torch.Size((*x.shape[:dim], channels // 2, *x.shape[dim + 1 :]))
        if not same_shape(residual.shape, shape):
            try:
                residual = residual.expand(shape)
            except RuntimeError:
                raise RuntimeError(
                    f"{op}: residual must be {list(shape)}, the shape of the result, or broadcast to it; got "
                    f"{list(residual.shape)}"
                ) from None
    (y,) = _GATED.run(op, x, (x, bias, conditional, residual, dim, _ACTIVATIONS.index(activation)))
    return y


def concat_elu(x: Tensor, dim: int = 1) -> Tensor:
    r"""elu of x and of -x, side by side along the channels: twice as many channels, in one pass.

    .. math:: y = [\mathrm{elu}(x); \mathrm{elu}(-x)], \qquad \mathrm{elu}(v) = \max(v, 0) + \min(e^v - 1, 0)

    The nonlinearity of PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517), after the concatenated ReLU of Shang et al.
    2016 (arXiv 1603.05201).

    Args:
        x: ``[B, C, *S]``, any strides; float32, float64, bfloat16 or float16 (computed in float32); differentiable.
        dim: the dimension of the channels.

    Returns:
        y ``[B, 2C, *S]`` of x's dtype and in x's memory format (contiguous or channels last). x alone is kept for
        backward. NaN in gives NaN out. Autocast changes nothing: half types stay as they are.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating.
        IndexError: a dim that x does not have.

    Example:
        >>> concat_elu(torch.tensor([[1.0, -2.0]]))
        tensor([[ 1.0000, -0.8647, -0.6321,  2.0000]])
    """
    op = "concat_elu"
    check_tensor(op, "x", x)
    (y,) = _CONCAT_ELU.run(op, x, (x, _check_dim(op, x, dim)))
    return y


for _one, _function in ((_GATED, gated_activation), (_CONCAT_ELU, concat_elu)):
    _one.enter(_function, "x", triton=float64_objection)
    if on_cpu:
        _one.register()
