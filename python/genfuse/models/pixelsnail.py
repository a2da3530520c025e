"""PixelSNAIL: gated residual blocks of causal convolutions, and attention to all that precedes a pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import nn
from genfuse.nn.masked_conv.pixelcnn import causal_attention
from genfuse.ops.masked_conv import PixelProgram

from .pixelcnn_plus_plus import Builder, Start, WeightNormModel, with_ones

__all__ = ["PixelSNAIL"]


class _Block(torch.nn.Module):
    """Residual blocks, and one attention whose result is another input of the last: figure 3 of the paper."""

    def __init__(
        self,
        filters: int,
        image: int,
        keys: int,
        values: int,
        heads: int,
        nr_resnet: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.filters, self.image, self.keys, self.values, self.heads = filters, image, keys, values, heads
        content, asked = image + filters + 2, filters + 2
        self.resnets = torch.nn.ModuleList([nn.GatedResNet(filters, **options) for _ in range(nr_resnet)])
        self.content = nn.GatedResNet(content, "nin", **options)
        self.key_value = nn.NetworkInNetwork(content, keys + values)
        self.question = nn.GatedResNet(asked, "nin", **options)
        self.query = nn.NetworkInNetwork(asked, keys)
        self.merge = nn.GatedResNet(filters, "nin", aux_channels=values, **options)

    def forward(self, ul: Tensor, x: Tensor, background: Tensor, labels: Tensor | None) -> Tensor:
        for block in self.resnets:
            ul = block(ul, None, labels)
        # Of every pixel that another one looks back to, its own value is known, too.
        both = self.key_value(self.content(torch.cat([x, ul, background], 1), None, labels))
        key, value = torch.split_with_sizes(both, (self.keys, self.values), 1)
        query = self.query(self.question(torch.cat([ul, background], 1), None, labels))
        mixed = causal_attention(query, key, value, self.heads).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.merge(ul, mixed, labels)
        return out

    def build(self, builder: Builder, ul: int, background: Tensor) -> int:
        for block in self.resnets:
            ul = builder.block(block, ul)
        key, value = self._build_content(builder, ul, background)
        where = builder.program.constant(F.pad(background, (0, 0, 0, 0, self.filters, 0)))
        question = builder.block(self.question, builder.place(ul, self.filters + 2, 0, add=where))
        query = self._build_query(builder, question)
        mixed = builder.program.attention(query, key, value, self.heads, strict=False)
        return builder.block(self.merge, ul, [mixed], [self.values])

    def _build_content(self, builder: Builder, ul: int, background: Tensor) -> tuple[int, int]:
        """Keys and values of the pixel before, in raster order.

        A program's pixel cannot see its own value, only those before. So everything that keys and values are made of is
        moved on by one pixel, and attention includes the pixel itself. The first pixel then has a key of nothing: a
        further channel of keys and queries keeps everybody from it, and a gate makes its value 0, which is what the
        first pixel sees.
        """
        program, like = builder.program, builder.like
        height, width = program.height, program.width
        # The pixel before is the one to the left; of the first column, the last of the row above.
        whole, left, above = self.image + self.filters + 2, (0, -1), (-1, width - 1)
        moved = F.pad(background.flatten(1)[:, :-1], (1, 0)).view(2, height, width)
        raw = program.constant(F.pad(moved, (0, 0, 0, 0, whole - 2, 0)))
        for part, start in ((program.image, 0), (ul, self.image)):
            for offset in (left, above):
                raw = builder.place(part, whole, start, offset, raw)
        content = builder.block(self.content, raw)
        weight, bias = self.key_value.weight, self.key_value.bias
        key_weight, value_weight = weight[: self.keys], weight[self.keys :]
        no_one = like.new_zeros(1, height, width)
        no_one[0, 0, 0] = -1e4
        keys = self._spread(key_weight), self._spread(bias[: self.keys])
        hidden = like.new_zeros(self.heads, self.keys // self.heads + 1, height, width)
        hidden[:, -1] = no_one
        key = program.conv(content, keys[0], keys[1], add=program.constant(hidden.flatten(0, 1)))
        # sigmoid(40) is 1 in float64, and that of -1e4 is 0.
        open_but = torch.cat([like.new_zeros(self.values, height, width), (no_one + 40.0).expand(self.values, -1, -1)])
        gates = torch.cat([value_weight, torch.zeros_like(value_weight)])
        biases = torch.cat([bias[self.keys :], torch.zeros_like(bias[self.keys :])])
        value = program.conv(content, gates, biases, add=program.constant(open_but))
        return key, program.gate(value, activation="linear")

    def _spread(self, rows: Tensor) -> Tensor:
        """Rows for each head, and one of zeros after them."""
        each = rows.reshape(self.heads, -1, *rows.shape[1:])
        return torch.cat([each, torch.zeros_like(each[:, :1])], 1).flatten(0, 1)

    def _build_query(self, builder: Builder, question: int) -> int:
        # There is a channel more than the product is to be scaled by.
        each = self.keys // self.heads
        scale = math.sqrt((each + 1) / each)
        bias = self._spread(scale * self.query.bias).view(self.heads, -1)
        bias[:, -1] = scale * math.sqrt(each)
        return builder.program.conv(question, self._spread(scale * self.query.weight), bias.flatten())


class PixelSNAIL(WeightNormModel):
    """Blocks of gated residual layers of causal convolutions, each with attention to all pixels before.

    Chen, Mishra, Rohaninejad and Abbeel 2017 (arXiv 1712.09763), figure 3 and section 2. Keys and values are made of
    the image, the block's features and the pixel's position, queries of the latter two; attention (torch's
    ``scaled_dot_product_attention``) is to earlier pixels only, and of the first pixel 0. Weight normalisation, its
    data-dependent start and the head are those of `PixelCNNPlusPlus`. `genfuse.reference.masked_conv.models` has the
    same model in plain PyTorch, with the same ``state_dict``.

    Args:
        in_channels: C of the images, 1 or 3.
        image_size: height and width, or one number for both.
        nr_blocks: blocks, each with one attention.
        nr_resnet: gated residual layers of each block.
        nr_filters: channels.
        nr_logistic_mix: components of the mixture; None (images of one channel): a probability for each level instead.
        key_channels: of keys and queries.
        value_channels: of what is attended to; None: nr_filters / 2.
        num_heads: that divide both.
        levels, dropout, resnet_nonlinearity, num_classes, mode: as of `PixelCNNPlusPlus`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number out of its range, heads that do not divide the channels, several channels without a
            mixture.

    Example:
        >>> model = PixelSNAIL(1, 6, nr_blocks=1, nr_resnet=1, nr_filters=8, levels=2)
        >>> x = torch.rand(4, 1, 6, 6).round()
        >>> model.loss(x).backward()
        >>> model(x).shape, model.sample(2).shape
        (torch.Size([4, 1, 6, 6]), torch.Size([2, 1, 6, 6]))
    """

    background: Tensor

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        nr_blocks: int = 6,
        nr_resnet: int = 5,
        nr_filters: int = 256,
        nr_logistic_mix: int | None = 10,
        *,
        key_channels: int = 16,
        value_channels: int | None = None,
        num_heads: int = 1,
        levels: int = 256,
        dropout: float = 0.5,
        resnet_nonlinearity: str = "concat_elu",
        num_classes: int | None = None,
        mode: str = "exact",
    ) -> None:
        super().__init__(
            in_channels, image_size, levels, num_classes=num_classes, nr_logistic_mix=nr_logistic_mix, mode=mode
        )
        self._check_head()
        self.nr_blocks = self._check_size("nr_blocks", nr_blocks)
        self.nr_resnet = self._check_size("nr_resnet", nr_resnet)
        self.nr_filters = self._check_size("nr_filters", nr_filters)
        self.key_channels = self._check_size("key_channels", key_channels)
        values = max(1, self.nr_filters // 2) if value_channels is None else value_channels
        self.value_channels = self._check_size("value_channels", values)
        self.num_heads = self._check_size("num_heads", num_heads)
        if self.key_channels % self.num_heads or self.value_channels % self.num_heads:
            raise ValueError(
                f"PixelSNAIL: num_heads must divide the {self.key_channels} key_channels and the "
                f"{self.value_channels} value_channels, got {self.num_heads}"
            )
        self.dropout = self._check_dropout(dropout)
        self.resnet_nonlinearity = self._check_nonlinearity(resnet_nonlinearity)
        self.config = {
            "in_channels": self.in_channels,
            "image_size": list(self.image_size),
            "nr_blocks": self.nr_blocks,
            "nr_resnet": self.nr_resnet,
            "nr_filters": self.nr_filters,
            "nr_logistic_mix": self.nr_logistic_mix,
            "key_channels": self.key_channels,
            "value_channels": self.value_channels,
            "num_heads": self.num_heads,
            "levels": self.levels,
            "dropout": self.dropout,
            "resnet_nonlinearity": self.resnet_nonlinearity,
            "num_classes": self.num_classes,
            "mode": mode,
        }
        height, width = self.image_size
        rows = ((torch.arange(height) - height / 2) / height).view(1, -1, 1).expand(1, height, width)
        columns = ((torch.arange(width) - width / 2) / width).view(1, 1, -1).expand(1, height, width)
        # Not in the state_dict, as it follows from the size.
        self.register_buffer("background", torch.cat([rows, columns]), persistent=False)
        options = {
            "dropout": self.dropout,
            "nonlinearity": self.resnet_nonlinearity,
            "num_classes": self.num_classes,
        }
        self.start = Start(self.in_channels + 1, self.nr_filters)
        attention = self.key_channels, self.value_channels, self.num_heads
        self.blocks = torch.nn.ModuleList(
            [
                _Block(self.nr_filters, self.in_channels, *attention, self.nr_resnet, options)
                for _ in range(self.nr_blocks)
            ]
        )
        self.head = nn.NetworkInNetwork(self.nr_filters, self.outputs)

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        ul = self.start(with_ones(x))
        background = self.background.to(x.dtype).expand(x.size(0), -1, -1, -1)
        for block in self.blocks:
            ul = block(ul, x, background, labels)
        out: Tensor = self.head(F.elu(ul))
        return out

    def _build(self, program: PixelProgram, labels: Tensor | None) -> int:
        builder = Builder(program, labels, self.resnet_nonlinearity, self._like)
        ul = self.start.build(builder)
        background = self.background.to(self._like.dtype)
        for block in self.blocks:
            assert isinstance(block, _Block)
            ul = block.build(builder, ul, background)
        return builder.conv(self.head, builder.activate(ul, "elu"))
