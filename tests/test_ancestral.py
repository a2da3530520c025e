"""The sampler of images: the pixels of the naive loop, whatever the program, and an error for whatever is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import genfuse
import pytest
import torch
from ancestral_cases import Builder, any_program, uniforms
from genfuse import ops
from genfuse.ops import PixelProgram
from genfuse.ops.masked_conv.ancestral import run
from genfuse.reference.masked_conv import ancestral as reference
from tolerances import assert_as_accurate, nudged
from torch import Tensor
from torch import library as registry

OP = "ancestral_sample"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def both(program: PixelProgram, batch: int, u: Tensor, given: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Levels and the head's parameters, by the kernel and by the naive loop."""
    found = [run(OP, program, batch, u, None, given, record=True)]
    with genfuse.use_backend("reference"):
        found.append(run(OP, program, batch, u, None, given, record=True))
    return found


def some_given(pick: random.Random, program: PixelProgram, batch: int) -> Tensor:
    """Levels, about half of them to be drawn."""
    assert program.head is not None
    levels, size = program.head[1], (batch, program.channels, program.height, program.width)
    generator = torch.Generator().manual_seed(pick.randrange(1000))
    return torch.randint(-levels, levels, size, generator=generator)


def agree(program: PixelProgram, batch: int, seed: int, given: Tensor | None = None) -> None:
    (levels, outputs), (expected, exact) = both(program, batch, uniforms(program, batch, seed), given)
    assert torch.equal(levels, expected)
    torch.testing.assert_close(outputs, exact, rtol=1e-9, atol=1e-9)
    if given is not None:
        assert torch.equal(levels[given >= 0], given[given >= 0])


# ---- the pixels of the naive loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(6))
def test_any_program(block: int) -> None:
    """Every instruction, head, size, stride and conditioning, of one image and of more than are drawn together."""
    for seed in range(12 * block, 12 * (block + 1)):
        pick = random.Random(-seed)
        batch = pick.choice([1, 1, 2, 3, 13])
        program = any_program(seed, batch)
        agree(program, batch, seed, some_given(pick, program, batch) if pick.random() < 0.4 else None)


@pytest.mark.parametrize("head", ["level_inner", "level_outer", "bernoulli", "mixture"])
@pytest.mark.parametrize("sides", [(1,), (1, 7), (8, 9)], ids=str)
def test_heads_and_sizes(head: str, sides: tuple[int, ...]) -> None:
    for seed in range(2):
        builder = Builder(700 + seed, 2, torch.float64, head=head, sides=sides)
        agree(builder.build(4), 2, seed)


def test_every_kind_of_instruction_was_there() -> None:
    """In the programs of `test_any_program`: also each at a fraction of the size, transposed and by rows."""
    seen = set()
    for seed in range(72):
        program = any_program(seed, 1)
        seen |= {("head", program.head[0]), ("sub_pixels", program.sub_pixels > 1)} if program.head else set()
        for code, _, made, *arguments in program.instructions:
            _, factor, by_rows = program.values[made]
            seen |= {(code, "small", factor > 1), (code, "by rows", by_rows)}
            if code == reference.CONV:
                seen |= {("transposed", arguments[5]), ("stride", arguments[9]), ("dilation", arguments[8])}
                seen |= {("added", arguments[1] >= 0), ("activation", arguments[4])}
            elif code == reference.GATE:
                seen |= {("residual", arguments[1] >= 0), ("condition", arguments[2] >= 0), ("gate", arguments[3])}
            elif code == reference.ATTENTION:
                seen |= {("heads", arguments[3] > 1), ("strict", arguments[4])}
    wanted = {("head", kind) for kind in range(4)} | {("sub_pixels", True), ("sub_pixels", False)}
    for code in (reference.CONV, reference.GATE, reference.ACTIVATION, reference.ADD):
        wanted |= {(code, "small", True), (code, "by rows", 0), (code, "by rows", 1)}
    wanted |= {(name, n) for name in ("transposed", "gate", "strict") for n in (0, 1)}
    wanted |= {(name, n) for name in ("stride", "dilation") for n in (1, 2)}
    wanted |= {(name, n) for name in ("added", "residual", "condition", "heads") for n in (True, False)}
    wanted |= {("activation", kind) for kind in range(5)} | {(reference.CONSTANT, "by rows", 1)}
    assert wanted <= seen, wanted - seen


@pytest.mark.parametrize("sub_pixels", [1, 3])
@pytest.mark.parametrize("kind", ["activation", "add", "gate", "conv", "attention"])
def test_what_is_made_of_the_image_at_once(kind: str, sub_pixels: int) -> None:
    """A value of the pixel itself is not known before that is drawn, but must be when its neighbour is."""
    channels = 3 if sub_pixels == 3 else 2
    program = PixelProgram(channels, 4, 5, sub_pixels, scale=0.5, shift=-0.3)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    image = program.image
    if kind == "activation":
        x = program.activation(image, "concat_elu")
    elif kind == "add":
        x = program.add(image, program.constant(normal(channels, 4, 5)))
    elif kind == "gate":
        x = program.gate(program.activation(image, "concat_elu"), residual=image)
    elif kind == "conv":
        x = program.conv(image, normal(channels, channels, 1, 2), offset=(0, -2), add=image)
    else:
        x = program.attention(image, image, image, strict=True)
    inputs = program.values[x][0]
    h = program.conv(x, normal(4, inputs, 2, 1), offset=(-1, -1), activation="tanh")
    program.categorical(program.conv(h, normal(3 * channels, 4, 1, 1)), 3)
    agree(program, 2, 0)


def test_taps_that_are_not_live_do_not_exist() -> None:
    """A NaN there changes nothing."""
    live = torch.tensor([[True, False, True], [True, False, False]])
    weight = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    found = []
    for hidden in (0.0, torch.nan):
        program = PixelProgram(1, 4, 4)
        x = program.conv(program.image, torch.where(live, weight, hidden), offset=(-1, -1), live=live)
        program.categorical(x, 4)
        found.append(ops.ancestral_sample(program, 3, u=uniforms(program, 3)))
    assert torch.equal(*found)


def test_given_images_are_kept_and_seen() -> None:
    builder = Builder(3, 4, torch.float64, head="level_inner", sides=(5,))
    program = builder.build(5)
    assert program.head is not None
    size = (4, program.channels, 5, 5)
    everything = torch.randint(program.head[1], size)
    assert torch.equal(ops.ancestral_sample(program, 4, u=uniforms(program, 4), given=everything), everything)
    whole = torch.full(size, -1)
    expected = ops.ancestral_sample(program, 4, u=uniforms(program, 4))
    assert torch.equal(ops.ancestral_sample(program, 4, u=uniforms(program, 4), given=whole), expected)
    upper = torch.where(torch.arange(5)[:, None] < 2, everything, -7)  # any number below 0
    agree(program, 4, 0, upper)
    assert torch.equal(  # strided
        ops.ancestral_sample(
            program, 4, u=uniforms(program, 4), given=upper.transpose(2, 3).contiguous().transpose(2, 3)
        ),
        ops.ancestral_sample(program, 4, u=uniforms(program, 4), given=upper),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_at_every_dtype(dtype: torch.dtype) -> None:
    """Of given images, where no rounding can change a pixel: about as near to the exact ones as eager PyTorch's."""
    for seed in range(6):
        program = any_program(seed, 3, dtype)
        assert program.head is not None
        size = (3, program.channels, program.height, program.width)
        given = torch.randint(program.head[1], size, generator=torch.Generator().manual_seed(seed))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        u = uniforms(program, 3, seed, wide)
        tensors, (numbers, constants) = program.tensors, program.encode()

        def naive(tensors: list[Tensor], u: Tensor, given: Tensor = given, rest: Any = (numbers, constants)) -> Tensor:
            return reference.ancestral_sample(tensors, u, given, *rest, True)[1]

        outputs = run(OP, program, 3, u, None, given, record=True)[1]
        exact = naive([tensor.double() for tensor in tensors], u.double())
        eager = [naive([nudged(tensor, k) for tensor in tensors], u) for k in range(3)]
        assert_as_accurate(outputs, eager, exact, f"outputs of program {seed}")


# ---- the machine makes no difference ---------------------------------------------------------------------------------


def test_threads_make_no_difference() -> None:
    for seed in (2, 11, 30):
        program = any_program(seed, 29, torch.float32)
        u = uniforms(program, 29, seed, torch.float32)
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(run(OP, program, 29, u, None, None, record=True))
        for levels, outputs in found[1:]:
            assert torch.equal(levels, found[0][0])
            assert torch.equal(outputs, found[0][1])


def test_images_are_independent_of_their_neighbours() -> None:
    """An image comes out the same alone and among others, in the place of any."""
    program = PixelProgram(1, 4, 5)
    torch.manual_seed(0)
    h = program.conv(program.image, torch.randn(7, 1, 3, 3), torch.randn(7), offset=(-3, -1), activation="elu")
    h = program.conv(program.image, torch.randn(7, 1, 1, 2), offset=(0, -2), add=h, activation="tanh")
    program.categorical(program.conv(h, torch.randn(6, 7, 1, 1)), 6)
    u = uniforms(program, 27, 0, torch.float32)
    together = ops.ancestral_sample(program, 27, u=u)
    for index in (0, 11, 12, 26):
        assert torch.equal(ops.ancestral_sample(program, 1, u=u[index : index + 1]), together[index : index + 1])


def test_random_numbers() -> None:
    """By torch's generator, or by one's own; those of the stream that the generator names."""
    program = any_program(8, 2)
    torch.manual_seed(3)
    first = ops.ancestral_sample(program, 2)
    second = ops.ancestral_sample(program, 2)
    torch.manual_seed(3)
    assert torch.equal(ops.ancestral_sample(program, 2), first)
    assert torch.equal(ops.ancestral_sample(program, 2), second)
    own = [ops.ancestral_sample(program, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*own)
    with genfuse.use_backend("reference"):
        naive = ops.ancestral_sample(program, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(naive, own[0])


def test_frequencies() -> None:
    """Two pixels, the second of which is given by the first: each of nine images as often as the network says."""
    program = PixelProgram(1, 1, 2, scale=1.0)
    weight, bias = torch.tensor([[0.8], [-0.5], [0.1]]).view(3, 1, 1, 1), torch.tensor([0.2, 0.5, -0.4])
    program.categorical(program.conv(program.image, weight, bias, offset=(0, -1)), 3)
    count = 20_000
    levels = ops.ancestral_sample(program, count, generator=torch.Generator().manual_seed(0)).view(count, 2)
    first = torch.softmax(bias.double(), 0)
    second = torch.softmax(bias.double() + weight.double().view(1, 3) * torch.arange(3.0)[:, None], 1)
    expected = (first[:, None] * second).flatten()
    seen = torch.bincount(3 * levels[:, 0] + levels[:, 1], minlength=9) / count
    assert bool(((seen - expected).abs() < 5.0 * (expected * (1 - expected) / count).sqrt()).all())


# ---- nothing, and no numbers -----------------------------------------------------------------------------------------


def test_no_images() -> None:
    for seed in range(10):
        program = any_program(seed, 0)
        levels, outputs = run(OP, program, 0, None, None, None, record=True)
        assert levels.shape == (0, program.channels, program.height, program.width)
        assert outputs.shape[0] == 0
        with genfuse.use_backend("reference"):
            assert ops.ancestral_sample(program, 0).shape == levels.shape


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_distribution_is_an_error_and_never_a_crash(value: float) -> None:
    """One bad number in a tensor, or all of one: an error that says so, or levels that there are."""
    raised = 0
    for seed in range(40):
        pick = random.Random(seed)
        program = any_program(seed, 2, pick.choice([torch.float32, torch.float64]))
        assert program.head is not None
        spoilt = pick.randrange(len(program.tensors))
        tensor = program.tensors[spoilt].clone()
        if pick.random() < 0.5:
            tensor[tuple(pick.randrange(n) for n in tensor.shape)] = value
        else:
            tensor.fill_(value)
        program.tensors[spoilt] = tensor
        arguments = (program.tensors, uniforms(program, 2, seed), None, *program.encode(), False)
        levels = torch.ops.genfuse.ancestral_sample(*arguments)[0]
        assert bool(((levels >= -1) & (levels < program.head[1])).all())
        if bool((levels < 0).any()):
            with pytest.raises(RuntimeError, match="no distribution"):
                ops.ancestral_sample(program, 2, u=uniforms(program, 2, seed))
            raised += 1
    assert raised >= 3


def test_where_there_is_no_distribution_the_operator_says_minus_one() -> None:
    """For that pixel, as the definition does; and what is given is kept."""
    program = PixelProgram(1, 2, 2)
    bias = torch.zeros(3, 3)  # one of the three images is spoilt
    bias[1, 0] = torch.nan
    program.categorical(program.conv(program.image, torch.zeros(3, 1, 1, 1), bias, offset=(-1, 0)), 3)
    u = torch.full((3, 1, 2, 2), 0.5)
    with pytest.raises(RuntimeError, match="ancestral_sample: the network gives no distribution"):
        ops.ancestral_sample(program, 3, u=u)
    arguments = (program.tensors, u, None, *program.encode(), False)
    found = [function(*arguments)[0] for function in (torch.ops.genfuse.ancestral_sample, reference.ancestral_sample)]
    assert torch.equal(*found)
    assert bool((found[0][1] == -1).all())
    assert bool((found[0][[0, 2]] == 1).all())
    given = torch.full((3, 1, 2, 2), -1)
    given[1] = 2
    assert bool((ops.ancestral_sample(program, 3, u=u, given=given)[1] == 2).all())


def test_levels_without_probability_are_not_drawn() -> None:
    """Also not by the first uniform of all, nor the last."""
    program = PixelProgram(1, 1, 1)
    bias = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    program.categorical(program.conv(program.image, torch.zeros(4, 1, 1, 1), bias, offset=(-1, 0)), 4)
    for u, level in ((0.0, 1), (1.0 - 2.0**-24, 2)):
        assert int(ops.ancestral_sample(program, 1, u=torch.full((1, 1, 1, 1), u))) == level
    wide = torch.full((1, 1, 1, 1), 1.0 - 2.0**-53, dtype=torch.float64)  # rounded, this is 1
    assert int(ops.ancestral_sample(program, 1, u=wide)) == 2


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def image(sub_pixels: int = 1) -> PixelProgram:
    return PixelProgram(2, 4, 6, sub_pixels)


def grown() -> PixelProgram:
    """Value 1: 4 channels by pixels; 2: 4 channels by rows; 3: 4 at half the size."""
    program = image()
    program.conv(0, torch.zeros(4, 2, 1, 1), offset=(0, -1))
    program.conv(0, torch.zeros(4, 2, 1, 1), offset=(-1, 0))
    program.conv(1, torch.zeros(4, 4, 1, 1), stride=2)
    return program


def finished() -> PixelProgram:
    program = grown()
    program.categorical(1, 2)
    return program


W = torch.zeros(4, 2, 1, 1)
V = torch.zeros(4, 4, 1, 1)


def _odd_gate() -> None:
    program = grown()
    program.gate(program.conv(1, torch.zeros(5, 4, 1, 1)))


def _head_of_the_image() -> None:
    program = image()
    program.bernoulli(program.activation(program.image, "elu"))


def _own_pixel() -> None:
    program = image()
    program.conv(program.activation(program.image, "elu"), W)


WRONG_PROGRAMS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "channels must be an int, got float", lambda: PixelProgram(1.0, 2, 2)),  # type: ignore[arg-type]
    (ValueError, "height must be at least 1, got 0", lambda: PixelProgram(1, 0, 2)),
    (ValueError, "sub_pixels must be 1 or the 3 channels, got 2", lambda: PixelProgram(3, 2, 2, 2)),
    (ValueError, "x must be one of the 1 values so far, got 1", lambda: image().conv(1, W)),
    (TypeError, "x must be an int, got Tensor", lambda: image().activation(W, "elu")),  # type: ignore[arg-type]
    (ValueError, r"weight must be \[O, 2, kh, kw\], got \[4, 4, 1, 1\]", lambda: image().conv(0, V)),
    (TypeError, "weight must be a Tensor, got int", lambda: image().conv(0, 1)),  # type: ignore[arg-type]
    (TypeError, "weight must be floating, got torch.int64", lambda: image().conv(0, W.long(), offset=(-1, 0))),
    (
        ValueError,
        r"bias must be \[4\] or \[B, 4\], got \[3\]",
        lambda: image().conv(0, W, torch.zeros(3), offset=(-1, 0)),
    ),
    (
        ValueError,
        "bias must be torch.float32 on cpu",
        lambda: image().conv(0, W, torch.zeros(4).double(), offset=(-1, 0)),
    ),
    (ValueError, "stride must be 1 or 2, got 3", lambda: image().conv(0, W, stride=3)),
    (ValueError, "dilation must be at least 1", lambda: image().conv(0, W, dilation=0)),
    (ValueError, "offset must be an int or a pair", lambda: image().conv(0, W, offset=(0, 0, 0))),
    (ValueError, r"live must be bool \[1, 1\]", lambda: image().conv(0, W, live=torch.ones(2, 2, dtype=torch.bool))),
    (ValueError, "live must be bool", lambda: image().conv(0, W, live=torch.ones(1, 1))),
    (ValueError, "activation must be one of", lambda: grown().conv(1, V, activation="concat_elu")),
    (ValueError, "looks into the future, 0 rows down and 0 col", lambda: image().conv(0, W)),
    (ValueError, "looks into the future, 0 rows down and 1 col", lambda: image(2).conv(0, W, offset=(0, 1))),
    (ValueError, "looks into the future, 1 rows down", lambda: image().conv(0, W, offset=(1, -3))),
    (ValueError, "looks into the future, 1 rows down", lambda: grown().conv(2, V, offset=(1, 0))),
    (ValueError, "looks into the future", lambda: grown().conv(1, torch.zeros(4, 4, 1, 3), offset=(0, -1))),
    (ValueError, "looks into the future", lambda: grown().conv_transpose(3, V, offset=(-1, 0))),
    (ValueError, "looks into the future", lambda: grown().conv_transpose(3, V, offset=(0, -1))),
    (ValueError, "conv_transpose wants one made with stride 2", lambda: grown().conv_transpose(1, V)),
    (ValueError, "add must have 4 channels at 1/1 of the image's size, got 2", lambda: grown().conv(1, V, add=0)),
    (ValueError, "add must have 4 channels at 1/2 .* got 4 at 1/1", lambda: grown().conv(1, V, stride=2, add=1)),
    (ValueError, "add must be one of the 4 values", lambda: grown().conv(1, V, add=4)),
    (
        ValueError,
        "even number of channels, got 5",
        _odd_gate,
    ),
    (ValueError, "activation must be one of tanh, linear", lambda: grown().gate(1, activation="relu")),
    (ValueError, "residual must have 2 channels", lambda: grown().gate(1, residual=2)),
    (ValueError, "residual must have 2 channels", lambda: grown().gate(2, residual=1)),
    (ValueError, r"condition must be \[4\] or \[B, 4\]", lambda: grown().gate(1, condition=torch.zeros(2))),
    (ValueError, "b must have 4 channels at 1/1 of the image's size, got 2", lambda: grown().add(1, 0)),
    (ValueError, "b must have 4 channels at 1/1 .* got 4 at 1/2", lambda: grown().add(2, 3)),
    (ValueError, "b must be one of the 4 values so far, got 9", lambda: grown().add(1, 9)),
    (ValueError, "kind must be one of", lambda: grown().activation(1, "swish")),
    (ValueError, "k must have 4 channels", lambda: grown().attention(1, 0, 1)),
    (ValueError, "3 heads must divide", lambda: grown().attention(1, 1, 1, 3)),
    (ValueError, r"tensor must be \[C, 4, 6\] or \[B, C, 4, 6\]", lambda: image().constant(torch.zeros(1, 6, 4))),
    (ValueError, "x must have 6 channels at 1/1", lambda: grown().categorical(1, 3)),
    (ValueError, "x must have 2 channels", lambda: grown().bernoulli(1)),
    (ValueError, "not of the image", lambda: image().bernoulli(0)),
    (ValueError, "depends on the pixel that it is to draw", _head_of_the_image),
    (ValueError, "looks into the future, 0 rows down and 0 col", _own_pixel),
    (ValueError, "order must be one of", lambda: grown().categorical(1, 2, "inner")),
    (ValueError, "a mixture has 1 or 3 channels, the image 2", lambda: grown().mixture(1, 1)),
    (ValueError, "bits must be at most 16", lambda: grown().mixture(1, 1, bits=17)),
    (ValueError, "sub_pixels must be 1", lambda: PixelProgram(3, 2, 2, 3).mixture(0, 1)),
    (ValueError, "nothing can follow the head", lambda: finished().activation(1, "elu")),
    (ValueError, "there is a head already", lambda: finished().bernoulli(1)),
    (ValueError, "the program has no head", lambda: ops.ancestral_sample(grown(), 1)),
]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG_PROGRAMS)
def test_what_is_wrong_with_a_program(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


U = torch.zeros(3, 2, 4, 6)


def of_batch() -> PixelProgram:
    program = image()
    program.categorical(program.conv(0, W, torch.zeros(2, 4), offset=(0, -1)), 2)
    return program


WRONG_CALLS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "program must be a PixelProgram, got int", lambda: ops.ancestral_sample(1, 1)),  # type: ignore[arg-type]
    (TypeError, "batch must be an int, got float", lambda: ops.ancestral_sample(finished(), 1.0)),  # type: ignore[arg-type]
    (TypeError, "batch must be an int, got bool", lambda: ops.ancestral_sample(finished(), True)),
    (ValueError, "batch must not be negative, got -1", lambda: ops.ancestral_sample(finished(), -1)),
    (TypeError, "u must be a Tensor", lambda: ops.ancestral_sample(finished(), 1, u=0.5)),  # type: ignore[arg-type]
    (ValueError, "u must be floating", lambda: ops.ancestral_sample(finished(), 3, u=U.long())),
    (
        RuntimeError,
        r"u must have shape \[2, 2, 4, 6\], got \[3, 2, 4, 6\]",
        lambda: ops.ancestral_sample(finished(), 2, u=U),
    ),
    (RuntimeError, "u must be on cpu", lambda: ops.ancestral_sample(finished(), 3, u=U.to("meta"))),
    (ValueError, r"u must be in \[0, 1\)", lambda: ops.ancestral_sample(finished(), 3, u=U + 1)),
    (ValueError, r"u must be in \[0, 1\)", lambda: ops.ancestral_sample(finished(), 3, u=U - 1e-9)),
    (ValueError, r"u must be in \[0, 1\)", lambda: ops.ancestral_sample(finished(), 3, u=U * torch.nan)),
    (TypeError, "given must be a Tensor", lambda: ops.ancestral_sample(finished(), 3, given=[1])),  # type: ignore[arg-type]
    (TypeError, "given must be torch.int64", lambda: ops.ancestral_sample(finished(), 3, given=U)),
    (RuntimeError, "given must have shape", lambda: ops.ancestral_sample(finished(), 2, given=U.long())),
    (
        ValueError,
        "given must be below the 2 levels, got 2",
        lambda: ops.ancestral_sample(finished(), 3, given=U.long() + 2),
    ),
    (ValueError, "program has a tensor of 2 images, batch is 3", lambda: ops.ancestral_sample(of_batch(), 3)),
]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG_CALLS)
def test_what_is_wrong_with_a_call(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_the_operator_trusts_no_numbers() -> None:
    """Whatever is put for one or two of a program's integers: a RuntimeError, or a sample."""
    pick, refused = random.Random(0), 0
    for seed in range(60):
        program = any_program(seed, 1)
        numbers, constants = program.encode()
        u = uniforms(program, 1, seed)
        for _ in range(20):
            changed = list(numbers)
            for _ in range(pick.choice([1, 1, 2])):
                changed[pick.randrange(4, len(numbers))] = pick.choice(
                    [-1, 0, 1, 2, 3, 5, 40, 1 << 20, 1 << 40, -(1 << 62)]
                )
            if pick.random() < 0.1:
                changed = changed[: pick.randrange(len(changed))]
            try:
                torch.ops.genfuse.ancestral_sample(program.tensors, u, None, changed, constants, True)
            except RuntimeError:
                refused += 1
    assert refused > 300


# ---- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 9])
def test_opcheck(seed: int) -> None:
    program = any_program(seed, 2)
    given = some_given(random.Random(seed), program, 2)
    arguments = (program.tensors, uniforms(program, 2), given, *program.encode(), seed == 1)
    registry.opcheck(torch.ops.genfuse.ancestral_sample.default, arguments)


def test_the_operator_compiles_and_exports() -> None:
    program = any_program(9, 3, torch.float32)
    numbers, constants = program.encode()
    tensors, u = program.tensors, uniforms(program, 3, 0, torch.float32)

    class Model(torch.nn.Module):
        def forward(self, tensors: list[Tensor], u: Tensor) -> Tensor:
            levels: Tensor = torch.ops.genfuse.ancestral_sample(tensors, u, None, numbers, constants, False)[0]
            return 2 * levels

    expected = Model()(tensors, u)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors, u), expected)
    exported = torch.export.export(Model(), (tensors, u))
    assert torch.equal(exported.module()(tensors, u), expected)


def test_the_function_compiles_and_exports() -> None:
    program = any_program(9, 3, torch.float32)
    given = some_given(random.Random(9), program, 3)

    class Model(torch.nn.Module):
        def forward(self, u: Tensor | None, given: Tensor) -> Tensor:
            return 2 * ops.ancestral_sample(program, 3, u=u, given=given)

    u = uniforms(program, 3, 0, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(u, given), Model()(u, given))
    torch.manual_seed(2)
    drawn = compiled(None, given)
    torch.manual_seed(2)
    assert torch.equal(drawn, Model()(None, given))
    exported = torch.export.export(Model(), (u, given))
    assert torch.equal(exported.module()(u, given), Model()(u, given))


def test_uniforms_that_nobody_looked_at_are_harmless() -> None:
    """As compiled code may hand them over."""
    for seed in range(20):
        program = any_program(seed, 2)
        assert program.head is not None
        for value in (-1.0, 1.0, 7.0, torch.nan, torch.inf):
            u = torch.full_like(uniforms(program, 2), value)
            levels = torch.ops.genfuse.ancestral_sample(program.tensors, u, None, *program.encode(), False)[0]
            assert bool(((levels >= -1) & (levels < program.head[1])).all())


def test_vmap_says_that_it_has_no_rule() -> None:
    program = any_program(9, 1)
    u = uniforms(program, 1).expand(2, -1, -1, -1, -1)
    with pytest.raises(NotImplementedError, match="no vmap rule: put the samples in the batch"):
        torch.vmap(lambda u: torch.ops.genfuse.ancestral_sample(program.tensors, u, None, *program.encode(), False)[0])(
            u
        )


def test_there_is_no_gradient() -> None:
    """Nor are a network's parameters kept for one."""
    weight = torch.randn(2, 1, 1, 1, requires_grad=True)
    program = PixelProgram(1, 3, 3)
    program.categorical(program.conv(program.image, weight, offset=(0, -1)), 2)
    for backend in ("native", "reference"):
        with genfuse.use_backend(backend):
            assert not run(OP, program, 2, None, None, None, record=True)[1].requires_grad
    levels, outputs = torch.ops.genfuse.ancestral_sample(
        program.tensors, uniforms(program, 2), None, *program.encode(), True
    )
    assert not levels.requires_grad
    assert not outputs.requires_grad
