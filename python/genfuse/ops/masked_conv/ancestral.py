"""Cached ancestral sampling of images: the whole loop over pixels in one call, each activation computed once.

The definition, which computes everything anew for each pixel, is in `genfuse.reference.masked_conv.ancestral`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import library as registry

from genfuse import _native, backends
from genfuse.ops.operator import can_look_at, native_objection, on_cpu, rule_library
from genfuse.ops.sampling import _NOISES, check_rng, philox_uniform
from genfuse.reference.masked_conv import ancestral as reference
from genfuse.reference.masked_conv.ancestral import PixelProgram

__all__ = ["PixelProgram", "ancestral_sample"]


def _check_batch(op: str, program: PixelProgram, batch: int) -> None:
    for instruction in program.instructions:
        for index in reference.batched(instruction):
            tensor = program.tensors[index]
            batched = tensor.dim() == (4 if instruction[0] == reference.CONSTANT else 2)
            if batched and tensor.size(0) != batch:
                raise ValueError(f"{op}: program has a tensor of {tensor.size(0)} images, batch is {batch}")


def ancestral_sample(
    program: PixelProgram,
    batch: int,
    *,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Draw images pixel by pixel from an autoregressive network, with each activation computed once.

    After a pixel is drawn, the naive loop runs the network on the whole image again. Here the activations of what is
    known stay; whatever follows from the rows above is computed for a row of pixels at once; what remains for each
    pixel are the taps in its own row. (Ramachandran et al. 2017, arXiv 1704.06001, cache activations, too.) Backend
    "reference" is the naive loop.

    Args:
        program: the network; its tensors' dtype and device are the call's. float32, float64, bfloat16 or float16
            (computed in float32).
        batch: B, how many images.
        u: uniform numbers in [0, 1), ``[B, draws, H, W]``, where draws is the number of channels, and one more for a
            mixture (`program.draws`); drawn otherwise.
        generator: where u comes from if it is not given; default torch's of the device.
        given: int64 ``[B, C, H, W]``; what is not negative is kept, the rest is drawn, given what precedes it.

    Returns:
        int64 ``[B, C, H, W]``: levels from 0 on, without a gradient.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a negative batch, a program without a head or with tensors of another batch, a u outside [0, 1), a
            level in given that the head does not have.
        RuntimeError: u or given do not fit; the network gives no distribution (NaN or +inf) for some pixel. (On a GPU,
            in the reference and in compiled code nobody waits to see: such a pixel is -1. On a GPU and in compiled code
            u and given are not looked at, either.)

    Example:
        >>> program = PixelProgram(1, 2, 3)
        >>> weight = torch.tensor([8.0, -8.0]).view(2, 1, 1, 1)
        >>> bias = torch.tensor([-4.0, 4.0])  # each pixel is what its left neighbour is not
        >>> program.categorical(program.conv(program.image, weight, bias, offset=(0, -1)), levels=2)
        >>> ancestral_sample(program, 1, u=torch.full((1, 1, 2, 3), 0.5))
        tensor([[[[1, 0, 1],
                  [1, 0, 1]]]])
    """
    op = "ancestral_sample"
    if not isinstance(program, PixelProgram):
        raise TypeError(f"{op}: program must be a PixelProgram, got {type(program).__name__}")
    if isinstance(batch, bool) or not isinstance(batch, (int, torch.SymInt)):
        raise TypeError(f"{op}: batch must be an int, got {type(batch).__name__}")
    if batch < 0:
        raise ValueError(f"{op}: batch must not be negative, got {batch}")
    levels, _ = run(op, program, batch, u, generator, given, record=False)
    return levels


@torch.no_grad()
def run(
    op: str,
    program: PixelProgram,
    batch: int,
    u: Tensor | None,
    generator: torch.Generator | None,
    given: Tensor | None,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """Levels, and if `record` the head's parameters ``[B, P, H, W]`` of each pixel as it was drawn."""
    numbers, constants = program.encode()
    if not program.tensors:
        raise ValueError(f"{op}: program has no tensors")
    like, shape = program.tensors[0], (batch, program.channels, program.height, program.width)
    _check_batch(op, program, batch)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    of_u = (batch, program.draws, program.height, program.width)
    if u is None:
        rng = check_rng(op, like, generator, None)
        if on_cpu and like.is_cpu:  # whose numbers a compiler need not know
            u = torch.empty(of_u, dtype=wide)
            torch.ops.genfuse.philox_(u, rng, _NOISES.index("uniform"))
        else:
            seed, offset = rng.tolist()
            u = philox_uniform(of_u, seed, offset, dtype=wide, device=like.device)
    else:
        if not isinstance(u, Tensor):
            raise TypeError(f"{op}: u must be a Tensor, got {type(u).__name__}")
        if not u.is_floating_point():
            raise ValueError(f"{op}: u must be floating, got {u.dtype}")
        _check_fits(op, "u", u, of_u, like)
        if can_look_at(u) and not bool(((u >= 0) & (u < 1)).all()):
            raise ValueError(f"{op}: u must be in [0, 1)")
        if u.dtype == torch.float64 and wide != torch.float64:  # what is just below 1 must not be rounded to 1
            u = u.to(wide).clamp(max=1.0 - 2.0**-24)
        u = u.to(wide).contiguous()
    if given is not None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{op}: given must be a Tensor, got {type(given).__name__}")
        if given.dtype != torch.int64:
            raise TypeError(f"{op}: given must be torch.int64, got {given.dtype}")
        _check_fits(op, "given", given, shape, like)
        count = numbers[5]
        if can_look_at(given) and not bool((given < count).all()):
            raise ValueError(f"{op}: given must be below the {count} levels, got {int(given.max())}")
        given = given.contiguous()
    arguments = (program.tensors, u, given, numbers, constants, record)
    backend = backends.select(op, {"program": program, "batch": batch, "u": u, "given": given})
    if backend == "reference":
        return reference.ancestral_sample(*arguments)
    library = torch.ops.genfuse_cuda if backend == "cuda" else torch.ops.genfuse
    levels, outputs = library.ancestral_sample(*arguments)
    if can_look_at(levels) and bool((levels < 0).any()):
        raise RuntimeError(f"{op}: the network gives no distribution (NaN or infinity) for some pixel")
    return levels, outputs


def _check_fits(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise RuntimeError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise RuntimeError(f"{op}: {name} must be on {like.device} like the program's tensors, got {tensor.device}")


# ---- for the dispatcher ----------------------------------------------------------------------------------------------


def _fake(
    tensors: list[Tensor], u: Tensor, given: Tensor | None, program: list[int], constants: list[float], record: bool
) -> tuple[Tensor, Tensor]:
    channels, height, width = program[:3]
    outputs = program[reference.HEADER + reference.VALUE * program[8]]  # the head's channels
    levels = u.new_empty((u.size(0), channels, height, width), dtype=torch.int64)
    return levels, u.new_empty((u.size(0), outputs, height, width) if record else (0,))


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise NotImplementedError("genfuse.ops.ancestral_sample has no vmap rule: put the samples in the batch")


def _enter() -> None:
    name = "ancestral_sample"
    backends.register_op(name, ancestral_sample, "program", lambda arguments: arguments["program"].tensors[0])
    backends.register(backends.Kernel(name, "native", ("cpu",), objection=native_objection))
    half = (torch.float32, torch.bfloat16, torch.float16)
    backends.register(
        backends.Kernel(name, "cuda", ("cuda",), half, proven=False, objection=lambda arguments: _native.cuda_error())
    )
    backends.register(backends.Kernel(name, "reference", (), note="the naive loop"))
    if on_cpu:
        library = rule_library()
        registry.register_fake(f"genfuse::{name}", _fake, lib=library)
        registry.register_vmap(f"genfuse::{name}", _no_vmap, lib=library)


_enter()
