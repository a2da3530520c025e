"""Layers over `genfuse.ops`: drop-in ones with the names, arguments and state_dict keys of `torch.nn`, and samplers."""

from __future__ import annotations

from .recurrent import GRU, LSTM, GRUCell, LayerNormLSTM, LSTMCell
from .sampling import GaussianReparameterization, GumbelSoftmax, VectorQuantizer

__all__ = [
    "GRU",
    "LSTM",
    "GRUCell",
    "GaussianReparameterization",
    "GumbelSoftmax",
    "LSTMCell",
    "LayerNormLSTM",
    "VectorQuantizer",
]
