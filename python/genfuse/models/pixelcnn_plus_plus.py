"""PixelCNN++: two streams of shifted convolutions at three scales, and a mixture of discretized logistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import nn
from genfuse.nn.masked_conv.pixelcnn import NONLINEARITIES, WeightNormConv2d, down_shift, right_shift
from genfuse.ops.masked_conv import PixelProgram

from .autoregressive_image import AutoregressiveImageModel

__all__ = ["PixelCNNPlusPlus"]


class WeightNormModel(AutoregressiveImageModel):
    """What the models of shifted convolutions with normalised weights share."""

    def _check_nonlinearity(self, nonlinearity: object) -> str:
        if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
            known = ", ".join(map(repr, NONLINEARITIES))
            raise ValueError(f"{self.name}: resnet_nonlinearity must be one of {known}; got {nonlinearity!r}")
        return nonlinearity

    def _check_head(self) -> None:
        if self.likelihood != "mixture" and self.in_channels > 1:
            raise ValueError(
                f"{self.name}: {self.in_channels} channels must have a mixture of logistics (nr_logistic_mix, and more "
                f"than 2 levels): this network predicts the channels of a pixel together"
            )

    @torch.no_grad()
    def initialize(self, x: Tensor, labels: Tensor | int | None = None) -> None:
        """Set the scales and biases of all layers by a batch, as the first batch in training does, in whatever mode.

        Salimans and Kingma 2016 (arXiv 1602.07868), section 3; with dropout, as in training.

        Args:
            x, labels: as of `forward`; a hundred images or more are customary.
        """
        layers = [one for one in self.modules() if isinstance(one, WeightNormConv2d)]
        modes = [(one, one.training) for one in self.modules()]
        before = [layer.initialized.clone() for layer in layers]
        for layer in layers:
            layer._ready = False
            layer.initialized.fill_(False)
        self.train()
        try:
            AutoregressiveImageModel.forward(self, x, labels)
        finally:
            for one, training in modes:
                one.training = training
            for layer, known in zip(layers, before, strict=True):  # an empty batch sets nothing
                layer.initialized.logical_or_(known)
                layer._ready = bool(layer.initialized)


class Start(torch.nn.Module):
    """The first layer of a stream that sees pixels above and to the left, and not the pixel itself."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.above = nn.DownShiftedConv2d(ins, outs, (1, 3))
        self.left = nn.DownRightShiftedConv2d(ins, outs, (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return down_shift(self.above(x)) + right_shift(self.left(x))

    def build(self, builder: Builder) -> int:
        above = builder.first(self.above, (-1, 0))
        return builder.first(self.left, (0, -1), add=above)


def with_ones(x: Tensor) -> Tensor:
    """A channel of ones, which tells the padding from black pixels."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1).contiguous(memory_format=torch.channels_last)


class Builder:
    """Instructions of a `PixelProgram` for the layers with normalised weights; each nonlinearity is computed once."""

    def __init__(self, program: PixelProgram, labels: Tensor | None, nonlinearity: str, like: Tensor) -> None:
        self.program, self.labels, self.nonlinearity, self.like = program, labels, nonlinearity, like
        self.activated: dict[tuple[int, str], int] = {}
        self.ones = program.constant(like.new_ones(1, program.height, program.width))

    def activate(self, x: int, kind: str | None = None) -> int:
        kind = self.nonlinearity if kind is None else kind
        if (x, kind) not in self.activated:
            self.activated[x, kind] = self.program.activation(x, kind)
        return self.activated[x, kind]

    def first(self, layer: Any, shift: tuple[int, int], add: int | None = None) -> int:
        """A convolution of the image with a channel of ones, the result moved down or right.

        What the move lets in is 0, without the bias, so the bias has to be one of the weights: that of the channel of
        ones where the tap lies in the image if and only if the result is not of what the move lets in, which is the
        middle of the lowest row.
        """
        weight = layer.weight
        offset = layer.offset[0] + shift[0], layer.offset[1] + shift[1]
        of_ones = weight[:, -1:].clone()
        of_ones[:, 0, -1, weight.size(3) // 2] += layer.bias
        add = self.program.conv(self.ones, of_ones, offset=offset, add=add)
        return self.program.conv(self.program.image, weight[:, :-1], offset=offset, add=add)

    def conv(self, layer: Any, x: int, add: int | None = None) -> int:
        """Any layer that keeps the size, or halves it."""
        offset = getattr(layer, "offset", (0, 0))
        return self.program.conv(x, layer.weight, layer.bias, offset=offset, stride=layer.stride, add=add)

    def conv_of(self, layer: Any, parts: Sequence[int], sizes: Sequence[int], add: int | None = None) -> int:
        """A 1x1 convolution of the nonlinearity of a concatenation: the sum of those of its parts."""
        whole, start, bias = sum(sizes), 0, layer.bias
        wider = NONLINEARITIES[self.nonlinearity]
        for part, size in zip(parts, sizes, strict=True):
            columns = [layer.weight[:, half * whole + start : half * whole + start + size] for half in range(wider)]
            add = self.program.conv(self.activate(part), torch.cat(columns, 1), bias, add=add)
            start, bias = start + size, None
        assert add is not None
        return add

    def place(self, x: int, whole: int, start: int, offset: tuple[int, int] = (0, 0), add: int | None = None) -> int:
        """A value's channels as those from `start` on of `whole`, of what lies at `offset` from each position."""
        size = self.program.values[x][0]
        places = self.like.new_zeros(whole, size, 1, 1)
        places[start : start + size, :, 0, 0] = torch.eye(size, dtype=places.dtype, device=places.device)
        return self.program.conv(x, places, offset=offset, add=add)

    def block(self, block: Any, x: int, aux: Sequence[int] = (), sizes: Sequence[int] = ()) -> int:
        """A `genfuse.nn.GatedResNet`, whose other input is a concatenation."""
        add = self.conv_of(block.aux, aux, sizes) if aux else None
        y = self.conv(block.conv_in, self.activate(x), add)
        y = self.conv(block.conv_out, self.activate(y))
        condition = None if block.condition is None else block.condition(self.labels)
        return self.program.gate(y, activation="linear", condition=condition, residual=x)


class PixelCNNPlusPlus(WeightNormModel):
    """A stream that sees the rows above and one that sees what precedes the pixel, at full, half and quarter size, with
    shortcuts, and a mixture of discretized logistics over all colours of a pixel together.

    Salimans, Karpathy, Chen and Kingma 2017 (arXiv 1701.05517), figure 2 and section 2, with weight normalisation and
    its data-dependent start: the first batch in training sets scales and biases (or `initialize` does). Images get a
    channel of ones, which tells the padding from black. `genfuse.reference.masked_conv.models` has the same model in
    plain PyTorch, with the same ``state_dict``.

    Args:
        in_channels: C of the images, 1 or 3.
        image_size: height and width, or one number for both; multiples of 2^(scales - 1).
        nr_resnet: gated residual blocks of each stream at each scale.
        nr_filters: channels of both streams.
        nr_logistic_mix: components of the mixture; None (images of one channel): a probability for each level instead.
        levels: how many values a pixel's channel has, a power of two for a mixture; two make a pixel of one channel a
            Bernoulli variable.
        dropout: in the blocks, in training.
        resnet_nonlinearity: "concat_elu", "elu" or "relu".
        num_classes: of a model whose images have labels.
        scales: sizes at which the streams run, each half the one before.
        mode: of the mixture's likelihood: "exact", or "openai" for the published approximation.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number out of its range, a size that cannot be halved so often, several channels without a
            mixture.

    Example:
        >>> model = PixelCNNPlusPlus(image_size=8, nr_resnet=1, nr_filters=8, nr_logistic_mix=2)
        >>> x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
        >>> model.loss(x).backward()
        >>> model(x).shape, model.sample(2).shape
        (torch.Size([4, 20, 8, 8]), torch.Size([2, 3, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        nr_resnet: int = 5,
        nr_filters: int = 160,
        nr_logistic_mix: int | None = 10,
        *,
        levels: int = 256,
        dropout: float = 0.5,
        resnet_nonlinearity: str = "concat_elu",
        num_classes: int | None = None,
        scales: int = 3,
        mode: str = "exact",
    ) -> None:
        super().__init__(
            in_channels, image_size, levels, num_classes=num_classes, nr_logistic_mix=nr_logistic_mix, mode=mode
        )
        self._check_head()
        self.nr_resnet = self._check_size("nr_resnet", nr_resnet)
        self.nr_filters = self._check_size("nr_filters", nr_filters)
        self.dropout = self._check_dropout(dropout)
        self.resnet_nonlinearity = self._check_nonlinearity(resnet_nonlinearity)
        self.scales = self._check_size("scales", scales)
        factor = 2 ** (self.scales - 1)
        if any(size % factor for size in self.image_size):
            raise ValueError(
                f"PixelCNNPlusPlus: image_size must be multiples of {factor} for {self.scales} scales, "
                f"got {list(self.image_size)}"
            )
        self.config = {
            "in_channels": self.in_channels,
            "image_size": list(self.image_size),
            "nr_resnet": self.nr_resnet,
            "nr_filters": self.nr_filters,
            "nr_logistic_mix": self.nr_logistic_mix,
            "levels": self.levels,
            "dropout": self.dropout,
            "resnet_nonlinearity": self.resnet_nonlinearity,
            "num_classes": self.num_classes,
            "scales": self.scales,
            "mode": mode,
        }
        filters = self.nr_filters

        def blocks(conv: str, aux: int, count: int) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(
                [
                    nn.GatedResNet(
                        filters,
                        conv,
                        aux_channels=aux or None,
                        dropout=self.dropout,
                        nonlinearity=self.resnet_nonlinearity,
                        num_classes=self.num_classes,
                    )
                    for _ in range(count)
                ]
            )

        self.u_start = nn.DownShiftedConv2d(self.in_channels + 1, filters)
        self.ul_start = Start(self.in_channels + 1, filters)
        # On the way back, the smallest scale has a shortcut less: its last blocks are where the way starts.
        counts = [self.nr_resnet + (scale > 0) for scale in range(self.scales)]
        smaller = range(self.scales - 1)
        self.u_up = torch.nn.ModuleList([blocks("down", 0, self.nr_resnet) for _ in counts])
        self.ul_up = torch.nn.ModuleList([blocks("down_right", filters, self.nr_resnet) for _ in counts])
        self.u_downsize = torch.nn.ModuleList([nn.DownShiftedConv2d(filters, filters, stride=2) for _ in smaller])
        self.ul_downsize = torch.nn.ModuleList([nn.DownRightShiftedConv2d(filters, filters, stride=2) for _ in smaller])
        self.u_down = torch.nn.ModuleList([blocks("down", filters, count) for count in counts])
        self.ul_down = torch.nn.ModuleList([blocks("down_right", 2 * filters, count) for count in counts])
        self.u_upsize = torch.nn.ModuleList([nn.DownShiftedConvTranspose2d(filters, filters) for _ in smaller])
        self.ul_upsize = torch.nn.ModuleList([nn.DownRightShiftedConvTranspose2d(filters, filters) for _ in smaller])
        self.head = nn.NetworkInNetwork(filters, self.outputs)

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = with_ones(x)
        us, uls = [down_shift(self.u_start(x))], [self.ul_start(x)]
        for scale in range(self.scales):
            if scale:
                us.append(self.u_downsize[scale - 1](us[-1]))
                uls.append(self.ul_downsize[scale - 1](uls[-1]))
            for u_block, ul_block in self._blocks(self.u_up, self.ul_up, scale):
                us.append(u_block(us[-1], None, labels))
                uls.append(ul_block(uls[-1], us[-1], labels))
        u, ul = us.pop(), uls.pop()
        for scale in range(self.scales):
            if scale:
                u, ul = self.u_upsize[scale - 1](u), self.ul_upsize[scale - 1](ul)
            for u_block, ul_block in self._blocks(self.u_down, self.ul_down, scale):
                u = u_block(u, us.pop(), labels)
                ul = ul_block(ul, torch.cat([u, uls.pop()], 1), labels)
        out: Tensor = self.head(F.elu(ul))
        return out

    @staticmethod
    def _blocks(us: Any, uls: Any, scale: int) -> list[tuple[Any, Any]]:
        return list(zip(us[scale], uls[scale], strict=True))

    def _build(self, program: PixelProgram, labels: Tensor | None) -> int:
        builder = Builder(program, labels, self.resnet_nonlinearity, self._like)
        filters = self.nr_filters
        us, uls = [builder.first(self.u_start, (-1, 0))], [self.ul_start.build(builder)]
        for scale in range(self.scales):
            if scale:
                us.append(builder.conv(self.u_downsize[scale - 1], us[-1]))
                uls.append(builder.conv(self.ul_downsize[scale - 1], uls[-1]))
            for u_block, ul_block in self._blocks(self.u_up, self.ul_up, scale):
                us.append(builder.block(u_block, us[-1]))
                uls.append(builder.block(ul_block, uls[-1], [us[-1]], [filters]))
        u, ul = us.pop(), uls.pop()
        for scale in range(self.scales):
            if scale:
                layers: tuple[Any, Any] = self.u_upsize[scale - 1], self.ul_upsize[scale - 1]
                u, ul = (
                    program.conv_transpose(value, layer.weight, layer.bias, offset=layer.offset)
                    for value, layer in zip((u, ul), layers, strict=True)
                )
            for u_block, ul_block in self._blocks(self.u_down, self.ul_down, scale):
                u = builder.block(u_block, u, [us.pop()], [filters])
                ul = builder.block(ul_block, ul, [u, uls.pop()], [filters, filters])
        return builder.conv(self.head, builder.activate(ul, "elu"))
