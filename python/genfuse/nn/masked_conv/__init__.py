"""Layers of autoregressive image models: masked and shifted convolutions, gates."""

from __future__ import annotations

from .conv import MaskedConv2d
from .gate import ConcatELU, GatedActivation
from .pixelcnn import (
    DownRightShiftedConv2d,
    DownRightShiftedConvTranspose2d,
    DownShiftedConv2d,
    DownShiftedConvTranspose2d,
    GatedResNet,
    NetworkInNetwork,
    WeightNormConv2d,
)

__all__ = [
    "ConcatELU",
    "DownRightShiftedConv2d",
    "DownRightShiftedConvTranspose2d",
    "DownShiftedConv2d",
    "DownShiftedConvTranspose2d",
    "GatedActivation",
    "GatedResNet",
    "MaskedConv2d",
    "NetworkInNetwork",
    "WeightNormConv2d",
]
