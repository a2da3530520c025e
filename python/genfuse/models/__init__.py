"""Whole models: `log_prob`, `loss` and sampling, built from `genfuse.nn` and `genfuse.ops`."""

from __future__ import annotations

from .flow import IAF, MAF, FlowModel, Glow, NeuralSplineFlow, RealNVP
from .hierarchical_vae import HierarchicalVAE
from .language_model import LSTMLanguageModel
from .pixelcnn import GatedPixelCNN, PixelCNN
from .pixelcnn_plus_plus import PixelCNNPlusPlus
from .pixelsnail import PixelSNAIL
from .vae import VAE
from .vqvae import VQVAE

__all__ = [
    "IAF",
    "MAF",
    "VAE",
    "VQVAE",
    "FlowModel",
    "GatedPixelCNN",
    "Glow",
    "HierarchicalVAE",
    "LSTMLanguageModel",
    "NeuralSplineFlow",
    "PixelCNN",
    "PixelCNNPlusPlus",
    "PixelSNAIL",
    "RealNVP",
]
