"""Random numbers by address: element ``e`` of the stream ``(seed, offset)`` is a function of those three alone.

So a number depends on no device, thread count or block size, and whatever used it can be drawn again instead of being
kept. The contract is in docs/random.md, the definition in `genfuse.reference.sampling`. All five functions are one
registered operator, `torch.ops.genfuse.philox_(out, rng, noise)`, which fills a tensor in the order of its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import library as registry

from genfuse import _native, backends
from genfuse.reference import sampling as reference

__all__ = ["philox_bits", "philox_gumbel", "philox_logistic", "philox_normal", "philox_uniform"]

_NOISES = ("bits", "uniform", "normal", "gumbel", "logistic")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_on_cpu = _native.load()  # asked once: torch.compile cannot trace the asking


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _sizes(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    for size in sizes:
        if not _is_integer(size):
            raise TypeError(f"{name}: shape must hold integers, got {type(size).__name__}")
        if size < 0:
            raise RuntimeError(f"{name}: shape must not hold negative sizes, got {list(sizes)}")
    return sizes


def _word64(name: str, what: str, value: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits; negative ones are that already."""
    if not _is_integer(value):
        raise TypeError(f"{name}: {what} must be an integer, got {type(value).__name__}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name}: {what} must fit 64 bits, got {value}")
    return value - 2**64 if value >= 2**63 else value


def _target(
    name: str,
    shape: int | Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    out: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> Tensor:
    """The tensor to fill, once the arguments agree."""
    sizes = _sizes(name, shape)
    if out is None:
        default = torch.get_default_dtype() if dtypes is _FLOATS else dtypes[0]
        out = torch.empty(sizes, dtype=default if dtype is None else dtype, device=device)
    elif not isinstance(out, Tensor):
        raise TypeError(f"{name}: out must be a Tensor, got {type(out).__name__}")
    elif tuple(out.shape) != sizes:
        raise RuntimeError(f"{name}: out must have shape {list(sizes)}, got {list(out.shape)}")
    elif dtype is not None and dtype != out.dtype:
        raise RuntimeError(f"{name}: dtype is {dtype}, but out has {out.dtype}")
    elif device is not None and torch.empty(0, device=device).device != out.device:
        raise RuntimeError(f"{name}: device is {torch.device(device)}, but out is on {out.device}")
    elif out.requires_grad:
        raise RuntimeError(f"{name}: out must not require grad, as what is drawn has no gradient")
    if out.dtype not in dtypes:
        wanted = " or ".join(str(one).removeprefix("torch.") for one in dtypes)
        raise TypeError(f"{name}: dtype must be {wanted}, got {str(out.dtype).removeprefix('torch.')}")
    return out


def _draw(
    noise: str,
    shape: int | Sequence[int],
    seed: int,
    offset: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    out: Tensor | None,
) -> Tensor:
    name = f"philox_{noise}"
    address = [_word64(name, "seed", seed), _word64(name, "offset", offset)]
    out = _target(name, shape, dtype, device, out, (torch.int64,) if noise == "bits" else _FLOATS)
    if out.is_meta:
        return out
    fast = _on_cpu and out.is_cpu and backends.forced() is None
    backend = "native" if fast else backends.select(name, {"out": out})
    rng = torch.tensor(address, dtype=torch.int64)
    if backend == "native":
        torch.ops.genfuse.philox_(out, rng, _NOISES.index(noise))
    elif backend == "triton":
        from genfuse.kernels import sampling as kernels

        kernels.philox_(out, rng.to(out.device, non_blocking=True), _NOISES.index(noise))
    else:
        rng = rng.to(out.device)
        sizes = tuple(out.shape)
        out.copy_(reference.philox_bits(sizes, rng) if noise == "bits" else _REFERENCE[noise](sizes, rng, out.dtype))
    return out


_REFERENCE: dict[str, Callable[..., Tensor]] = {
    "uniform": reference.philox_uniform,
    "normal": reference.philox_normal,
    "gumbel": reference.philox_gumbel,
    "logistic": reference.philox_logistic,
}


def philox_bits(
    shape: int | Sequence[int],
    seed: int,
    offset: int = 0,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Random 32-bit words of Philox4x32-10 (Salmon et al., SC 2011): element e is word e % 4 of block e // 4.

    Args:
        shape: shape of the result.
        seed: the key, 64 bits: in [-2^63, 2^64), where negative numbers are the two's complement.
        offset: which of a seed's 2^64 streams, likewise; every stream has 2^66 words.
        dtype: int64, the only one.
        device: where the result is; default: torch's default device.
        out: a tensor of that shape to fill instead, in the order of its elements, whatever its strides.

    Returns:
        Tensor of ``shape``, each in [0, 2^32).

    Raises:
        TypeError: seed, offset or shape hold no integers; dtype is not int64.
        ValueError: seed or offset do not fit 64 bits.
        RuntimeError: a negative size; out has another shape, dtype or device than asked for, or requires grad.

    Example:
        >>> [f"{word:08x}" for word in philox_bits(4, seed=0).tolist()]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    return _draw("bits", shape, seed, offset, dtype, device, out)


def philox_uniform(
    shape: int | Sequence[int],
    seed: int,
    offset: int = 0,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1): the upper 24 bits of element e's word, times 2^-24 (float16: 11 bits, bfloat16: 8).

    The same bits on every device. float64 has the same 24 bits as float32, so that both draw the same masks.

    Args:
        shape: shape of the result.
        seed: the key, 64 bits, as in `philox_bits`.
        offset: which of a seed's 2^64 streams.
        dtype: float32, float64, bfloat16 or float16; default: torch's default dtype.
        device: where the result is; default: torch's default device.
        out: a tensor of that shape to fill instead.

    Returns:
        Tensor of ``shape``.

    Raises:
        TypeError, ValueError, RuntimeError: as `philox_bits`.

    Example:
        >>> philox_uniform((2, 2), seed=0)
        tensor([[0.3990, 0.8805],
                [0.7357, 0.6055]])
    """
    return _draw("uniform", shape, seed, offset, dtype, device, out)


def philox_normal(
    shape: int | Sequence[int],
    seed: int,
    offset: int = 0,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal numbers by Box and Muller (1958).

    Elements 2j and 2j + 1 are r cos(2 pi u') and r sin(2 pi u') with r = sqrt(-2 ln u), where u and u' are
    (word + 1/2) / 2^32 of the two elements' words. No number is beyond 6.77. float32 is within 4 ulp of the exact
    number on every device; float64 is that number to more digits.

    Args:
        shape: shape of the result.
        seed: the key, 64 bits, as in `philox_bits`.
        offset: which of a seed's 2^64 streams.
        dtype: float32, float64, bfloat16 or float16; default: torch's default dtype.
        device: where the result is; default: torch's default device.
        out: a tensor of that shape to fill instead.

    Returns:
        Tensor of ``shape``.

    Raises:
        TypeError, ValueError, RuntimeError: as `philox_bits`.

    Example:
        >>> philox_normal(2, seed=0)
        tensor([ 0.9911, -0.9247])
    """
    return _draw("normal", shape, seed, offset, dtype, device, out)


def philox_gumbel(
    shape: int | Sequence[int],
    seed: int,
    offset: int = 0,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard Gumbel numbers, -ln(-ln u) with u = (word + 1/2) / 2^32 of the element's word; always finite.

    Args:
        shape: shape of the result.
        seed: the key, 64 bits, as in `philox_bits`.
        offset: which of a seed's 2^64 streams.
        dtype: float32, float64, bfloat16 or float16; default: torch's default dtype.
        device: where the result is; default: torch's default device.
        out: a tensor of that shape to fill instead.

    Returns:
        Tensor of ``shape``.

    Raises:
        TypeError, ValueError, RuntimeError: as `philox_bits`.

    Example:
        >>> philox_gumbel(2, seed=0)
        tensor([0.0848, 2.0617])
    """
    return _draw("gumbel", shape, seed, offset, dtype, device, out)


def philox_logistic(
    shape: int | Sequence[int],
    seed: int,
    offset: int = 0,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard logistic numbers, ln u - ln(1 - u) with u = (word + 1/2) / 2^32 of the element's word; always finite.

    Args:
        shape: shape of the result.
        seed: the key, 64 bits, as in `philox_bits`.
        offset: which of a seed's 2^64 streams.
        dtype: float32, float64, bfloat16 or float16; default: torch's default dtype.
        device: where the result is; default: torch's default device.
        out: a tensor of that shape to fill instead.

    Returns:
        Tensor of ``shape``.

    Raises:
        TypeError, ValueError, RuntimeError: as `philox_bits`.

    Example:
        >>> philox_logistic(2, seed=0)
        tensor([-0.4094,  1.9974])
    """
    return _draw("logistic", shape, seed, offset, dtype, device, out)


# ---- for the dispatcher ----------------------------------------------------------------------------------------------


def _fake_philox(out: Tensor, rng: Tensor, noise: int) -> None:
    if rng.dtype != torch.int64 or rng.shape != (2,):
        raise RuntimeError(f"rng must be an int64 tensor (seed, offset), got {rng.dtype} {list(rng.shape)}")
    if not 0 <= noise < len(_NOISES):
        raise RuntimeError(f"noise must be between 0 and {len(_NOISES) - 1}, got {noise}")


def _register() -> None:
    registry.register_fake("genfuse::philox_", _fake_philox)


def _native_objection(arguments: backends.Arguments) -> str | None:
    return None if _on_cpu else _native.error()


def _triton_objection(arguments: backends.Arguments) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as reason:
        return f"triton is not installed ({reason})"
    return None


def _subject_of(default: torch.dtype | None) -> Callable[[backends.Arguments], Tensor]:
    """A tensor with the device and dtype of the result of a call that `explain` is asked about."""

    def subject(arguments: backends.Arguments) -> Tensor:
        out: Tensor | None = arguments.get("out")
        if out is not None:
            return out
        return torch.empty(0, dtype=arguments.get("dtype") or default, device=arguments.get("device"))

    return subject


def _enter_backends() -> None:
    entries: Any = backends.Kernel
    functions = (philox_bits, philox_uniform, philox_normal, philox_gumbel, philox_logistic)
    for noise, function in zip(_NOISES, functions, strict=True):
        name = f"philox_{noise}"
        dtypes = (torch.int64,) if noise == "bits" else _FLOATS
        backends.register_op(name, function, "out", _subject_of(torch.int64 if noise == "bits" else None))
        for kernel in (
            entries(name, "native", ("cpu",), dtypes, objection=_native_objection),
            entries(name, "triton", ("cuda",), dtypes[:1] if noise == "bits" else (*dtypes[:1], *dtypes[2:]),
                    proven=False, objection=_triton_objection),
            entries(name, "reference", (), dtypes),
        ):  # fmt: skip
            backends.register(kernel)


_enter_backends()
if _on_cpu:
    _register()
