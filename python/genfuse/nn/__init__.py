"""Layers over `genfuse.ops`: drop-in ones with the names, arguments and state_dict keys of `torch.nn`, samplers, and
the invertible layers of flows."""

from __future__ import annotations

from .flow import (
    MADE,
    MLP,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    ConvNet,
    DequantizeLogit,
    Flow,
    GlowStep,
    Inverse,
    InvertibleConv2d,
    LULinear,
    MaskedAffineAutoregressive,
    MaskedLinear,
    MaskedSplineAutoregressive,
    MultiScale,
    Permutation,
    ResidualNet,
    SplineCoupling,
    Split,
    Squeeze,
    Transform,
    checkerboard_mask,
)
from .masked_conv import MaskedConv2d
from .recurrent import GRU, LSTM, GRUCell, LayerNormLSTM, LSTMCell
from .sampling import GaussianReparameterization, GumbelSoftmax, VectorQuantizer

__all__ = [
    "GRU",
    "LSTM",
    "MADE",
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "ConvNet",
    "DequantizeLogit",
    "Flow",
    "GRUCell",
    "GaussianReparameterization",
    "GlowStep",
    "GumbelSoftmax",
    "Inverse",
    "InvertibleConv2d",
    "LSTMCell",
    "LULinear",
    "LayerNormLSTM",
    "MaskedAffineAutoregressive",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedSplineAutoregressive",
    "MultiScale",
    "Permutation",
    "ResidualNet",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "Transform",
    "VectorQuantizer",
    "checkerboard_mask",
]
