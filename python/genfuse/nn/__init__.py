"""Drop-in layers: the names, arguments and state_dict keys of `torch.nn`, served by `genfuse.ops`."""

from __future__ import annotations

from .recurrent import GRU, LSTM, GRUCell, LayerNormLSTM, LSTMCell

__all__ = ["GRU", "LSTM", "GRUCell", "LSTMCell", "LayerNormLSTM"]
