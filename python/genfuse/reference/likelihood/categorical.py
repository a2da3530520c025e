"""Negative log-likelihoods of levels under a softmax, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from genfuse.reference.sampling import widen

__all__ = ["categorical_nll"]


def categorical_nll(logits: Tensor, target: Tensor, dim: int, by_position: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ln sum_l e^(logits_l) - logits_target over ``dim``, in nats of each position, or of each image ``[B]``; and that
    logarithm of a sum at each position, as the largest logit and ln sum_l e^(logits_l - largest).

    Example:
        >>> nll, top, log_sum = categorical_nll(torch.zeros(1, 4, 3), torch.tensor([[0, 1, 3]]), 1, True)
        >>> torch.exp(nll)
        tensor([[4., 4., 4.]])
    """
    wide = widen(logits)
    nll = -torch.log_softmax(wide, dim).gather(dim, target.to(torch.int64).unsqueeze(dim)).squeeze(dim)
    top = wide.detach().amax(dim, keepdim=True)
    log_sum = (wide.detach() - top).exp().sum(dim).log()
    return nll if by_position or nll.dim() == 1 else nll.flatten(1).sum(1), top.squeeze(dim), log_sum
