"""Networks that give a transform its parameters: dense, residual and convolutional.

The context enters by a layer of its own, added to what the first layer makes of the input. That is the layer of input
and context side by side, without the copy. `zero_init` starts the last layer at zero, so that a transform starts as
whatever it is at zero parameters, the identity mostly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.nn.sampling import _check_number, _check_size

__all__ = ["MLP", "ConvNet", "ResidualNet"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}


def check_activation(module: str, activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{module}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return activation


def check_hidden(module: str, hidden: Sequence[int], least: int = 1) -> tuple[int, ...]:
    if isinstance(hidden, (str, bytes)) or not isinstance(hidden, Sequence):
        raise TypeError(f"{module}: hidden must be a sequence of ints, got {type(hidden).__name__}")
    if len(hidden) < least:
        raise ValueError(f"{module}: hidden must hold at least {least}, got {list(hidden)}")
    return tuple(_check_size(module, "hidden", units) for units in hidden)


def activate(name: str, h: Tensor) -> Tensor:
    """The activation of a fresh result, which a rectifier may write over."""
    return F.relu(h, inplace=True) if name == "relu" else ACTIVATIONS[name](h)


def zero_(layer: torch.nn.Module) -> None:
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)


class _Conditioner(torch.nn.Module):
    context_layer: torch.nn.Linear | None
    hidden_features: int  # of the last layer's input: what the spline's logits are scaled by

    def _context_layer(self, context_features: int | None, units: int) -> None:
        name = type(self).__name__
        if context_features is None:
            self.context_features = self.context_layer = None
        else:
            self.context_features = _check_size(name, "context_features", context_features)
            self.context_layer = torch.nn.Linear(self.context_features, units, bias=False)

    def _contexts(self, context: Tensor | None) -> Tensor | None:
        """What the context adds; None if there is none."""
        if self.context_layer is None:
            return None
        name = type(self).__name__
        if context is None:
            raise ValueError(f"{name}: context must be [B, {self.context_features}], got None")
        if context.size(-1) != self.context_features:
            raise ValueError(f"{name}: context must be [B, {self.context_features}], got {list(context.shape)}")
        added: Tensor = self.context_layer(context)
        return added


class MLP(_Conditioner):
    """Dense layers.

    Args:
        in_features: of the input.
        out_features: of the result.
        hidden: units of the layers between them; empty for one linear map.
        context_features: of the context, if there is one.
        activation: "relu", "tanh", "elu", "leaky_relu", "sigmoid", "silu" or "gelu".
        zero_init: start the last layer at zero.

    Raises:
        TypeError: a size is no int.
        ValueError: a size below 1, or an unknown activation; from `forward`, a context of another size.

    Example:
        >>> MLP(3, 4, (16,), context_features=2)(torch.randn(5, 3), torch.randn(5, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (128, 128),
        *,
        context_features: int | None = None,
        activation: str = "relu",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        hidden = check_hidden("MLP", hidden, 0)
        self.activation = check_activation("MLP", activation)
        widths = (
            _check_size("MLP", "in_features", in_features),
            *hidden,
            _check_size("MLP", "out_features", out_features),
        )
        self.layers = torch.nn.ModuleList(torch.nn.Linear(ins, outs) for ins, outs in itertools.pairwise(widths))
        self.hidden_features = widths[-2]
        self._context_layer(context_features, widths[1])
        if zero_init:
            zero_(self.layers[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        added = self._contexts(context)
        for index, layer in enumerate(self.layers):
            if index:
                x = activate(self.activation, x)
            x = layer(x)
            if index == 0 and added is not None:
                x = x + added
        return x


class _ResidualBlock(torch.nn.Module):
    def __init__(self, features: int, context_features: int | None, activation: str, dropout: float) -> None:
        super().__init__()
        self.activation, self.dropout = activation, dropout
        self.layers = torch.nn.ModuleList(torch.nn.Linear(features, features) for _ in range(2))
        self.gate = None if context_features is None else torch.nn.Linear(context_features, features)
        # Small but not zero, as nflows has it: a block starts as about the identity.
        for parameter in self.layers[1].parameters():
            torch.nn.init.uniform_(parameter, -1e-3, 1e-3)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h: Tensor = self.layers[0](ACTIVATIONS[self.activation](x))
        h = activate(self.activation, h)
        if self.dropout > 0.0:
            h = F.dropout(h, self.dropout, self.training)
        h = self.layers[1](h)
        if self.gate is not None:
            h = h * torch.sigmoid(self.gate(context))
        return x + h


class ResidualNet(_Conditioner):
    """Dense residual blocks with the activation first (He et al. 2016, arXiv 1603.05027), as flows use them (Durkan et
    al. 2019, arXiv 1906.04032, appendix B).

    Args:
        in_features: of the input.
        out_features: of the result.
        hidden: units of every layer.
        blocks: of two layers each.
        context_features: of the context, if there is one.
        context_mode: how it enters the blocks, besides the first layer: ``"glu"``, as a gate of each block's result,
            or ``"add"``, not at all.
        activation: as for `MLP`.
        dropout: probability, between a block's layers.
        zero_init: start the last layer at zero.

    Raises:
        TypeError: a size is no int, or dropout no number.
        ValueError: a size below 1, dropout outside of [0, 1), an unknown activation or mode; from `forward`, a context
            of another size.

    Example:
        >>> ResidualNet(3, 4, 16, context_features=2)(torch.randn(5, 3), torch.randn(5, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 128,
        *,
        blocks: int = 2,
        context_features: int | None = None,
        context_mode: str = "glu",
        activation: str = "relu",
        dropout: float = 0.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        name = "ResidualNet"
        in_features = _check_size(name, "in_features", in_features)
        out_features = _check_size(name, "out_features", out_features)
        hidden, blocks = _check_size(name, "hidden", hidden), _check_size(name, "blocks", blocks)
        check_activation(name, activation)
        _check_number(name, "dropout", dropout)
        if not dropout < 1.0:
            raise ValueError(f"{name}: dropout must be in [0, 1), got {dropout}")
        if context_mode not in ("glu", "add"):
            raise ValueError(f"{name}: context_mode must be 'glu' or 'add', got {context_mode!r}")
        self.hidden_features, self.activation = hidden, activation
        self.first = torch.nn.Linear(in_features, hidden)
        self._context_layer(context_features, hidden)
        gates = context_features if context_mode == "glu" else None
        self.blocks = torch.nn.ModuleList(
            _ResidualBlock(hidden, gates, activation, float(dropout)) for _ in range(blocks)
        )
        self.last = torch.nn.Linear(hidden, out_features)
        if zero_init:
            zero_(self.last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h: Tensor = self.first(x)
        added = self._contexts(context)
        if added is not None:
            h = h + added
        for block in self.blocks:
            h = block(h, context)
        out: Tensor = self.last(h)
        return out


class ConvNet(_Conditioner):
    """Glow's network: convolutions 3x3, 1x1 and 3x3 with rectifiers between them.

    Kingma and Dhariwal 2018 (arXiv 1807.03039), section 3.3 and appendix B: the last convolution starts at zero.

    Args:
        in_channels: of the input ``[B, in_channels, H, W]``.
        out_channels: of the result ``[B, out_channels, H, W]``.
        hidden: channels between them.
        context_features: of the context, if there is one: ``[B, F]``, or ``[B, F, H, W]``.
        zero_init: start the last convolution at zero.

    Raises:
        TypeError: a size is no int.
        ValueError: a size below 1; from `forward`, a context of another size.

    Example:
        >>> ConvNet(2, 4, 8)(torch.randn(5, 2, 6, 6)).shape
        torch.Size([5, 4, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 512,
        *,
        context_features: int | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        in_channels = _check_size("ConvNet", "in_channels", in_channels)
        out_channels = _check_size("ConvNet", "out_channels", out_channels)
        hidden = _check_size("ConvNet", "hidden", hidden)
        self.hidden_features = hidden
        self.layers = torch.nn.ModuleList(
            [
                torch.nn.Conv2d(in_channels, hidden, 3, padding=1),
                torch.nn.Conv2d(hidden, hidden, 1),
                torch.nn.Conv2d(hidden, out_channels, 3, padding=1),
            ]
        )
        self._context_layer(context_features, hidden)
        if zero_init:
            zero_(self.layers[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.layers[0](x)
        if self.context_layer is not None:
            if context is not None and context.dim() == 4:
                if context.size(1) != self.context_features:
                    want = f"[B, {self.context_features}, H, W]"
                    raise ValueError(f"ConvNet: context must be {want}, got {list(context.shape)}")
                x = x + F.conv2d(context, self.context_layer.weight[..., None, None])
            else:
                added = self._contexts(context)
                assert added is not None
                x = x + added[..., None, None]
        x = F.relu(x, inplace=True)
        x = F.relu(self.layers[1](x), inplace=True)
        out: Tensor = self.layers[2](x)
        return out
