"""Programs of samplers by chance: every instruction, at any offset, stride and size, conditioned or not."""

from __future__ import annotations

import random
from typing import Any

import torch
from genfuse.ops import PixelProgram
from torch import Tensor

SIDES = [1, 1, 2, 3, 4, 5, 6]


class Builder:
    """Draws a program; every weight that must not be seen is NaN.

    Where the channels of a pixel are drawn one after the other, channel c of a value belongs to group c % groups, and
    sees at the pixel itself no channel of the image from its own on.
    """

    def __init__(self, seed: int, batch: int, dtype: torch.dtype, head: str | None = None, sides: Any = SIDES) -> None:
        self.pick, self.batch, self.dtype = random.Random(seed), batch, dtype
        self.generator = torch.Generator().manual_seed(seed)
        pick = self.pick
        kind = head or pick.choice(["level_inner", "level_outer", "bernoulli", "mixture"])
        channels = pick.choice([1, 3] if kind == "mixture" else [1, 2, 3, 5])
        self.groups = channels if kind != "mixture" and pick.random() < 0.5 else 1
        height, width = pick.choice(sides), pick.choice(sides)
        self.program = PixelProgram(
            channels, height, width, self.groups, scale=pick.choice([1.0, 0.4]), shift=pick.choice([0.0, -1.0])
        )
        self.kind = kind

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def normal(self, *size: int, std: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=self.generator, dtype=torch.float64) * std
        values = values.to(self.dtype)
        if len(size) > 1 and self.pick.random() < 0.3:  # not contiguous
            values = values.transpose(0, -1).contiguous().transpose(0, -1)
        return values

    def of_batch(self, *size: int) -> Tensor:
        return self.normal(*((self.batch, *size) if self.pick.random() < 0.5 else size))

    def width(self) -> int:
        """Of a value: odd ones, around a vector's and, rarely, beyond a panel's."""
        pick = self.pick
        each = pick.choice([1, 2, 3, 4, 7, 8, 17]) if pick.random() < 0.95 else pick.choice([65, 130])
        return each * self.groups if self.groups > 1 else each

    # ---- values ------------------------------------------------------------------------------------------------------

    def value(self, factor: int | None = None, channels: int | None = None) -> int | None:
        """One of those so far, mostly a late one."""
        among = [
            index
            for index, (have, at, _) in enumerate(self.program.values)
            if (factor is None or at == factor) and (channels is None or have == channels)
        ]
        if not among:
            return None
        return self.pick.choice(among[-4:] if self.pick.random() < 0.7 else among)

    def group(self, x: int, own: bool) -> Tensor:
        """By channel; what depends on the pixel itself comes one group later."""
        return torch.arange(self.program.values[x][0]) % self.groups + int(own)

    def masked(self, weight: Tensor, x: int, centre: list[tuple[int, int]], group: Tensor | None = None) -> Tensor:
        if self.groups > 1:
            of_output = torch.arange(weight.size(0)) % self.groups if group is None else group
            hidden = self.group(x, self.program._own[x])[None, :] > of_output[:, None]
            for i, j in centre:
                weight[:, :, i, j] = weight[:, :, i, j].masked_fill(hidden, 0.0)
        return weight

    def conv(self, x: int, outputs: int | None = None, group: Tensor | None = None, plain: bool = False) -> int:
        pick, (inputs, factor, by_rows) = self.pick, self.program.values[x]
        outputs = outputs or self.width()
        stride = 2 if not plain and factor < 4 and pick.random() < 0.2 else 1
        step = pick.choice([1, 1, 2])
        rows, columns = pick.choice([1, 2, 3]), pick.choice([1, 2, 3, 4])
        oy = -step * (rows - 1) - pick.choice([0, 0, 0, 1])
        ox = -step * pick.randrange(columns + 1) + pick.choice([0, 0, 0, 1, -7])
        alone = self.program._own[x] and self.groups == 1
        live = torch.ones(rows, columns, dtype=torch.bool)
        centre = []
        for i in range(rows):
            for j in range(columns):
                dy, dx = oy + step * i, ox + step * j
                seen = dy < 0 or bool(by_rows) or dx < 0 or (dx == 0 and not alone)
                live[i, j] = seen and pick.random() < 0.9
                if dy == dx == 0 and not by_rows:
                    centre.append((i, j))
        weight = self.masked(self.normal(outputs, inputs, rows, columns, std=1.5 / inputs**0.5), x, centre, group)
        weight = torch.where(live, weight, torch.nan)
        add = self.value(factor * stride, outputs) if pick.random() < 0.4 and group is None else None
        return self.program.conv(
            x,
            weight,
            self.of_batch(outputs) if pick.random() < 0.7 else None,
            offset=(oy, ox),
            dilation=step,
            stride=stride,
            live=live,
            add=add,
            activation=None if group is not None else pick.choice([None, "relu", "elu", "tanh", "sigmoid"]),
        )

    def conv_transpose(self, x: int) -> int:
        pick, (inputs, factor, by_rows) = self.pick, self.program.values[x]
        outputs, rows, columns = self.width(), pick.choice([1, 2, 3]), pick.choice([1, 2, 3])
        oy, ox = pick.choice([0, 0, 1]), pick.choice([-1, 0, 1]) if by_rows else pick.choice([0, 0, 1])
        places = [(i, j) for i in range(rows) for j in range(columns)]
        centre = [(i, j) for i, j in places if (i + oy) // 2 == 0 and (j + ox) // 2 == 0 and not by_rows]
        weight = self.masked(self.normal(outputs, inputs, rows, columns, std=1.5 / inputs**0.5), x, centre)
        add = self.value(factor // 2, outputs) if pick.random() < 0.4 else None
        bias = self.of_batch(outputs) if pick.random() < 0.5 else None
        return self.program.conv_transpose(x, weight, bias, offset=(oy, ox), add=add)

    def instruction(self) -> None:
        pick, program = self.pick, self.program
        what = pick.choice(["conv", "conv", "conv", "transpose", "gate", "activation", "add", "attention", "constant"])
        x = self.value()
        if what == "gate":
            halves = [n for n, value in enumerate(program.values) if value[0] % (2 * self.groups) == 0]
            x = pick.choice(halves) if halves else x
        elif what == "transpose":
            small = [n for n, value in enumerate(program.values) if value[1] > 1]
            x = pick.choice(small) if small else x
        assert x is not None
        channels, factor, by_rows = program.values[x]
        if what == "constant":
            program.constant(self.of_batch(pick.choice([1, 2, 3]) * self.groups, program.height, program.width))
        elif what == "transpose" and factor > 1:
            self.conv_transpose(x)
        elif what == "gate" and channels % (2 * self.groups) == 0:
            residual = self.value(factor, channels // 2) if pick.random() < 0.5 else None
            condition = self.of_batch(channels) if pick.random() < 0.5 else None
            program.gate(x, activation=pick.choice(["tanh", "linear"]), condition=condition, residual=residual)
        elif what == "activation" and channels < 40:
            program.activation(x, pick.choice(["relu", "elu", "concat_elu", "tanh", "sigmoid"]))
        elif what == "add":
            other = self.value(factor, channels)
            assert other is not None
            program.add(x, other)
        elif what == "attention" and (self.groups == 1 or by_rows):
            key, value = self.value(factor, channels), self.value(factor)
            assert key is not None
            assert value is not None
            heads = pick.choice([h for h in (1, 2, 3, 4) if channels % h == 0 and program.values[value][0] % h == 0])
            program.attention(x, key, value, heads, strict=self.groups > 1 or pick.random() < 0.5)
        else:
            self.conv(x)

    def build(self, instructions: int) -> PixelProgram:
        pick, program = self.pick, self.program
        for _ in range(instructions):
            self.instruction()
        x = self.value(1)
        assert x is not None
        if self.kind == "mixture":
            components = pick.choice([1, 2, 3])
            head = self.conv(x, (10 if program.channels == 3 else 3) * components, torch.zeros(1), plain=True)
            layout = pick.choice(["openai", "pixel_models", "flax", "wavenet"] if program.channels == 1 else
                                 ["openai", "pixel_models", "flax"])  # fmt: skip
            program.mixture(head, components, layout=layout, bits=pick.choice([1, 3, 8]))
            return program
        levels = 1 if self.kind == "bernoulli" else pick.choice([1, 2, 3, 5, 8, 19])
        outputs = program.channels * levels
        of_output = torch.arange(outputs)
        of_output = of_output // levels if self.kind == "level_inner" else of_output % program.channels
        head = self.conv(x, outputs, of_output, plain=True)
        if self.kind == "bernoulli":
            program.bernoulli(head)
        else:
            program.categorical(head, levels, self.kind)
        return program


def any_program(seed: int, batch: int, dtype: torch.dtype = torch.float64, **options: Any) -> PixelProgram:
    """A program by chance."""
    builder = Builder(seed, batch, dtype, **options)
    return builder.build(builder.pick.randrange(1, 12))


def uniforms(program: PixelProgram, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    size = (batch, program.draws, program.height, program.width)
    return torch.rand(size, generator=generator, dtype=dtype)
