"""Autoregressive networks of other libraries as the layers that `genfuse.ops.autoregressive_inverse` takes.

A network of masked linear layers can be inverted column by column if its masks follow from degrees. They are the ones
that the layers were made of, or else read from the masks (a unit's degree is the largest of those that it sees), and
then compared with the masks, once for each network, as long as its masks do not change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse.ops import MaskedLayer

from .serving import hooked

__all__ = ["Network", "activation", "drops", "is_exactly", "masked_layers", "of_made", "plain"]

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.elu: "elu",
    F.leaky_relu: "leaky_relu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.silu: "silu",
    F.gelu: "gelu",
}
_MASKS = "masks that do not follow from degrees"


def activation(function: Any) -> str | None:
    """The name of an activation among the operator's, None if it has none.

    Example:
        >>> activation(torch.nn.ReLU()), activation(torch.tanh), activation(torch.nn.ELU(alpha=2.0))
        ('relu', 'tanh', None)
    """
    if isinstance(function, nn.Module):
        if hooked(function):
            return None
        plain = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.Identity: "none"}
        if type(function) in plain:
            return plain[type(function)]
        if type(function) is nn.ELU and function.alpha == 1.0:
            return "elu"
        if type(function) is nn.LeakyReLU and function.negative_slope == 0.01:
            return "leaky_relu"
        if type(function) is nn.GELU and function.approximate == "none":
            return "gelu"
        return None
    try:
        return _FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None


def is_exactly(module: object, name: str) -> bool:
    """Whether an object is of this very class, by its qualified name, and without hooks."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" != name:
        return False
    return not (isinstance(module, nn.Module) and (hooked(module) or "forward" in vars(module)))


def plain(module: nn.Module, linear: str) -> bool:
    """Whether every masked linear layer inside is the library's own, without hooks or anything parametrized."""
    return all(
        is_exactly(one, linear) and isinstance(one._parameters.get("weight"), Tensor)
        for one in module.modules()
        if isinstance(one, nn.Linear) and hasattr(one, "mask")
    )


def drops(module: nn.Module) -> bool:
    """Whether a dropout layer inside is at work."""
    return any(isinstance(one, nn.Dropout) and one.training and one.p > 0.0 for one in module.modules())


@dataclass
class Network:
    """A network without its weights: per layer the module that has them, and how it is wired.

    Attributes:
        modules: the masked linear layers.
        sources: per layer, what is multiplied: a layer before it, or -1 for x.
        activations: per layer, what is applied to that.
        residuals: per layer, a layer that is added; None for nothing.
        columns: the degree of each column.
        interleaved: whether a column's parameters lie together.
        context: the number of inputs of the first layer (and of any other of x) that are not columns: they come after
            them, or `context_first` before them.
        strict: layers of x that see lower degrees alone and are added to the last one.
    """

    modules: list[nn.Module]
    sources: list[int]
    activations: list[str]
    residuals: list[int | None]
    columns: Tensor
    interleaved: bool = True
    context: int = 0
    context_first: bool = False
    strict: tuple[int, ...] = ()


# Degrees of all layers but the last, by network: the masks they are of and their versions, then the degrees or None.
_DEGREES: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[Any, int]], list[Tensor] | None]] = (
    weakref.WeakKeyDictionary()
)


def _of_columns(network: Network, matrix: Tensor) -> Tensor:
    """The part of a weight or mask of x that belongs to the columns."""
    if not network.context:
        return matrix
    return matrix[:, network.context :] if network.context_first else matrix[:, : matrix.shape[1] - network.context]


def _of_context(network: Network, matrix: Tensor) -> Tensor:
    return matrix[:, : network.context] if network.context_first else matrix[:, matrix.shape[1] - network.context :]


def _degrees(key: nn.Module, network: Network) -> list[Tensor] | None:
    """The degrees of the units of all layers but the last; None if the masks do not follow from any."""
    masks: list[Tensor] = [module.mask for module in network.modules]  # type: ignore[misc]
    stamp = [(mask, mask._version) for mask in [*masks, network.columns]]
    known = _DEGREES.get(key)
    if known is not None and len(known[0]) == len(stamp):
        same = all(a[0] is b[0] and a[1] == b[1] for a, b in zip(known[0][:-1], stamp[:-1], strict=True))
        if same and torch.equal(known[0][-1][0], network.columns):
            return known[1]
    found = _read_degrees(network, masks)
    _DEGREES[key] = (stamp, found)
    return found


def _read_degrees(network: Network, masks: Sequence[Tensor]) -> list[Tensor] | None:
    columns = network.columns
    none = int(columns.min()) - 1
    found: list[Tensor] = []
    for place, mask in enumerate(masks):
        source = network.sources[place]
        below = columns if source < 0 else found[source]
        seen = (_of_columns(network, mask) if source < 0 else mask) != 0
        last = place == len(masks) - 1
        if last or place in network.strict:
            each, rest = divmod(mask.shape[0], len(columns))
            if rest:
                return None
            own = (columns.repeat_interleave(each) if network.interleaved else columns.repeat(each)) - 1
        elif isinstance(given := getattr(network.modules[place], "degrees", None), Tensor) and len(given) == len(mask):
            own = given
        else:
            own = torch.where(seen, below, none).amax(1) if seen.shape[1] else torch.full_like(seen[:, 0], none)
        if not torch.equal(seen, below <= own[:, None]):
            return None
        residual = network.residuals[place]
        if residual is not None and not last and bool((found[residual] > own).any()):
            return None
        found.append(own)
    return found[:-1]


def masked_layers(
    key: nn.Module, network: Network, context: Tensor | None, additions: dict[int, Tensor] | None = None
) -> list[MaskedLayer] | str:
    """The layers for the operator; a reason if it cannot invert them.

    Args:
        key: what the network was read from.
        network: as read.
        context: ``[B, network.context]``.
        additions: per layer, what else is added.
    """
    degrees = _degrees(key, network)
    if degrees is None:
        return _MASKS
    layers = []
    for place, module in enumerate(network.modules):
        weight: Tensor = module.weight  # type: ignore[assignment]
        add = None if additions is None else additions.get(place)
        if network.sources[place] < 0 and network.context:
            mask: Tensor = module.mask  # type: ignore[assignment]
            assert context is not None
            live = _of_context(network, weight) * _of_context(network, mask)
            add = F.linear(context, live) if add is None else add + F.linear(context, live)
            weight = _of_columns(network, weight)
        layers.append(
            MaskedLayer(
                weight,
                module.bias,  # type: ignore[arg-type]
                degrees[place] if place < len(degrees) else None,
                network.sources[place],
                network.activations[place],
                add,
                network.residuals[place],
            )
        )
    return layers


# ---- MADE of nflows and normflows ------------------------------------------------------------------------------------


def of_made(
    net: Any, package: str, context: Tensor | None, rows: int, initial: Callable[[Tensor], Tensor] | None
) -> tuple[list[MaskedLayer], Tensor] | str:
    """The layers of a MADE, and the columns' degrees; or the reason why it cannot be inverted in one pass.

    Args:
        net: a MADE of nflows or of normflows, which are alike but for what the context does.
        package: the module that has it.
        context: ``[B, ...]`` or None.
        rows: B.
        initial: what nflows applies to the first layer, if its blocks are not residual, and to what comes of the
            context. None in normflows: nothing.
    """
    if not is_exactly(net, f"{package}.MADE") or not plain(net, f"{package}.MaskedLinear"):
        return "a network of another class"
    if context is not None and (context.dim() != 2 or context.shape[0] != rows or not hasattr(net, "context_layer")):
        return "a context of another shape than the network's"
    if hasattr(net, "preprocessing") and type(net.preprocessing) is not nn.Identity:
        return "a network with features of its inputs"
    if drops(net):
        return "dropout at work"
    nflows = initial is not None
    first = net.initial_layer
    modules, sources, activations = [first], [-1], ["none"]
    residuals: list[int | None] = [None]
    additions: dict[int, Tensor] = {}
    if context is not None:
        additions[0] = initial(net.context_layer(context)) if initial is not None else net.context_layer(context)
    applied = "none"  # to the layer before, once it is used
    if nflows and not net.use_residual_blocks:
        name = activation(net.activation)
        if name is None:
            return "an activation that genfuse does not know"
        applied = name
    for block in net.blocks:
        name = activation(block.activation)
        if name is None:
            return "an activation that genfuse does not know"
        below = len(modules) - 1
        if is_exactly(block, f"{package}.MaskedResidualBlock"):
            if block.use_batch_norm:
                return "batch normalisation"
            if context is not None:
                if not nflows:
                    return "a block gated by the context"
                additions[below + 1] = block.context_layer(context)
            modules += list(block.linear_layers)
            sources += [below, below + 1]
            activations += [name, name]
            residuals += [None, below]
            applied = "none"
        elif is_exactly(block, f"{package}.MaskedFeedforwardBlock"):
            if block.batch_norm is not None:
                return "batch normalisation"
            if context is not None and not nflows:
                return "a block that takes no context"
            modules.append(block.linear)
            sources.append(below)
            activations.append(applied)
            residuals.append(None)
            applied = name
        else:
            return "a block of another class"
    sources.append(len(modules) - 1)
    modules.append(net.final_layer)
    activations.append(applied)
    residuals.append(None)
    columns = first.weight.shape[1]
    each, rest = divmod(net.final_layer.weight.shape[0], max(columns, 1))
    if rest or not each:
        return _MASKS
    degrees: Tensor = net.final_layer.degrees[::each]
    layers = masked_layers(net, Network(modules, sources, activations, residuals, degrees), None, additions)
    return layers if isinstance(layers, str) else (layers, degrees)
