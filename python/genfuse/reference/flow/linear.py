"""A matrix over the channels of images, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["conv1x1"]


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[b, n, s] = sum_c weight[n, c] x[b, c, s] + bias[n].

    Args:
        x: ``[B, C, *S]``.
        weight: ``[N, C]``.
        bias: ``[N]``.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.einsum("nc,bcs->bns", weight.to(wide), x.to(wide).flatten(2) if x.dim() > 2 else x.to(wide)[..., None])
    if bias is not None:
        y = y + bias.to(wide)[:, None]
    return y.reshape(x.shape[0], weight.shape[0], *x.shape[2:]).to(x.dtype)
