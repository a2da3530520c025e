"""The sampling rule once more, by NumPy, and the log-probabilities of drawn tokens to a derived tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor


def distribution(
    logits: np.ndarray[Any, Any], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray[Any, Any]:
    """The tempered and filtered probabilities of one row of logits, by loops and sets."""
    scaled = logits / temperature
    kept = set(range(len(scaled)))
    if top_k is not None and top_k < len(scaled):
        threshold = sorted(scaled, reverse=True)[top_k - 1]
        kept = {v for v in kept if scaled[v] >= threshold}

    def softmax(tokens: set[int]) -> np.ndarray[Any, Any]:
        largest = max(scaled[v] for v in tokens)
        weights = np.array([np.exp(scaled[v] - largest) if v in tokens else 0.0 for v in range(len(scaled))])
        return weights / weights.sum()

    if top_p is not None and top_p < 1.0:
        p = softmax(kept)
        nucleus: set[int] = set()
        total = 0.0
        for v in sorted(kept, key=lambda v: (-p[v], v)):
            nucleus.add(v)
            total += p[v]
            if total >= top_p:
                break
        kept = nucleus
    return softmax(kept)


def distributions(logits: Tensor, filters: dict[str, Any]) -> Tensor:
    """`distribution` of every row of float64 logits: ``[..., V]``."""
    rows = [distribution(row, **filters) for row in logits.flatten(0, -2).numpy()]
    return torch.from_numpy(np.array(rows)).view(logits.shape)


def assert_log_probs(
    actual: Tensor,
    tokens: Tensor,
    logits: Callable[[Callable[[Tensor], Tensor]], Tensor],
    filters: dict[str, Any],
    which: Tensor | None = None,
) -> None:
    """Assert that log-probabilities of tokens are about as near to the exact ones as those of plain PyTorch in float32.

    Args:
        actual: what to test, of the shape of `tokens`.
        tokens: the tokens that were drawn.
        logits: takes a function to apply to every floating input, and returns each token's logits, ``[..., V]``.
        filters: temperature, top_k, top_p.
        which: the tokens to look at; all of them by default.
    """
    exact = logits(Tensor.double)
    filtered = distributions(exact, filters) == 0.0  # what the exact logits filter out: a nudge must not break a tie

    def log_probs(logits: Tensor) -> Tensor:
        scaled = (logits / filters.get("temperature", 1.0)).masked_fill(filtered, -torch.inf)
        found = scaled.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return found if which is None else found[which]

    (eager,) = eager_runs(lambda nudge: [log_probs(logits(lambda tensor: nudge(tensor.float())))])
    assert_as_accurate(actual if which is None else actual[which], eager, log_probs(exact), "log_probs")
