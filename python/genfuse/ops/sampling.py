"""Random numbers by address, and what is sampled with them: Gaussians, relaxed and plain categories, codes.

Element ``e`` of the stream ``(seed, offset)`` is a function of those three alone. So a number depends on no device,
thread count or block size, and whatever used it can be drawn again instead of being kept. The contract is in
docs/random.md, the definition in `genfuse.reference.sampling`. The five `philox_*` are one registered operator,
`torch.ops.genfuse.philox_(out, rng, noise)`, which fills a tensor in the order of its elements; the others are one
operator each (the Gaussian functions one together), with the rules of `operator.py`. What is broadcast is expanded by
torch, and its gradient summed by torch: the one place where last bits may depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import library as registry

from genfuse import backends
from genfuse.reference import sampling as reference
from genfuse.reference.random import draw_rng

from .operator import Operator, can_look_at, native_objection, on_cpu, under_autocast

__all__ = [
    "VectorQuantized",
    "categorical_sample",
    "gaussian_kl",
    "gaussian_rsample",
    "gaussian_rsample_kl",
    "gumbel_softmax",
    "philox_bits",
    "philox_gumbel",
    "philox_logistic",
    "philox_normal",
    "philox_uniform",
    "relaxed_bernoulli",
    "vector_quantize",
    "vector_quantize_statistics",
]

_NOISES = ("bits", "uniform", "normal", "gumbel", "logistic")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    fast = on_cpu and out.is_cpu and backends.forced() is None
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


# ---- what is made of noise: operators --------------------------------------------------------------------------------

_INF = float("inf")


def check_tensor(op: str, name: str, value: object, like: tuple[str, Tensor] | None = None) -> Tensor:
    """A floating tensor, of the dtype and on the device of another; raises what torch would."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise ValueError(
            f"{op}: {name} must be of a floating dtype (float32, float64, bfloat16 or float16), got {value.dtype}"
        )
    if like is not None:
        first, other = like
        if value.dtype != other.dtype:
            raise RuntimeError(
                f"{op}: {name} must be {other.dtype}, the dtype of {first}; got {value.dtype}. Convert one."
            )
        if value.device != other.device:
            raise RuntimeError(f"{op}: {name} must be on {other.device}, as {first} is; got {value.device}")
    return value


def check_number(op: str, name: str, value: object, *, above: float = -_INF, least: float = -_INF) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not (value > above and value >= least and value < _INF):
        bound = f"above {above:g} and " if above > -_INF else f"at least {least:g} and " if least > -_INF else ""
        raise ValueError(f"{op}: {name} must be {bound}finite, got {value}")
    return float(value)


def check_batch_dims(op: str, batch_dims: object, name: str, dims: int) -> int:
    if isinstance(batch_dims, bool) or not isinstance(batch_dims, int):
        raise TypeError(f"{op}: batch_dims must be an int, got {type(batch_dims).__name__}")
    if batch_dims < 0:
        raise RuntimeError(f"{op}: batch_dims must not be negative, got {batch_dims}")
    if batch_dims > dims:
        raise RuntimeError(f"{op}: {name} must have at least batch_dims = {batch_dims} dimensions, and has {dims}")
    return batch_dims


def same_shape(first: torch.Size, second: torch.Size) -> bool:
    """Their equality; Python compares the elements of tuples of two lengths, too, and torch.export would hold them to
    being unequal.
    """
    return len(first) == len(second) and first == second


def spread(op: str, name: str, value: Tensor, shape: torch.Size, like: str) -> Tensor:
    """A tensor expanded to a shape that it must broadcast to."""
    if same_shape(value.shape, shape):
        return value
    try:
        return value.expand(shape)
    except RuntimeError:
        raise RuntimeError(
            f"{op}: {name} must broadcast to {list(shape)}, the shape of {like}; got {list(value.shape)}"
        ) from None


def common_shape(op: str, first: tuple[str, Tensor], second: tuple[str, Tensor]) -> torch.Size:
    if same_shape(first[1].shape, second[1].shape):
        return first[1].shape
    try:
        return torch.Size(torch.broadcast_shapes(first[1].shape, second[1].shape))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise RuntimeError(
            f"{op}: {first[0]} and {second[0]} must broadcast together, got {list(first[1].shape)} and "
            f"{list(second[1].shape)}"
        ) from None


def check_rng(op: str, like: Tensor, generator: object, rng: object) -> Tensor:
    """The random pair: as given, or drawn."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if rng is None:
        return draw_rng(like.device, generator)
    if not isinstance(rng, Tensor):
        raise TypeError(f"{op}: rng must be a Tensor, got {type(rng).__name__}")
    if rng.dtype != torch.int64:
        raise ValueError(f"{op}: rng must be torch.int64, got {rng.dtype}")
    if rng.shape != (2,):
        raise RuntimeError(f"{op}: rng must be [2], the pair (seed, offset); got {list(rng.shape)}")
    if rng.device != like.device:
        raise RuntimeError(f"{op}: rng must be on {like.device}; got {rng.device}")
    return rng.contiguous()


def check_noise(op: str, name: str, noise: object, like: tuple[str, Tensor]) -> Tensor | None:
    if noise is None:
        return None
    found = check_tensor(op, name, noise, like)
    if not same_shape(found.shape, like[1].shape):
        raise RuntimeError(
            f"{op}: {name} must have the shape {list(like[1].shape)} of {like[0]}, got {list(found.shape)}"
        )
    return found


def scale_of(
    op: str, logvar: Tensor | None, log_std: Tensor | None, prefix: str = "", required: bool = True
) -> tuple[str, Tensor | None]:
    """The name and value of whichever parametrisation was given."""
    if (logvar is not None and log_std is not None) or (required and logvar is None and log_std is None):
        raise TypeError(f"{op}: exactly one of {prefix}logvar and {prefix}log_std must be given")
    return (f"{prefix}logvar", logvar) if log_std is None else (f"{prefix}log_std", log_std)


def rows_shape(tensor: Tensor, batch_dims: int) -> list[Any]:
    return list(tensor.shape[:batch_dims])


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fake_gaussian(*arguments: Any) -> Any:
    mean, batch_dims, sample, divergence = arguments[0], arguments[6], arguments[11], arguments[12]
    z = mean.new_empty(mean.shape) if sample else mean.new_empty(0)
    kl = mean.new_empty(rows_shape(mean, batch_dims) if divergence else 0, dtype=wide_dtype(mean))
    return z, kl


_GAUSSIAN = Operator(
    name="gaussian",
    arguments=(
        *("mean", "scale", "prior_mean", "prior_scale", "eps", "rng"),
        *("batch_dims", "log_std", "free_bits", "low", "high", "sample", "divergence"),
    ),
    tensors=6,
    differentiable=5,
    outputs=2,
    reference=reference.gaussian,
    fake=_fake_gaussian,
)


def _gaussian(
    op: str,
    mean: Tensor,
    logvar: Tensor | None,
    log_std: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    prior_log_std: Tensor | None,
    free_bits: float,
    clamp: object,
    eps: Tensor | None,
    generator: torch.Generator | None,
    rng: Tensor | None,
    batch_dims: int,
    sample: bool,
    divergence: bool,
) -> tuple[Tensor, ...]:
    """All of the Gaussian functions: checks, broadcasting, noise."""
    name, scale = scale_of(op, logvar, log_std)
    prior_name, prior_scale = scale_of(op, prior_logvar, prior_log_std, "prior_", required=False)
    mean, scale, prior_mean, prior_scale, eps = under_autocast(mean, mean, scale, prior_mean, prior_scale, eps)
    check_tensor(op, "mean", mean)
    scale = check_tensor(op, name, scale, ("mean", mean))
    shape = common_shape(op, ("mean", mean), (name, scale))
    mean, scale = spread(op, "mean", mean, shape, name), spread(op, name, scale, shape, "mean")
    if prior_mean is not None:
        prior_mean = spread(op, "prior_mean", check_tensor(op, "prior_mean", prior_mean, ("mean", mean)), shape, "mean")
    if prior_scale is not None:
        prior_scale = check_tensor(op, prior_name, prior_scale, ("mean", mean))
        if (prior_log_std is None) != (log_std is None):  # the operator has one parametrisation
            prior_scale = 0.5 * prior_scale if prior_log_std is None else 2.0 * prior_scale
        prior_scale = spread(op, prior_name, prior_scale, shape, "mean")
    check_batch_dims(op, batch_dims, "mean", len(shape))
    free_bits = check_number(op, "free_bits", free_bits, least=0.0)
    low, high = -_INF, _INF
    if clamp is not None:
        if not (isinstance(clamp, (tuple, list)) and len(clamp) == 2):
            raise TypeError(f"{op}: clamp must be a pair (low, high) or None, got {clamp!r}")
        for bound in clamp:
            if isinstance(bound, bool) or not isinstance(bound, (int, float)):
                raise TypeError(f"{op}: clamp must hold numbers, got {type(bound).__name__}")
        low, high = (float(bound) for bound in clamp)
        if not low <= high:
            raise ValueError(f"{op}: clamp must be (low, high) with low <= high, got {tuple(clamp)}")
    pair = None
    if sample:
        eps = check_noise(op, "eps", eps, ("mean", mean))
        pair = check_rng(op, mean, generator, rng) if eps is None else None
    options = (batch_dims, log_std is not None, free_bits, low, high, sample, divergence)
    return _GAUSSIAN.run(op, mean, (mean, scale, prior_mean, prior_scale, eps, pair, *options))


def gaussian_rsample(
    mean: Tensor,
    logvar: Tensor | None = None,
    *,
    log_std: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    r"""A reparametrised sample :math:`z = \mu + \sigma \odot \epsilon` (Kingma and Welling 2013, arXiv 1312.6114).

    Backward keeps the inputs and the random pair alone: the noise is drawn again.

    Args:
        mean: :math:`\mu`, any shape and strides; float32, float64, bfloat16 or float16 (computed in float32).
        logvar: :math:`\ln \sigma^2`, of a shape that broadcasts with mean. Either this or ``log_std``.
        log_std: :math:`\ln \sigma`.
        clamp: (low, high), bounds of logvar (or log_std) as it is given. The gradient passes them unchanged, so that a
            value outside can come back.
        eps: the noise, standard normal numbers of the sample's shape; differentiable.
        generator: where the random pair comes from if neither eps nor rng is given; default torch's of mean's device.
        rng: int64 ``[2]`` on mean's device, the pair (seed, offset): eps is then `philox_normal` of it.

    Returns:
        Tensor of the shape that mean and logvar broadcast to, of mean's dtype (float32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type; both or none of logvar and log_std.
        ValueError: a dtype that is not floating, or a clamp whose bounds are the wrong way round.
        RuntimeError: shapes do not broadcast, dtypes or devices differ.

    Example:
        >>> gaussian_rsample(torch.zeros(2), torch.zeros(2), eps=torch.tensor([1.0, -2.0]))
        tensor([ 1., -2.])
    """
    op = "gaussian_rsample"
    prior = (None, None, None)
    return _gaussian(op, mean, logvar, log_std, *prior, 0.0, clamp, eps, generator, rng, 0, True, False)[0]


def gaussian_rsample_kl(
    mean: Tensor,
    logvar: Tensor | None = None,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    log_std: Tensor | None = None,
    prior_log_std: Tensor | None = None,
    free_bits: float = 0.0,
    clamp: tuple[float, float] | None = None,
    batch_dims: int = 1,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A reparametrised sample and its KL divergence from the prior, in one pass over the parameters.

    .. math::
        z = \mu + \sigma \odot \epsilon, \quad \mathrm{KL} = \sum_j \max\left(\lambda, \tfrac{1}{2}\left(
        \frac{\sigma_j^2}{\sigma_{0j}^2} - 1 - \ln \frac{\sigma_j^2}{\sigma_{0j}^2}
        + \frac{(\mu_j - \mu_{0j})^2}{\sigma_{0j}^2}\right)\right)

    (Kingma and Welling 2013, arXiv 1312.6114, appendix B.) Nothing overflows that the mathematics does not, and a KL
    near 0 keeps its digits. Backward keeps the inputs and the random pair alone.

    Args:
        mean: :math:`\mu`, ``[B, ...]``, any strides; float32, float64, bfloat16 or float16 (computed in float32).
        logvar: :math:`\ln \sigma^2`, of a shape that broadcasts with mean. Either this or ``log_std``.
        prior_mean: :math:`\mu_0`, broadcasts to mean's shape; default 0.
        prior_logvar: :math:`\ln \sigma_0^2`, likewise; default 0. Or ``prior_log_std``.
        log_std: :math:`\ln \sigma`.
        prior_log_std: :math:`\ln \sigma_0`.
        free_bits: :math:`\lambda \ge 0`, in nats for each latent element: below it an element's KL counts as this much
            and has no gradient. (Kingma et al. 2016, arXiv 1606.04934, eq. 15, apply it to a group's minibatch mean.)
        clamp: (low, high), bounds of logvar (or log_std) as it is given, for the sample and the KL. The gradient is
            that at the bound and passes unchanged, so that a value outside can come back.
        batch_dims: how many leading dimensions are the batch; the KL is summed over the others.
        eps: the noise, standard normal numbers of the sample's shape; differentiable.
        generator: where the random pair comes from if neither eps nor rng is given; default torch's of mean's device.
        rng: int64 ``[2]`` on mean's device, the pair (seed, offset): eps is then `philox_normal` of it.

    Returns:
        ``(z, kl)``: z of the shape that mean and logvar broadcast to, of mean's dtype (float32 under autocast); kl
        ``[B]`` in nats, float32, or float64 for float64.

    Raises:
        TypeError: an argument is of the wrong type; both or none of logvar and log_std.
        ValueError: a dtype that is not floating, free_bits below 0, a clamp whose bounds are the wrong way round.
        RuntimeError: shapes do not broadcast, dtypes or devices differ, fewer dimensions than ``batch_dims``.

    Example:
        >>> z, kl = gaussian_rsample_kl(torch.ones(2, 3), torch.zeros(2, 3), generator=torch.Generator().manual_seed(0))
        >>> z.shape, kl
        (torch.Size([2, 3]), tensor([1.5000, 1.5000]))
    """
    prior = (prior_mean, prior_logvar, prior_log_std)
    z, kl = _gaussian(
        *("gaussian_rsample_kl", mean, logvar, log_std, *prior, free_bits, clamp, eps, generator, rng, batch_dims),
        sample=True,
        divergence=True,
    )
    return z, kl


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor | None = None,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    log_std: Tensor | None = None,
    prior_log_std: Tensor | None = None,
    free_bits: float = 0.0,
    clamp: tuple[float, float] | None = None,
    batch_dims: int = 1,
) -> Tensor:
    """The KL divergence of `gaussian_rsample_kl` alone; arguments, result and errors as there.

    Example:
        >>> gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2), prior_mean=torch.ones(2))
        tensor([0.])
    """
    prior = (prior_mean, prior_logvar, prior_log_std)
    return _gaussian(
        *("gaussian_kl", mean, logvar, log_std, *prior, free_bits, clamp, None, None, None, batch_dims),
        sample=False,
        divergence=True,
    )[1]


def _fake_like_logits(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_RELAXED = ("logits", "noise", "rng", "tau", "hard")
_GUMBEL_SOFTMAX = Operator(
    name="gumbel_softmax",
    arguments=_RELAXED,
    tensors=3,
    differentiable=2,
    outputs=1,
    saved=(0,),
    reference=reference.gumbel_softmax,
    fake=_fake_like_logits,
    recomputes=lambda inputs: bool(inputs[4]),  # a hard sample says nothing of the soft one
)
_RELAXED_BERNOULLI = Operator(
    name="relaxed_bernoulli",
    arguments=_RELAXED,
    tensors=3,
    differentiable=2,
    outputs=1,
    saved=(0,),
    reference=reference.relaxed_bernoulli,
    fake=_fake_like_logits,
    recomputes=lambda inputs: bool(inputs[4]),  # a hard sample says nothing of the soft one
)


def gumbel_softmax(
    logits: Tensor,
    tau: float = 1.0,
    hard: bool = False,
    dim: int = -1,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    r"""A sample of the Gumbel-softmax (Concrete) distribution: :math:`\mathrm{softmax}((\mathrm{logits} + g) / \tau)`.

    Jang, Gu and Poole 2016 (arXiv 1611.01144), eq. 2. As `torch.nn.functional.gumbel_softmax`, but the noise is always
    finite, so that no NaN comes of it, and a hard sample is exactly one-hot. Backward keeps no noise.

    Args:
        logits: unnormalised log-probabilities, any shape and strides; -inf is a class that cannot be drawn. float32,
            float64, bfloat16 or float16 (computed in float32).
        tau: temperature, above 0. (torch.compile compiles anew for each value, as of any operator's float.)
        hard: return the one-hot argmax (the first, if several), with the gradient of the soft sample.
        dim: the dimension of the classes.
        noise: standard Gumbel numbers of logits' shape, instead of drawn ones; differentiable.
        generator: where the random pair comes from if neither noise nor rng is given; default torch's of that device.
        rng: int64 ``[2]`` on logits' device, the pair (seed, offset): the noise is then `philox_gumbel` of it, in the
            order of logits' elements with ``dim`` moved to the end.

    Returns:
        Tensor of logits' shape and dtype (float32 under autocast). A row with NaN or +inf, or of -inf alone, is NaN.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating; tau is not above 0.
        IndexError: dim is no dimension of logits.
        RuntimeError: noise or rng have another shape, dtype or device than wanted.

    Example:
        >>> gumbel_softmax(torch.tensor([0.0, 9.0, 0.0]), hard=True, rng=torch.tensor([0, 0]))
        tensor([0., 1., 0.])
    """
    op = "gumbel_softmax"
    logits, noise = under_autocast(logits, logits, noise)
    check_tensor(op, "logits", logits)
    tau = check_number(op, "tau", tau, above=0.0)
    noise = check_noise(op, "noise", noise, ("logits", logits))
    dims = logits.dim()
    if not _is_integer(dim):
        raise TypeError(f"{op}: dim must be an integer, got {type(dim).__name__}")
    if not -max(dims, 1) <= dim < max(dims, 1):
        raise IndexError(f"{op}: dim must be in [{-max(dims, 1)}, {max(dims, 1) - 1}], got {dim}")
    last = dims == 0 or dim in (-1, dims - 1)
    if dims == 0:
        logits, noise = logits.view(1), None if noise is None else noise.view(1)
    elif not last:
        logits, noise = logits.movedim(dim, -1), None if noise is None else noise.movedim(dim, -1)
    pair = check_rng(op, logits, generator, rng) if noise is None else None
    (y,) = _GUMBEL_SOFTMAX.run(op, logits, (logits, noise, pair, tau, bool(hard)))
    return y.view(()) if dims == 0 else y if last else y.movedim(-1, dim)


def relaxed_bernoulli(
    logits: Tensor,
    tau: float = 1.0,
    hard: bool = False,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    r"""A sample of the relaxed Bernoulli (binary Concrete) distribution: :math:`\sigma((\mathrm{logits} + l) / \tau)`.

    Maddison, Mnih and Teh 2016 (arXiv 1611.00712), appendix B; as rsample of
    ``torch.distributions.RelaxedBernoulli(tau, logits=logits)``.

    Args:
        logits: log-odds, any shape and strides; float32, float64, bfloat16 or float16 (computed in float32).
        tau: temperature, above 0.
        hard: return 1 where logits + l > 0, else 0, with the gradient of the soft sample.
        noise: standard logistic numbers of logits' shape, instead of drawn ones; differentiable.
        generator: where the random pair comes from if neither noise nor rng is given; default torch's of that device.
        rng: int64 ``[2]`` on logits' device, the pair (seed, offset): the noise is then `philox_logistic` of it.

    Returns:
        Tensor of logits' shape and dtype (float32 under autocast), in [0, 1].

    Raises:
        TypeError, ValueError, RuntimeError: as `gumbel_softmax`.

    Example:
        >>> relaxed_bernoulli(torch.tensor([-9.0, 9.0]), hard=True, rng=torch.tensor([0, 0]))
        tensor([0., 1.])
    """
    op = "relaxed_bernoulli"
    logits, noise = under_autocast(logits, logits, noise)
    check_tensor(op, "logits", logits)
    tau = check_number(op, "tau", tau, above=0.0)
    noise = check_noise(op, "noise", noise, ("logits", logits))
    pair = check_rng(op, logits, generator, rng) if noise is None else None
    return _RELAXED_BERNOULLI.run(op, logits, (logits, noise, pair, tau, bool(hard)))[0]


_CATEGORICAL = Operator(
    name="categorical_sample",
    arguments=("logits", "u", "rng", "num_samples"),
    tensors=3,
    differentiable=0,
    outputs=1,
    constants=(0,),
    reference=reference.categorical_sample,
    fake=lambda logits, u, rng, num_samples: logits.new_empty((*logits.shape[:-1], num_samples), dtype=torch.int64),
)


def categorical_sample(
    logits: Tensor,
    num_samples: int | None = None,
    *,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    """Draw classes from the softmax of each row, by inversion: the first class whose cumulated probability exceeds u.

    A class of probability 0 (a logit of -inf, or one so low that its probability is no number above 0) is never drawn,
    whatever u is: it adds nothing to the cumulated probability.

    Args:
        logits: ``[..., V]`` unnormalised log-probabilities; float32, float64, bfloat16 or float16.
        num_samples: S, how many to draw from each row, independently; None: one, without a dimension of its own.
        u: uniform numbers in [0, 1), ``[...]`` or ``[..., S]``, instead of drawn ones, of any floating dtype.
        generator: where the random pair comes from if neither u nor rng is given; default torch's of logits' device.
        rng: int64 ``[2]`` on logits' device, the pair (seed, offset): sample s of row r takes uniform r S + s of it.

    Returns:
        int64 tensor ``[...]`` or ``[..., S]``, without a gradient.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating; num_samples is negative; u is not in [0, 1).
        RuntimeError: u or rng do not fit; V is 0; a row is no distribution: it has NaN or +inf, or nothing but -inf.
            (On a GPU and in the reference nobody waits to see: such a row gives -1.)

    Example:
        >>> categorical_sample(torch.tensor([0.0, -float("inf"), 0.0]), u=torch.tensor(0.5))
        tensor(2)
    """
    op = "categorical_sample"
    check_tensor(op, "logits", logits)
    if logits.dim() == 0 or logits.size(-1) == 0:
        raise RuntimeError(f"{op}: logits must be [..., V] with at least one class, got {list(logits.shape)}")
    count = 1 if num_samples is None else num_samples
    if not _is_integer(count):
        raise TypeError(f"{op}: num_samples must be an integer or None, got {type(num_samples).__name__}")
    if count < 0:
        raise ValueError(f"{op}: num_samples must not be negative, got {num_samples}")
    shape = (*logits.shape[:-1],) if num_samples is None else (*logits.shape[:-1], count)
    pair = None
    if u is not None:
        check_tensor(op, "u", u)
        if tuple(u.shape) != shape:
            raise RuntimeError(f"{op}: u must have shape {list(shape)}, got {list(u.shape)}")
        if u.device != logits.device:
            raise RuntimeError(f"{op}: u must be on {logits.device}, as logits is; got {u.device}")
        u = u.detach()
        if can_look_at(u) and not bool(((u >= 0) & (u < 1)).all()):
            raise ValueError(f"{op}: u must be in [0, 1)")
        wide = wide_dtype(logits)
        if u.dtype == torch.float64 and wide != torch.float64:  # what is just below 1 must not be rounded to 1
            u = u.to(wide).clamp(max=1.0 - 2.0**-24)
        u = u.to(wide).view(*logits.shape[:-1], count)
    else:
        pair = check_rng(op, logits, generator, rng)
    (found,) = _CATEGORICAL.run(op, logits, (logits.detach(), u, pair, count))
    return found.view(shape)


class VectorQuantized(NamedTuple):
    """What `vector_quantize` returns."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


def _fake_vector_quantize(x: Tensor, codebook: Tensor, *_: Any) -> Any:
    rows = x.shape[:-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.int64), x.new_empty(rows, dtype=wide_dtype(x))


_VECTOR_QUANTIZE = Operator(
    name="vector_quantize",
    arguments=("x", "codebook", "commitment_weight", "codebook_weight"),
    tensors=2,
    differentiable=2,
    outputs=3,
    constants=(1,),
    saved=(1,),
    reference=reference.vector_quantize,
    fake=_fake_vector_quantize,
)
_STATISTICS = Operator(
    name="vector_quantize_statistics",
    arguments=("x", "indices", "num_codes"),
    tensors=2,
    differentiable=0,
    outputs=2,
    constants=(0, 1),
    reference=reference.vector_quantize_statistics,
    fake=lambda x, indices, num_codes: (
        x.new_empty(num_codes, dtype=wide_dtype(x)),
        x.new_empty((num_codes, x.size(-1)), dtype=wide_dtype(x)),
    ),
)


def vector_quantize(
    x: Tensor, codebook: Tensor, *, commitment_weight: float = 0.25, codebook_weight: float = 1.0
) -> VectorQuantized:
    r"""The nearest code of each vector, straight-through, and the loss of vector quantisation.

    .. math::
        k = \arg\min_j |x - e_j|, \quad \mathrm{quantized} = x + \mathrm{sg}(e_k - x), \quad
        \mathrm{loss} = w_{codebook} |\mathrm{sg}(x) - e_k|^2 + w_{commitment} |x - \mathrm{sg}(e_k)|^2

    (van den Oord, Vinyals and Kavukcuoglu 2017, arXiv 1711.00937, eq. 2 and 3; sg stops gradients.) The N x K matrix of
    distances is never there.

    Args:
        x: ``[..., D]``, any strides; float32, float64, bfloat16 or float16 (computed in float32).
        codebook: ``[K, D]``, of x's dtype. Its gradient comes of the loss alone.
        commitment_weight: of the term that draws x to its code.
        codebook_weight: of the term that draws the code to x; 0 where the codebook is a moving average.

    Returns:
        ``(quantized, indices, loss)``: ``[..., D]`` of x's dtype (float32 under autocast); int64 ``[...]``, of equally
        near codes (in the arithmetic of x's dtype) the lowest; ``[...]``, float32, or float64 for float64, summed over
        D. A vector with NaN or infinity gives index 0, quantized NaN; a code with NaN is never the nearest.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating.
        RuntimeError: the sizes of D or the dtypes or devices differ; there is no code.

    Example:
        >>> vector_quantize(torch.tensor([[0.9], [0.2]]), torch.tensor([[0.0], [1.0]])).indices
        tensor([1, 0])
    """
    op = "vector_quantize"
    x, codebook = under_autocast(x, x, codebook)
    check_tensor(op, "x", x)
    check_tensor(op, "codebook", codebook, ("x", x))
    if x.dim() == 0 or codebook.dim() != 2 or codebook.size(0) == 0 or codebook.size(-1) != x.size(-1):
        raise RuntimeError(
            f"{op}: x must be [..., D] and codebook [K, D] with K > 0, got {list(x.shape)} and {list(codebook.shape)}"
        )
    weights = [
        check_number(op, "commitment_weight", commitment_weight),
        check_number(op, "codebook_weight", codebook_weight),
    ]
    return VectorQuantized(*_VECTOR_QUANTIZE.run(op, x, (x, codebook, *weights)))


def vector_quantize_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code was taken, and the sum of the vectors that took it: what a moving-average codebook needs.

    The same on every run and for any number of threads: vectors are added in their order.

    Args:
        x: ``[..., D]``.
        indices: int64 ``[...]`` in [0, K), as `vector_quantize` returns them.
        num_codes: K.

    Returns:
        ``(counts, sums)``: ``[K]`` and ``[K, D]``, float32, or float64 for float64; without a gradient.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not served; num_codes is not above 0.
        RuntimeError: indices do not fit x; an index is outside [0, K) (on the CPU).

    Example:
        >>> vector_quantize_statistics(torch.ones(3, 1), torch.tensor([1, 0, 1]), 2)[0]
        tensor([1., 2.])
    """
    op = "vector_quantize_statistics"
    check_tensor(op, "x", x)
    if not isinstance(indices, Tensor):
        raise TypeError(f"{op}: indices must be a Tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise ValueError(f"{op}: indices must be torch.int64, got {indices.dtype}")
    if x.dim() == 0 or indices.shape != x.shape[:-1] or indices.device != x.device:
        raise RuntimeError(
            f"{op}: indices must be {list(x.shape[:-1])} on {x.device}, got {list(indices.shape)} on {indices.device}"
        )
    if not _is_integer(num_codes):
        raise TypeError(f"{op}: num_codes must be an integer, got {type(num_codes).__name__}")
    if num_codes < 1:
        raise ValueError(f"{op}: num_codes must be above 0, got {num_codes}")
    counts, sums = _STATISTICS.run(op, x, (x.detach(), indices, num_codes))
    return counts, sums


# ---- for the dispatcher ----------------------------------------------------------------------------------------------


def _fake_philox(out: Tensor, rng: Tensor, noise: int) -> None:
    if rng.dtype != torch.int64 or rng.shape != (2,):
        raise RuntimeError(f"rng must be an int64 tensor (seed, offset), got {rng.dtype} {list(rng.shape)}")
    if not 0 <= noise < len(_NOISES):
        raise RuntimeError(f"noise must be between 0 and {len(_NOISES) - 1}, got {noise}")


def _register() -> None:
    registry.register_fake("genfuse::philox_", _fake_philox)
    for operator in (_GAUSSIAN, _GUMBEL_SOFTMAX, _RELAXED_BERNOULLI, _CATEGORICAL, _VECTOR_QUANTIZE, _STATISTICS):
        operator.register()


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
            entries(name, "native", ("cpu",), dtypes, objection=native_objection),
            entries(name, "triton", ("cuda",), dtypes[:1] if noise == "bits" else (*dtypes[:1], *dtypes[2:]),
                    proven=False, objection=_triton_objection),
            entries(name, "reference", (), dtypes),
        ):  # fmt: skip
            backends.register(kernel)
    served: tuple[tuple[Callable[..., Any], str, Operator], ...] = (
        (gaussian_rsample, "mean", _GAUSSIAN),
        (gaussian_rsample_kl, "mean", _GAUSSIAN),
        (gaussian_kl, "mean", _GAUSSIAN),
        (gumbel_softmax, "logits", _GUMBEL_SOFTMAX),
        (relaxed_bernoulli, "logits", _RELAXED_BERNOULLI),
        (categorical_sample, "logits", _CATEGORICAL),
        (vector_quantize, "x", _VECTOR_QUANTIZE),
        (vector_quantize_statistics, "x", _STATISTICS),
    )
    for public, subject, operator in served:
        operator.enter(public, subject)


_enter_backends()
if on_cpu:
    _register()
