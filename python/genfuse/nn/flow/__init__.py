"""Invertible layers: what normalizing flows are made of.

Everywhere `forward` goes from data to noise and `inverse` from noise to data, and both return the result and
``log_abs_det [B]`` of the direction taken.
"""

from __future__ import annotations

from .autoregressive import MADE, MaskedAffineAutoregressive, MaskedLinear, MaskedSplineAutoregressive
from .base import Flow, Inverse, Transform
from .conditioners import MLP, ConvNet, ResidualNet
from .coupling import AdditiveCoupling, AffineCoupling, GlowStep, SplineCoupling, checkerboard_mask
from .image import DequantizeLogit, MultiScale, Split, Squeeze
from .linear import ActNorm, InvertibleConv2d, LULinear, Permutation

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "ConvNet",
    "DequantizeLogit",
    "Flow",
    "GlowStep",
    "Inverse",
    "InvertibleConv2d",
    "LULinear",
    "MaskedAffineAutoregressive",
    "MaskedLinear",
    "MaskedSplineAutoregressive",
    "MultiScale",
    "Permutation",
    "ResidualNet",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "Transform",
    "checkerboard_mask",
]
