"""The definitions: every op in plain PyTorch, in the notation of its paper, differentiable to any order."""

from __future__ import annotations

from .language_model import LSTMLanguageModel
from .recurrent import gru, gru_generate, linear_cross_entropy, lstm, lstm_generate, sample_token
from .vae import VAE, VQVAE, HierarchicalVAE, VectorQuantizer

__all__ = [
    "VAE",
    "VQVAE",
    "HierarchicalVAE",
    "LSTMLanguageModel",
    "VectorQuantizer",
    "gru",
    "gru_generate",
    "linear_cross_entropy",
    "lstm",
    "lstm_generate",
    "sample_token",
]
