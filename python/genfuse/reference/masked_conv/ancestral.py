"""Ancestral sampling of images, pixel by pixel: the network as a list of instructions, and the loop that runs it.

A `PixelProgram` is what the samplers of the house run. It knows of every value whether a whole row of it follows from
the rows above (the vertical stack of a gated PixelCNN), which is what lets a sampler compute each activation once, and
it refuses a tap that looks into the future. Here the definition: after each draw everything is computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.reference import likelihood

__all__ = ["PixelProgram", "ancestral_sample"]

ACTIVATIONS = ("none", "relu", "elu", "tanh", "sigmoid", "concat_elu")
GATES = ("tanh", "linear")
HEADS = ("categorical", "categorical_outer", "bernoulli", "mixture")
LAYOUTS = ("openai", "pixel_models", "flax", "wavenet")
CONSTANT, CONV, GATE, ACTIVATION, ADD, ATTENTION = range(6)
# channels, height, width, channels drawn one after the other, head, levels, components, layout, head's value, values,
# instructions; then each value's channels, factor and whether it is known a row at a time; then each instruction's
# code, number of arguments and arguments, of which the first is the value it makes.
HEADER, VALUE = 11, 3
_FAR = 2**20  # farther than any tap of an image


def _index(name: str, value: object, least: int) -> int:
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"PixelProgram: {name} must be an int, got {type(value).__name__}")
    found: int = value.__index__()
    if found < least:
        raise ValueError(f"PixelProgram: {name} must be at least {least}, got {found}")
    return found


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if hasattr(value, "__index__") else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"PixelProgram: {name} must be an int or a pair, got {value!r}")
    return _index(name, pair[0], -_FAR), _index(name, pair[1], -_FAR)


def _choice(name: str, value: object, among: Sequence[str]) -> int:
    if value not in among:
        raise ValueError(f"PixelProgram: {name} must be one of {', '.join(among)}; got {value!r}")
    return among.index(value)


class PixelProgram:
    """A network over images as `ancestral_sample` runs it: each method adds an instruction and returns the value it
    makes, an int to be given to later ones. The last instruction is a head: `categorical`, `bernoulli` or `mixture`.

    A value has its channels at every position of the image, or of the image at half, a quarter... of its size after
    convolutions with stride 2. Taps look at what is drawn before a pixel only: rows above, and in the same row what
    lies to the left; of the pixel itself at values other than the image (at the image, too, if its channels are drawn
    one after the other, where the weights have to hide the channels to come).

    Args:
        channels, height, width: of the image.
        sub_pixels: 1 if the channels of a pixel are drawn together, `channels` if one after the other, each given those
            before it.
        scale, shift: the network sees ``level * scale + shift``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value; a tap looks into the future.

    Example:
        >>> program = PixelProgram(1, 4, 4)
        >>> weight = torch.tensor([[[[1.0]]], [[[-1.0]]]])
        >>> left = program.conv(program.image, weight, offset=(0, -1))  # the pixel to the left
        >>> program.categorical(left, levels=2)
        >>> program.values[left]  # channels, factor, whether it is known a row at a time
        [2, 1, 0]
    """

    def __init__(
        self, channels: int, height: int, width: int, sub_pixels: int = 1, *, scale: float = 1.0, shift: float = 0.0
    ) -> None:
        self.channels, self.height, self.width = (
            _index(name, size, 1) for name, size in (("channels", channels), ("height", height), ("width", width))
        )
        self.sub_pixels = _index("sub_pixels", sub_pixels, 1)
        if self.sub_pixels not in (1, self.channels):
            raise ValueError(f"PixelProgram: sub_pixels must be 1 or the {channels} channels, got {sub_pixels}")
        self.scale, self.shift, self.log_scale_min = float(scale), float(shift), -7.0
        self.values: list[list[int]] = [[self.channels, 1, 0]]
        # Whether a value depends at a pixel on that pixel itself, all of which is not known yet when it is drawn.
        self._own = [True]
        self.instructions: list[list[int]] = []
        self.tensors: list[Tensor] = []
        self.head: list[int] | None = None  # kind, levels, components, layout, value
        self.image = 0

    # ---- values ------------------------------------------------------------------------------------------------------

    def _known(self, name: str, value: object) -> list[int]:
        index = _index(name, value, 0)
        if index >= len(self.values):
            raise ValueError(f"PixelProgram: {name} must be one of the {len(self.values)} values so far, got {index}")
        return self.values[index]

    def _tensor(self, name: str, tensor: object, *shapes: tuple[int | str, ...]) -> int:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"PixelProgram: {name} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"PixelProgram: {name} must be floating, got {tensor.dtype}")
        for shape in shapes:
            if tensor.dim() == len(shape) and all(
                isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True)
            ):
                break
        else:
            wanted = " or ".join("[" + ", ".join(map(str, shape)) + "]" for shape in shapes)
            raise ValueError(f"PixelProgram: {name} must be {wanted}, got {list(tensor.shape)}")
        for other in self.tensors[:1]:
            if other.dtype != tensor.dtype or other.device != tensor.device:
                raise ValueError(
                    f"PixelProgram: {name} must be {other.dtype} on {other.device} like the first tensor, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
        self.tensors.append(tensor.detach())
        return len(self.tensors) - 1

    def size(self, value: int) -> tuple[int, int]:
        """Height and width of a value."""
        factor = self._known("value", value)[1]
        return -(-self.height // factor), -(-self.width // factor)

    def _add(
        self, code: int, channels: int, factor: int, by_rows: bool, *arguments: int, like: Sequence[int | None] = ()
    ) -> int:
        if self.head is not None:
            raise ValueError("PixelProgram: nothing can follow the head")
        self.values.append([channels, factor, int(by_rows)])
        self._own.append(any(self._own[value] for value in like if value is not None))
        made = len(self.values) - 1
        self.instructions.append([code, 1 + len(arguments), made, *arguments])
        return made

    def _like(self, name: str, value: int, channels: int, factor: int) -> list[int]:
        known = self._known(name, value)
        if known[:2] != [channels, factor]:
            raise ValueError(
                f"PixelProgram: {name} must have {channels} channels at 1/{factor} of the image's size, "
                f"got {known[0]} at 1/{known[1]}"
            )
        return known

    # ---- instructions ------------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> int:
        """What is known of every position beforehand, ``[C, H, W]`` or ``[B, C, H, W]``: coordinates, conditioning."""
        size = (self.height, self.width)
        index = self._tensor("tensor", tensor, ("C", *size), ("B", "C", *size))
        return self._add(CONSTANT, tensor.size(-3), 1, True, index)

    def conv(
        self,
        x: int,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        offset: int | Sequence[int] = (0, 0),
        dilation: int = 1,
        stride: int = 1,
        live: Tensor | None = None,
        add: int | None = None,
        activation: str | None = None,
    ) -> int:
        """``out[o, y, x] = act(bias[o] + sum weight[o, c, i, j] in[c, stride y + oy + dilation i, ...] + add)``, where
        what lies outside is 0. (A convolution of a concatenation is one of a part with `add` that of the others.)

        Args:
            x: value of I channels.
            weight: ``[O, I, kh, kw]``, masked already.
            bias: ``[O]``, or ``[B, O]``.
            offset: (oy, ox), what the first tap looks at from position (0, 0).
            dilation: distance of neighbouring taps.
            stride: 1, or 2 for a value of half the size.
            live: bool ``[kh, kw]``, the taps that there are; all otherwise.
            add: value of what comes out.
            activation: "relu", "elu", "tanh" or "sigmoid".
        """
        channels, factor, _ = self._known("x", x)
        stride = _index("stride", stride, 1)
        if stride > 2:
            raise ValueError(f"PixelProgram: stride must be 1 or 2, got {stride}")
        step = _index("dilation", dilation, 1)
        oy, ox = _pair("offset", offset)
        places = self._places(weight, channels, live)
        taps = [(oy + step * i, ox + step * j) for i, j in places]
        return self._conv(
            x, weight, bias, factor * stride, taps, places, (oy, ox, step, stride), 0, add, activation or "none"
        )

    def conv_transpose(
        self,
        x: int,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        offset: int | Sequence[int] = (0, 0),
        add: int | None = None,
    ) -> int:
        """The transposed convolution of stride 2, for a value of twice the size:
        ``out[o, 2 y + i + oy, 2 x + j + ox] += weight[o, c, i, j] in[c, y, x]``.
        (torch's weights are ``[I, O, kh, kw]``.)
        """
        channels, factor, _ = self._known("x", x)
        if factor % 2 != 0:
            raise ValueError("PixelProgram: x is of the image's size, conv_transpose wants one made with stride 2")
        oy, ox = _pair("offset", offset)
        places = self._places(weight, channels, None)
        # A tap looks at row (y - i - oy) / 2: how far above y // 2, the row that contains y?
        taps = [(-((i + oy) // 2), -((j + ox) // 2)) for i, j in places]
        return self._conv(x, weight, bias, factor // 2, taps, places, (oy, ox, 1, 2), 1, add, "none")

    def _places(self, weight: object, channels: int, live: Tensor | None) -> list[tuple[int, int]]:
        if not isinstance(weight, Tensor):
            raise TypeError(f"PixelProgram: weight must be a Tensor, got {type(weight).__name__}")
        if weight.dim() != 4 or weight.size(1) != channels:
            raise ValueError(f"PixelProgram: weight must be [O, {channels}, kh, kw], got {list(weight.shape)}")
        rows, columns = weight.shape[2:]
        if live is None:
            return [(i, j) for i in range(rows) for j in range(columns)]
        if not isinstance(live, Tensor):
            raise TypeError(f"PixelProgram: live must be a Tensor, got {type(live).__name__}")
        if live.dtype != torch.bool or live.shape != weight.shape[2:]:
            raise ValueError(
                f"PixelProgram: live must be bool [{rows}, {columns}], got {live.dtype} {list(live.shape)}"
            )
        return [(i, j) for i, row in enumerate(live.tolist()) for j, alive in enumerate(row) if alive]

    def _conv(
        self,
        x: int,
        weight: Tensor,
        bias: Tensor | None,
        factor: int,
        taps: list[tuple[int, int]],
        places: list[tuple[int, int]],
        geometry: tuple[int, int, int, int],
        transposed: int,
        add: int | None,
        activation: str,
    ) -> int:
        by_rows, outputs = self.values[x][2], weight.size(0)
        in_past = self._own[x] and self.sub_pixels == 1  # the pixel itself is not known yet
        for dy, dx in taps:
            if dy > 0 or (dy == 0 and not by_rows and (dx > 0 or (dx == 0 and in_past))):
                raise ValueError(
                    f"PixelProgram: a tap looks into the future, {dy} rows down and {dx} columns to the right"
                )
        kind = _choice("activation", activation, ACTIVATIONS[:5])
        whole = bool(by_rows) or all(dy < 0 for dy, _ in taps)
        if add is not None:
            known = self._like("add", add, outputs, factor)
            whole = whole and bool(known[2])
        index = self._tensor("weight", weight, tuple(weight.shape))
        of_bias = -1 if bias is None else self._tensor("bias", bias, (outputs,), ("B", outputs))
        given = -1 if add is None else int(add)
        flat = [place for pair in places for place in pair]
        numbers = (x, given, index, of_bias, kind, transposed, *geometry, len(places), *flat)
        return self._add(CONV, outputs, factor, whole, *numbers, like=[add])

    def gate(
        self, x: int, *, activation: str = "tanh", condition: Tensor | None = None, residual: int | None = None
    ) -> int:
        """``act(a) sigmoid(b) + residual`` of the halves a and b of ``x + condition``, tanh or (``"linear"``) a itself;
        condition: ``[2C]`` or ``[B, 2C]``.
        """
        channels, factor, by_rows = self._known("x", x)
        if channels % 2 != 0:
            raise ValueError(f"PixelProgram: x must have an even number of channels, got {channels}")
        kind = _choice("activation", activation, GATES)
        if residual is not None:
            known = self._like("residual", residual, channels // 2, factor)
            by_rows = by_rows and known[2]
        index = -1 if condition is None else self._tensor("condition", condition, (channels,), ("B", channels))
        given = -1 if residual is None else int(residual)
        return self._add(GATE, channels // 2, factor, bool(by_rows), x, given, index, kind, like=[x, residual])

    def activation(self, x: int, kind: str) -> int:
        """relu, elu, tanh, sigmoid, or concat_elu, which has twice the channels."""
        channels, factor, by_rows = self._known("x", x)
        code = _choice("kind", kind, ACTIVATIONS)
        outputs = 2 * channels if kind == "concat_elu" else channels
        return self._add(ACTIVATION, outputs, factor, bool(by_rows), x, code, like=[x])

    def add(self, a: int, b: int) -> int:
        """a + b."""
        channels, factor, by_rows = self._known("a", a)
        other = self._like("b", b, channels, factor)
        return self._add(ADD, channels, factor, bool(by_rows and other[2]), a, b, like=[a, b])

    def attention(self, q: int, k: int, v: int, heads: int = 1, *, strict: bool = True) -> int:
        """Scaled dot-product attention of every position to those before it in raster order and, unless `strict`, to
        itself; 0 where there is nothing to attend to. q and k have as many channels, heads divide them and v's.
        """
        channels, factor, _ = self._known("q", q)
        self._like("k", k, channels, factor)
        outputs = self._known("v", v)[0]
        self._like("v", v, outputs, factor)
        heads = _index("heads", heads, 1)
        if channels % heads != 0 or outputs % heads != 0:
            raise ValueError(f"PixelProgram: {heads} heads must divide the {channels} and {outputs} channels")
        like = [q] if strict else [q, k, v]
        return self._add(ATTENTION, outputs, factor, False, q, k, v, heads, int(strict), like=like)

    # ---- heads -------------------------------------------------------------------------------------------------------

    def _finish(self, kind: int, x: int, wanted: int, levels: int, components: int = 0, layout: int = 0) -> None:
        if self.head is not None:
            raise ValueError("PixelProgram: there is a head already")
        self._like("x", x, wanted, 1)
        if x == self.image:
            raise ValueError("PixelProgram: the head must be made of a value of the network, not of the image")
        if self._own[x]:
            raise ValueError("PixelProgram: the head depends on the pixel that it is to draw")
        self.head = [kind, levels, components, layout, int(x)]

    def categorical(self, x: int, levels: int, order: str = "level_inner") -> None:
        """Logits of `levels` values for each channel, in x's channel ``c levels + l`` or (``"level_outer"``)
        ``l C + c``.
        """
        levels = _index("levels", levels, 1)
        kind = _choice("order", order, ("level_inner", "level_outer"))
        self._finish(kind, x, self.channels * levels, levels)

    def bernoulli(self, x: int) -> None:
        """One logit for each channel: of level 1 against level 0."""
        self._finish(2, x, self.channels, 2)

    def mixture(
        self, x: int, components: int, *, layout: str = "openai", bits: int = 8, log_scale_min: float = -7.0
    ) -> None:
        """Parameters of a discretized mixture of logistics, as `discretized_logistic_mixture_sample` takes them."""
        components, bits = _index("components", components, 1), _index("bits", bits, 1)
        if bits > 16:
            raise ValueError(f"PixelProgram: bits must be at most 16, got {bits}")
        if self.channels not in (1, 3):
            raise ValueError(f"PixelProgram: a mixture has 1 or 3 channels, the image {self.channels}")
        if self.sub_pixels != 1 and self.channels > 1:
            raise ValueError("PixelProgram: a mixture draws the channels of a pixel together; sub_pixels must be 1")
        each = 10 if self.channels == 3 else 3
        self.log_scale_min = float(log_scale_min)
        self._finish(3, x, each * components, 1 << bits, components, _choice("layout", layout, LAYOUTS))

    @property
    def draws(self) -> int:
        """How many uniforms a pixel takes."""
        return self.channels + int(self.head is not None and self.head[0] == 3)

    # ---- as numbers --------------------------------------------------------------------------------------------------

    def encode(self) -> tuple[list[int], list[float]]:
        """The program as integers, and its constants, as the operator takes them."""
        if self.head is None:
            raise ValueError("PixelProgram: the program has no head")
        sizes = [self.channels, self.height, self.width, self.sub_pixels]
        numbers = [*sizes, *self.head, len(self.values), len(self.instructions)]
        for part in (*self.values, *self.instructions):
            numbers += part
        return numbers, [self.scale, self.shift, self.log_scale_min]


# ---- the definition --------------------------------------------------------------------------------------------------


def batched(instruction: Sequence[int]) -> list[int]:
    """Which tensors of an instruction may be one for each image."""
    code, _, _, *arguments = instruction
    place = {CONSTANT: 0, CONV: 3, GATE: 2}.get(code)
    return [] if place is None or arguments[place] < 0 else [arguments[place]]


def _activate(x: Tensor, kind: int) -> Tensor:
    name = ACTIVATIONS[kind]
    if name == "relu":
        return torch.relu(x)
    if name == "elu":
        return F.elu(x)
    if name == "tanh":
        return torch.tanh(x)
    if name == "sigmoid":
        return torch.sigmoid(x)
    return F.elu(torch.cat([x, -x], 1)) if name == "concat_elu" else x


def _of_batch(tensor: Tensor) -> Tensor:
    """A vector [C] or [B, C] as it broadcasts with images."""
    return tensor.reshape(*(tensor.shape if tensor.dim() == 2 else (1, -1)), 1, 1)


def _window(x: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Rows and columns from (top, left) on, which may lie outside, where all is 0."""
    below, right = top + height - x.size(2), left + width - x.size(3)
    padded = F.pad(x, (max(0, -left), max(0, right), max(0, -top), max(0, below)))
    return padded[:, :, max(0, top) :, max(0, left) :][:, :, :height, :width]


def _convolve(x: Tensor, weight: Tensor, arguments: Sequence[int], size: tuple[int, int]) -> Tensor:
    transposed, oy, ox, step, stride, count, *flat = arguments
    masked = torch.zeros_like(weight)
    for i, j in zip(flat[: 2 * count : 2], flat[1 : 2 * count : 2], strict=True):
        masked[:, :, i, j] = weight[:, :, i, j]
    (height, width), (rows, columns) = size, weight.shape[2:]
    if transposed:
        return _window(F.conv_transpose2d(x, masked.transpose(0, 1), stride=2), -oy, -ox, height, width)
    seen = (stride * (size - 1) + step * (taps - 1) + 1 for size, taps in ((height, rows), (width, columns)))
    return F.conv2d(_window(x, oy, ox, *seen), masked, stride=stride, dilation=step)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, strict: int) -> Tensor:
    batch, _, height, width = q.shape
    q, k, v = (part.reshape(batch, heads, part.size(1) // heads, height * width).transpose(2, 3) for part in (q, k, v))
    seen = torch.ones(height * width, height * width, dtype=torch.bool, device=q.device).tril(-1 if strict else 0)
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.size(-1))).masked_fill(~seen, -math.inf)
    shares = torch.softmax(scores, -1).masked_fill(~seen, 0.0)  # a row that sees nothing is NaN before
    return (shares @ v).transpose(2, 3).reshape(batch, heads * v.size(3), height, width)


def evaluate(program: Sequence[int], tensors: Sequence[Tensor], image: Tensor) -> Tensor:
    """The head's parameters ``[B, P, H, W]`` of whole images as the network sees them."""
    _, height, width, *_ = program[:HEADER]
    head, values, instructions = program[8:HEADER]
    factors = [program[HEADER + VALUE * value + 1] for value in range(values)]
    known: list[Tensor] = [image]
    at = HEADER + VALUE * values
    for _ in range(instructions):
        code, count = program[at : at + 2]
        made, *arguments = program[at + 2 : at + 2 + count]
        at += 2 + count
        if code == CONSTANT:
            tensor = tensors[arguments[0]]
            known.append(tensor.expand(image.size(0), *tensor.shape[-3:]))
        elif code == CONV:
            x, add, weight, bias, kind, *rest = arguments
            size = (-(-height // factors[made]), -(-width // factors[made]))
            out = _convolve(known[x], tensors[weight], rest, size)
            if bias >= 0:
                out = out + _of_batch(tensors[bias])
            known.append(_activate(out if add < 0 else out + known[add], kind))
        elif code == GATE:
            x, residual, condition, kind = arguments
            both = known[x] if condition < 0 else known[x] + _of_batch(tensors[condition])
            a, b = both.chunk(2, 1)
            out = (torch.tanh(a) if kind == 0 else a) * torch.sigmoid(b)
            known.append(out if residual < 0 else out + known[residual])
        elif code == ACTIVATION:
            known.append(_activate(known[arguments[0]], arguments[1]))
        elif code == ADD:
            known.append(known[arguments[0]] + known[arguments[1]])
        else:
            q, k, v, heads, strict = arguments
            known.append(_attend(known[q], known[k], known[v], heads, strict))
    return known[head]


def _draw(program: Sequence[int], constants: Sequence[float], head: Tensor, u: Tensor, channel: int | None) -> Tensor:
    """Levels ``[B, C]`` of a pixel, or ``[B, 1]`` of one of its channels, from the head's parameters ``[B, P]`` and
    uniforms ``[B, draws]``; -1 where they are no distribution.
    """
    channels, (kind, levels, components, layout) = program[0], program[4:8]
    if kind == 3:
        del components
        x = likelihood.discretized_logistic_mixture_sample(
            head.unsqueeze(2),
            u.to(head.dtype).unsqueeze(2),
            None,
            channels=channels,
            bits=levels.bit_length() - 1,
            layout=LAYOUTS[layout],
            log_scale_min=constants[2],
            temperature=1.0,
            snap=True,
        )[0].squeeze(2)
        found = torch.round((x + 1.0) * (0.5 * (levels - 1)))
        return torch.where(found.isfinite(), found, -1.0).to(torch.int64)
    which = slice(None) if channel is None else slice(channel, channel + 1)
    if kind == 2:
        logits = head[:, which]
        return torch.where(logits.isnan(), -1, (u[:, which] < torch.sigmoid(logits)).to(torch.int64))
    batch = head.size(0)
    logits = head.view(batch, channels, levels) if kind == 0 else head.view(batch, levels, channels).transpose(1, 2)
    logits = logits[:, which].to(torch.float64)
    cumulated = torch.exp(logits - logits.amax(-1, keepdim=True)).cumsum(-1)
    threshold = u[:, which, None].to(torch.float64) * cumulated[..., -1:]
    found = torch.searchsorted(cumulated, threshold.contiguous(), right=True)[..., 0]
    return torch.where(cumulated[..., -1].isfinite() & (found < levels), found, -1)


def ancestral_sample(
    tensors: Sequence[Tensor],
    u: Tensor,
    given: Tensor | None,
    program: Sequence[int],
    constants: Sequence[float],
    record: bool,
) -> tuple[Tensor, Tensor]:
    """Images drawn pixel by pixel in raster order, and what the heads said of each pixel when it was drawn.

    Example:
        >>> program = PixelProgram(1, 1, 2)
        >>> weight = torch.tensor([[[[8.0]]], [[[-8.0]]]])  # what the left pixel is the right one is not
        >>> bias = torch.tensor([-4.0, 4.0])
        >>> program.categorical(program.conv(program.image, weight, bias, offset=(0, -1)), levels=2)
        >>> ancestral_sample(program.tensors, torch.full((1, 1, 1, 2), 0.5), None, *program.encode(), False)[0]
        tensor([[[[1, 0]]]])
    """
    channels, height, width, sub_pixels = program[:4]
    batch, scale, shift = u.size(0), constants[0], constants[1]
    dtype = tensors[0].dtype if tensors[0].dtype == torch.float64 else torch.float32
    tensors = [tensor.to(dtype) for tensor in tensors]
    levels = torch.zeros(batch, channels, height, width, dtype=torch.int64, device=u.device)
    image = torch.zeros(levels.shape, dtype=dtype, device=u.device)
    recorded: list[Tensor] = []
    for y in range(height):
        for x in range(width):
            for channel in [None] if sub_pixels == 1 else list(range(channels)):
                head = evaluate(program, tensors, image)[:, :, y, x]
                which = slice(None) if channel is None else slice(channel, channel + 1)
                drawn = _draw(program, constants, head, u[:, :, y, x], channel)
                if given is not None:
                    drawn = torch.where(given[:, which, y, x] >= 0, given[:, which, y, x], drawn)
                levels[:, which, y, x] = drawn
                image[:, which, y, x] = drawn.to(dtype) * scale + shift
            recorded.append(head)  # of the last channel, when all that precedes it is known
    outputs = torch.stack(recorded, -1).view(*head.shape, height, width) if record else image.new_empty(0)
    return levels, outputs
