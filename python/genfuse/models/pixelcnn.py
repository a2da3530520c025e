"""PixelCNN and Gated PixelCNN: masked convolutions over images, and a probability for each level of each pixel."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import nn, ops
from genfuse.ops.masked_conv import PixelProgram

from .autoregressive_image import AutoregressiveImageModel, add_masked

__all__ = ["GatedPixelCNN", "PixelCNN"]


def _embedding(num_classes: int, features: int) -> torch.nn.Embedding:
    table = torch.nn.Embedding(num_classes, features)
    torch.nn.init.normal_(table.weight, std=0.05)
    return table


def _head(ins: int, hidden: Sequence[int], outs: int, groups: int, order: str) -> torch.nn.ModuleList:
    """1x1 convolutions, each of which sees of the pixel's channels those up to its own."""
    widths = [ins, *hidden, outs]
    layers = [
        nn.MaskedConv2d("B", a, b, 1, channel_groups=groups, channel_order=order) for a, b in itertools.pairwise(widths)
    ]
    return torch.nn.ModuleList(layers)


def _channels_last(x: Tensor) -> Tensor:
    """What a convolution of an image makes: of one of a single channel nobody can tell which format it has."""
    return x.contiguous(memory_format=torch.channels_last)


class PixelCNN(AutoregressiveImageModel):
    """A masked convolution of type A, more of type B with ReLUs, and a 1x1 head.

    Van den Oord, Kalchbrenner and Kavukcuoglu 2016 (arXiv 1601.06759), section 3.4 and figure 2. Of several channels
    each is predicted given those before it, by channel groups in the masks. `genfuse.reference.masked_conv.models`
    has the same model in plain PyTorch, with the same ``state_dict``.

    Args:
        in_channels: C of the images.
        image_size: height and width, or one number for both.
        channels: of the layers; at least in_channels.
        num_layers: masked convolutions, the first one included, the head not.
        kernel_size: of the masked convolutions, odd.
        levels: how many values a pixel's channel has; two make it a Bernoulli variable.
        first_kernel_size: of the first one, if it is another.
        head_channels: of 1x1 layers with ReLUs before the last.
        residual: add the input of each type-B layer to its output (no type-A layer may have that).
        num_classes: of a model whose images have labels: each layer has a bias for each class.
        channel_order: how channel groups lie in the layers' channels: "contiguous" thirds for RGB, or "interleaved".

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size below 1, an even kernel, fewer channels than the images have, or an unknown order.

    Example:
        >>> model = PixelCNN(image_size=8, channels=16, num_layers=3, kernel_size=3, levels=4)
        >>> model.loss(torch.randint(4, (5, 1, 8, 8))).backward()
        >>> model(torch.rand(5, 1, 8, 8)).shape, model.sample(2).shape
        (torch.Size([5, 1, 4, 8, 8]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        channels: int = 64,
        num_layers: int = 8,
        kernel_size: int = 7,
        levels: int = 256,
        *,
        first_kernel_size: int | None = None,
        head_channels: Sequence[int] = (),
        residual: bool = False,
        num_classes: int | None = None,
        channel_order: str = "contiguous",
    ) -> None:
        super().__init__(in_channels, image_size, levels, num_classes=num_classes, channel_order=channel_order)
        self.channels = self._check_size("channels", channels, self.in_channels)
        self.num_layers = self._check_size("num_layers", num_layers)
        self.kernel_size = self._check_kernel("kernel_size", kernel_size)
        first = self.kernel_size if first_kernel_size is None else first_kernel_size
        self.first_kernel_size = self._check_kernel(
            "kernel_size" if first_kernel_size is None else "first_kernel_size", first, 3
        )
        self.head_channels = self._check_sizes("head_channels", head_channels)
        self.residual = bool(residual)
        self.config = {
            "in_channels": self.in_channels,
            "image_size": list(self.image_size),
            "channels": self.channels,
            "num_layers": self.num_layers,
            "kernel_size": self.kernel_size,
            "levels": self.levels,
            "first_kernel_size": self.first_kernel_size,
            "head_channels": list(self.head_channels),
            "residual": self.residual,
            "num_classes": self.num_classes,
            "channel_order": channel_order,
        }
        groups, layers = self.in_channels, []
        for index in range(self.num_layers):
            kind, ins, kernel = (
                ("B", self.channels, self.kernel_size) if index else ("A", groups, self.first_kernel_size)
            )
            layers.append(
                nn.MaskedConv2d(kind, ins, self.channels, kernel, channel_groups=groups, channel_order=channel_order)
            )
        self.layers = torch.nn.ModuleList(layers)
        self.conditions: torch.nn.ModuleList | None = None
        if self.num_classes is not None:
            self.conditions = torch.nn.ModuleList([_embedding(self.num_classes, self.channels) for _ in layers])
        self.head = _head(self.channels, self.head_channels, self.outputs, groups, channel_order)

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            y = layer(x)
            if index == 0:
                y = _channels_last(y)
            if self.conditions is not None:
                y = y + self.conditions[index](labels)[:, :, None, None].to(y.dtype)
            y = F.relu(y)
            x = x + y if self.residual and index else y
        for index, layer in enumerate(self.head):
            x = layer(F.relu(x) if index else x)
        return x

    def _build(self, program: PixelProgram, labels: Tensor | None) -> int:
        x = program.image
        for index, layer in enumerate(self.layers):
            bias = layer.bias
            if self.conditions is not None:
                bias = bias + self.conditions[index](labels)
            y = add_masked(program, x, layer, bias, activation="relu")  # type: ignore[arg-type]
            x = program.add(x, y) if self.residual and index else y
        for index, layer in enumerate(self.head):
            last = index == len(self.head) - 1
            x = add_masked(program, x, layer, layer.bias, activation=None if last else "relu")  # type: ignore[arg-type]
        return x


class _GatedLayer(torch.nn.Module):
    """A layer of both stacks: figure 2 of the paper.

    The convolutions have no bias: the gate adds it. The last layer has no vertical output, for nothing would see it.
    """

    def __init__(
        self,
        ins: int,
        channels: int,
        kernel: int,
        first: bool,
        last: bool,
        groups: int,
        order: str,
        num_classes: int | None,
        skip: bool,
    ) -> None:
        super().__init__()
        self.first, self.groups, self.order = first, groups, order
        self.vertical = nn.MaskedConv2d("vertical_A" if first else "vertical_B", ins, 2 * channels, kernel, bias=False)
        self.vertical_bias = None if last else torch.nn.Parameter(torch.zeros(2 * channels))
        self.horizontal = nn.MaskedConv2d(
            "horizontal_A" if first else "horizontal_B",
            ins,
            2 * channels,
            (1, kernel),
            bias=False,
            channel_groups=groups,
            channel_order=order,
        )
        self.horizontal_bias = torch.nn.Parameter(torch.zeros(2 * channels))
        # All that it sees lies in the rows above, of whatever colour.
        self.vertical_to_horizontal = torch.nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)

        def pointwise() -> nn.MaskedConv2d:
            return nn.MaskedConv2d("B", channels, channels, 1, channel_groups=groups, channel_order=order)

        self.output = None if last and skip else pointwise()
        self.skip = pointwise() if skip else None
        self.vertical_condition: torch.nn.Embedding | None = None
        self.horizontal_condition: torch.nn.Embedding | None = None
        if num_classes is not None:
            self.vertical_condition = None if last else _embedding(num_classes, 2 * channels)
            self.horizontal_condition = _embedding(num_classes, 2 * channels)

    def _across(self, h: Tensor) -> Tensor:
        """The horizontal convolution, both of whose halves have the same mask."""
        if self.groups == 1:
            found: Tensor = self.horizontal(h)
            return found
        layer = self.horizontal
        halves = [
            ops.masked_conv2d(h, weight, None, layer.mask_type, channel_groups=self.groups, channel_order=self.order)
            for weight in layer.weight.chunk(2)
        ]
        return torch.cat(halves, 1)

    def forward(self, v: Tensor, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        above = self.vertical(v)
        across = self._across(h)
        if self.first:
            above, across = _channels_last(above), _channels_last(across)
        # A 1x1 mask of type B hides nothing: the kernel takes channels last as they are.
        beside = ops.masked_conv2d(above, self.vertical_to_horizontal.weight, None, "B")
        bias = self.horizontal_bias
        if self.horizontal_condition is not None:  # there is one conditional, and this one is the smaller
            beside = beside + (self.horizontal_condition(labels) + bias)[:, :, None, None].to(beside.dtype)
            gated = ops.gated_activation(across, beside)
        else:
            gated = ops.gated_activation(across, beside, bias=bias)
        out = gated
        if self.output is not None:
            out = self.output(gated) if self.first else h + self.output(gated)
        if self.vertical_bias is not None:
            condition = None if self.vertical_condition is None else self.vertical_condition(labels)
            v = ops.gated_activation(above, condition, bias=self.vertical_bias)
        return v, out, None if self.skip is None else self.skip(gated)

    def build(self, program: PixelProgram, v: int, h: int, labels: Tensor | None) -> tuple[int, int, int | None]:
        """The same as instructions."""
        above = add_masked(program, v, self.vertical, None)
        beside = program.conv(above, self.vertical_to_horizontal.weight)
        across = add_masked(program, h, self.horizontal, None, halves=2, add=beside)
        bias: Tensor = self.horizontal_bias
        if self.horizontal_condition is not None:
            bias = bias + self.horizontal_condition(labels)
        gated = program.gate(across, condition=bias)
        out = gated
        if self.output is not None:
            out = add_masked(program, gated, self.output, self.output.bias, add=None if self.first else h)
        if self.vertical_bias is not None:
            bias = self.vertical_bias
            if self.vertical_condition is not None:
                bias = bias + self.vertical_condition(labels)
            v = program.gate(above, condition=bias)
        return v, out, None if self.skip is None else add_masked(program, gated, self.skip, self.skip.bias)


class GatedPixelCNN(AutoregressiveImageModel):
    """Two stacks of masked convolutions with gates: a vertical one that sees the rows above, and a horizontal one that
    sees the row up to the pixel and the vertical one. It has no blind spot.

    Van den Oord et al. 2016 (arXiv 1606.05328), figure 2; with labels, eq. 4 in both stacks.
    The first layer has no residual connection, as its input holds the pixel itself.
    `genfuse.reference.masked_conv.models` has the same model in plain PyTorch, with the same ``state_dict``.

    Args:
        in_channels: C of the images; of several, each is predicted given those before it.
        image_size: height and width, or one number for both.
        channels: of both stacks; with channel_order "interleaved" a multiple of in_channels.
        num_layers: gated layers, the first one included.
        kernel_size: n of the vertical stack's n x n and the horizontal one's 1 x n convolutions, odd.
        levels: how many values a pixel's channel has; two make it a Bernoulli variable.
        first_kernel_size: of the first layer; None: kernel_size.
        head_channels: of 1x1 layers with ReLUs before the last.
        skip: the head sees the sum of a 1x1 convolution of every layer's gate, instead of the last layer's output.
        num_classes: of a model whose images have labels.
        channel_order: how channel groups lie in the layers' channels: "contiguous" thirds for RGB, or "interleaved".

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size below 1, an even kernel, channels that do not fit the images', or an unknown order.

    Example:
        >>> model = GatedPixelCNN(image_size=8, channels=8, num_layers=3, levels=4, num_classes=10)
        >>> labels = torch.tensor([3, 1, 4])
        >>> model.loss(torch.randint(4, (3, 1, 8, 8)), labels).backward()
        >>> model.sample(2, labels=7).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        channels: int = 64,
        num_layers: int = 8,
        kernel_size: int = 3,
        levels: int = 256,
        *,
        first_kernel_size: int | None = 7,
        head_channels: Sequence[int] = (),
        skip: bool = False,
        num_classes: int | None = None,
        channel_order: str = "contiguous",
    ) -> None:
        super().__init__(in_channels, image_size, levels, num_classes=num_classes, channel_order=channel_order)
        self.channels = self._check_size("channels", channels, self.in_channels)
        if channel_order == "interleaved" and self.channels % self.in_channels:
            raise ValueError(
                f"GatedPixelCNN: channels must be a multiple of the images' {self.in_channels} if they are "
                f"interleaved, got {self.channels}"
            )
        self.num_layers = self._check_size("num_layers", num_layers)
        self.kernel_size = self._check_kernel("kernel_size", kernel_size)
        first = self.kernel_size if first_kernel_size is None else first_kernel_size
        self.first_kernel_size = self._check_kernel(
            "kernel_size" if first_kernel_size is None else "first_kernel_size", first, 3
        )
        self.head_channels = self._check_sizes("head_channels", head_channels)
        self.skip = bool(skip)
        self.config = {
            "in_channels": self.in_channels,
            "image_size": list(self.image_size),
            "channels": self.channels,
            "num_layers": self.num_layers,
            "kernel_size": self.kernel_size,
            "levels": self.levels,
            "first_kernel_size": self.first_kernel_size,
            "head_channels": list(self.head_channels),
            "skip": self.skip,
            "num_classes": self.num_classes,
            "channel_order": channel_order,
        }
        groups, layers = self.in_channels, []
        for index in range(self.num_layers):
            kernel, ins = (self.kernel_size, self.channels) if index else (self.first_kernel_size, groups)
            ends = index == 0, index == self.num_layers - 1
            layers.append(
                _GatedLayer(ins, self.channels, kernel, *ends, groups, channel_order, self.num_classes, self.skip)
            )
        self.layers = torch.nn.ModuleList(layers)
        self.head = _head(self.channels, self.head_channels, self.outputs, groups, channel_order)

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        v = h = x
        total: Tensor | None = None
        for layer in self.layers:
            v, h, skip = layer(v, h, labels)
            if skip is not None:
                total = skip if total is None else total + skip
        h = h if total is None else total
        for layer in self.head:
            h = layer(F.relu(h))
        return h

    def _build(self, program: PixelProgram, labels: Tensor | None) -> int:
        v = h = program.image
        total: int | None = None
        for layer in self.layers:
            assert isinstance(layer, _GatedLayer)
            v, h, skip = layer.build(program, v, h, labels)
            if skip is not None:
                total = skip if total is None else program.add(total, skip)
        h = h if total is None else total
        for layer in self.head:
            h = add_masked(program, program.activation(h, "relu"), layer, layer.bias)  # type: ignore[arg-type]
        return h
