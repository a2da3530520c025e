"""Gated activations and the concatenated ELU, in plain PyTorch.

Everything is computed in float32, or in float64 if an argument is float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["concat_elu", "gated_activation"]


def gated_activation(
    x: Tensor,
    conditional: Tensor | None = None,
    dim: int = 1,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "tanh",
) -> Tensor:
    """y = tanh(a) sigmoid(b), or a sigmoid(b) for "linear", with [a; b] = x + bias + conditional, halves of dimension
    `dim`; plus the residual. van den Oord et al. 2016 (arXiv 1606.05328), eq. 2; "linear" is Dauphin et al. 2017
    (arXiv 1612.08083), eq. 1, as PixelCNN++ has it.

    Args:
        x: ``[B, 2C, *S]`` for ``dim=1``.
        conditional: of x's number of dimensions, and broadcasts to x.
        bias: ``[2C]``.
        residual: ``[B, C, *S]``, or broadcasts to that.

    Returns:
        y ``[B, C, *S]``, of x's dtype, or of what x's and residual's promote to.

    Example:
        >>> gated_activation(torch.tensor([[1.0, 0.0]]))
        tensor([[0.3808]])
    """
    others = [tensor for tensor in (conditional, bias, residual) if tensor is not None]
    wide = torch.float64 if torch.float64 in [tensor.dtype for tensor in (x, *others)] else torch.float32
    h = x.to(wide)
    if bias is not None:
        h = h + bias.to(wide).view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
    if conditional is not None:
        h = h + conditional.to(wide)
    a, b = h.chunk(2, dim)
    y = (torch.tanh(a) if activation == "tanh" else a) * torch.sigmoid(b)
    if residual is None:
        return y.to(x.dtype)
    return (y + residual.to(wide)).to(torch.promote_types(x.dtype, residual.dtype))


def concat_elu(x: Tensor, dim: int = 1) -> Tensor:
    """elu([x; -x]), concatenated along dimension `dim`: Salimans et al. 2017 (arXiv 1701.05517), as their code has it,
    after the concatenated ReLU of Shang et al. 2016 (arXiv 1603.05201).

    Example:
        >>> concat_elu(torch.tensor([[1.0]]))
        tensor([[ 1.0000, -0.6321]])
    """
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return F.elu(torch.cat((wide, -wide), dim)).to(x.dtype)
