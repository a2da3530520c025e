"""The nonlinearities of autoregressive networks as layers."""

from __future__ import annotations

import torch
from torch import Tensor

from genfuse import ops

__all__ = ["ConcatELU", "GatedActivation"]


def _check_dim(module: str, dim: object) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{module}: dim must be an int, got {type(dim).__name__}")
    return dim


class GatedActivation(torch.nn.Module):
    """tanh(a) sigmoid(b), or a sigmoid(b), of the halves a and b of the channels: see `genfuse.ops.gated_activation`.

    van den Oord et al. 2016 (arXiv 1606.05328), eq. 2. It has no parameters.

    Args:
        activation: "tanh" or "linear", of a.
        dim: the dimension of the channels.

    Raises:
        TypeError: dim is no int.
        ValueError: an unknown activation.

    Example:
        >>> gate = GatedActivation()
        >>> gate(torch.zeros(2, 8, 5, 5), torch.ones(2, 8), residual=torch.zeros(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    def __init__(self, activation: str = "tanh", dim: int = 1) -> None:
        super().__init__()
        if activation not in ("tanh", "linear"):
            raise ValueError(f"GatedActivation: activation must be 'tanh' or 'linear', got {activation!r}")
        self.activation = activation
        self.dim = _check_dim("GatedActivation", dim)

    def forward(
        self,
        x: Tensor,
        conditional: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Of x ``[B, 2C, *S]``: ``[B, C, *S]``. The others are added as `genfuse.ops.gated_activation` says."""
        return ops.gated_activation(x, conditional, self.dim, bias=bias, residual=residual, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dim={self.dim}"


class ConcatELU(torch.nn.Module):
    """elu of x and of -x, side by side: see `genfuse.ops.concat_elu`. It doubles the channels.

    Args:
        dim: the dimension of the channels.

    Raises:
        TypeError: dim is no int.

    Example:
        >>> ConcatELU()(torch.zeros(2, 4, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = _check_dim("ConcatELU", dim)

    def forward(self, x: Tensor) -> Tensor:
        """Of x ``[B, C, *S]``: ``[B, 2C, *S]``."""
        return ops.concat_elu(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
