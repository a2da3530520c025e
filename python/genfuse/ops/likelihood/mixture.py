"""Mixtures of discretised logistics: the likelihood of pixels in one pass, and pixels drawn.

The definitions are in `genfuse.reference.likelihood.mixture`; each function is one registered operator with the rules
of `operator.py`. Backward computes everything anew from the inputs, and writes the gradient as the parameters lie.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfuse.ops.operator import Operator, can_look_at, float64_objection, on_cpu, under_autocast
from genfuse.ops.sampling import check_number, check_rng, check_tensor, wide_dtype
from genfuse.reference.likelihood import mixture as reference

__all__ = ["discretized_logistic_mixture_nll", "discretized_logistic_mixture_sample"]

# The operators' codes are places in these.
_LAYOUTS = reference.LAYOUTS
_MODES = ("exact", "openai")
_REDUCTIONS = ("none", "pixel", "sum", "mean", "bits_per_dim")
_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def one_of(op: str, name: str, value: object, choices: tuple[str, ...]) -> int:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices.index(value)


def reduced(nll: Tensor, reduction: str, dims: int) -> Tensor:
    """Nats of images, or of pixels, as they were asked for; `dims` are the dimensions of an image."""
    if reduction == "sum":
        return nll.sum()
    if reduction == "mean":
        return nll.mean()
    if reduction == "bits_per_dim":
        return nll.mean() * (1.0 / (math.log(2.0) * max(dims, 1)))
    return nll


def check_reduction(op: str, reduction: object) -> str:
    return _REDUCTIONS[one_of(op, "reduction", reduction, _REDUCTIONS)]


def _check_integer(op: str, name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low} and {high}, got {value}")
    return value


def _per_component(channels: int) -> int:
    return 1 + 3 * channels if channels > 1 else 3


def _check_layout(op: str, layout: object, channels: int) -> int:
    code = one_of(op, "layout", layout, _LAYOUTS)
    if layout == "wavenet" and channels != 1:
        raise ValueError(f"{op}: layout='wavenet' is of 1 channel, got {channels}")
    return code


def _check_parameters(op: str, params: Tensor, channels: int) -> None:
    if params.shape[1] == 0 or params.shape[1] % _per_component(channels) != 0:
        raise RuntimeError(
            f"{op}: params must have {_per_component(channels)} M channels in dimension 1 for {channels} of x (M "
            f"components), got {list(params.shape)}"
        )


def _nll_reference(
    x: Tensor, params: Tensor, bits: int, openai: bool, layout: int, log_scale_min: float, by_pixel: bool
) -> tuple[Tensor]:
    return reference.discretized_logistic_mixture_nll(
        x, params, bits, openai, _LAYOUTS[layout], log_scale_min, by_pixel
    )


def _wide(x: Tensor, params: Tensor) -> torch.dtype:
    return torch.promote_types(wide_dtype(x), wide_dtype(params))


def _nll_fake(x: Tensor, params: Tensor, *options: Any) -> Tensor:
    shape = (x.shape[0], *x.shape[2:]) if options[-1] else x.shape[:1]
    return params.new_empty(shape, dtype=_wide(x, params))


_NLL = Operator(
    name="discretized_logistic_mixture_nll",
    arguments=("x", "params", "bits", "openai", "layout", "log_scale_min", "by_pixel"),
    tensors=2,
    differentiable=2,
    outputs=1,
    reference=_nll_reference,
    fake=_nll_fake,
    fake_gradient=lambda index, tensor: torch.empty_like(tensor),
    module="likelihood",
)


def _sample_reference(
    params: Tensor,
    u: Tensor | None,
    rng: Tensor | None,
    channels: int,
    bits: int,
    layout: int,
    log_scale_min: float,
    temperature: float,
    snap: bool,
) -> tuple[Tensor]:
    return reference.discretized_logistic_mixture_sample(
        params, u, rng, channels, bits, _LAYOUTS[layout], log_scale_min, temperature, snap
    )


def _sample_fake(params: Tensor, u: Tensor | None, rng: Tensor | None, channels: int, *options: Any) -> Tensor:
    return params.new_empty((params.shape[0], channels, *params.shape[2:]), dtype=wide_dtype(params))


_SAMPLE = Operator(
    name="discretized_logistic_mixture_sample",
    arguments=("params", "u", "rng", "channels", "bits", "layout", "log_scale_min", "temperature", "snap"),
    tensors=3,
    differentiable=0,
    outputs=1,
    constants=(0,),
    reference=_sample_reference,
    fake=_sample_fake,
    module="likelihood",
)


def _levels_as_values(op: str, x: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Values in [-1, 1] of levels 0 to 2^bits - 1."""
    last = 2**bits - 1
    if x.dtype not in _INTEGERS:
        raise ValueError(f"{op}: x must be of a floating dtype, or uint8, int16, int32 or int64; got {x.dtype}")
    if can_look_at(x) and x.numel() > 0 and not (x.dtype == torch.uint8 and last >= 255):
        low, high = (int(value) for value in torch.aminmax(x))
        if low < 0 or high > last:
            raise ValueError(f"{op}: x must hold levels in [0, {last}] for bits={bits}, got {low if low < 0 else high}")
    values: Tensor = (2.0 * x.to(dtype) - last) / last
    return values


def discretized_logistic_mixture_nll(
    x: Tensor,
    params: Tensor,
    *,
    bits: int = 8,
    mode: str = "exact",
    layout: str = "openai",
    log_scale_min: float = -7.0,
    reduction: str = "none",
) -> Tensor:
    r"""Negative log-likelihood of pixels under mixtures of discretised logistics, the output of PixelCNN++.

    .. math:: -\ln \sum_m \pi_m \prod_c \left(\sigma\left(\frac{x_c + h - \mu_{mc}}{s_{mc}}\right)
        - \sigma\left(\frac{x_c - h - \mu_{mc}}{s_{mc}}\right)\right), \quad h = \frac{1}{2^\mathrm{bits} - 1}

    Salimans, Karpathy, Chen and Kingma 2017 (arXiv 1701.05517), eq. 1 to 3. The bins of the lowest and the highest
    level reach to infinity. Of three channels the means are coupled: green's is that of params plus a coefficient times
    red, blue's the same with red and green; the coefficients are tanh of params. One pass forward and one backward,
    which keeps the inputs alone.

    ``mode="exact"`` computes the difference as :math:`\sigma(a) \sigma(-b) (1 - e^{b - a})`, which no scale and no
    distance cancels or rounds to 0: the levels' probabilities sum to 1, and every pixel has a gradient. The published
    code, ``mode="openai"``, takes the difference of two sigmoids where it is above 1e-5 and else the density in the
    middle of the bin times its width, which is off by up to 2 nats a channel at ``log_scale_min``; its edges are
    x < -0.999 and x > 0.999. (Here, too, the difference itself is computed without cancellation.)

    What follows the M logits in ``params``, by ``layout``:

    ============ ============================================================== ======================================
    layout       parameters                                                     as in
    ============ ============================================================== ======================================
    openai       for each channel: M means, M log-scales, M coefficients        openai/pixel-cnn, vdvae, NVAE
    pixel_models M means, M log-scales, M coefficients, each [M][channel]       kamenbliznashki/pixel_models
    flax         [channel][M][mean, scale, coefficient]; the inverse scale is   google/flax, examples/pixelcnn
                 max(softplus(scale), 1e-7), and ``log_scale_min`` has no part
    wavenet      M means, M log-scales (of 1 channel)                           r9y9/wavenet_vocoder
    ============ ============================================================== ======================================

    Of the three coefficients of a component the first couples green to red, the others blue to red and to green. One
    channel has no coefficients, in any layout.

    Args:
        x: ``[B, C, *S]`` in [-1, 1], C = 3 or 1, any number of dimensions in S (audio: ``[B, 1, T]``); float32,
            float64, bfloat16 or float16; differentiable. Or levels 0 to 2^bits - 1 as uint8, int16, int32 or int64.
            (bfloat16 holds 8 bits' values only to half a bin. Give levels where the input is rounded.)
        params: ``[B, 10 M, *S]`` for C = 3, ``[B, 3 M, *S]`` for C = 1, contiguous or channels last; a floating dtype,
            which may be another than x's; differentiable. Computed in float32, in float64 if one of both is float64.
        bits: of a level, 1 to 24.
        mode: "exact", or "openai": the published formula.
        layout: how the parameters lie, see above.
        log_scale_min: the least log-scale; lower ones have no gradient.
        reduction: "none": nats of each image, ``[B]``; "pixel": of each pixel, ``[B, *S]``; "sum" and "mean" of the
            former over the batch; "bits_per_dim": the mean, divided by ln 2 and by an image's number of elements.

    Returns:
        float32, or float64 if x or params are. A component whose logit is -infinity has no part in the result,
        whatever its other parameters; NaN in anything else is NaN for that pixel.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an unknown mode, layout or reduction; a dtype or number out of range; levels that are none.
        RuntimeError: shapes do not fit; devices differ.

    Example:
        >>> levels = torch.arange(256).view(256, 1, 1)
        >>> params = torch.tensor([0.0, 1.0, -0.3, 0.8, -5.0, -2.0]).view(1, 6, 1).expand(256, 6, 1)
        >>> torch.exp(-discretized_logistic_mixture_nll(levels, params)).sum()
        tensor(1.0000)
    """
    op = "discretized_logistic_mixture_nll"
    x, params = under_autocast(params, x, params)
    check_tensor(op, "params", params)
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}")
    if x.device != params.device:
        raise RuntimeError(f"{op}: x must be on {params.device}, as params is; got {x.device}")
    if x.dim() < 2 or x.shape[1] not in (1, 3):
        raise RuntimeError(f"{op}: x must be [B, C, ...] with 1 or 3 channels, got {list(x.shape)}")
    if x.dim() != params.dim() or x.shape[0] != params.shape[0] or x.shape[2:] != params.shape[2:]:
        raise RuntimeError(
            f"{op}: params must have the shape of x, {list(x.shape)}, but for the number of channels; got "
            f"{list(params.shape)}"
        )
    channels = 3 if x.shape[1] == 3 else 1
    _check_integer(op, "bits", bits, 1, 24)
    openai = one_of(op, "mode", mode, _MODES) == 1
    code = _check_layout(op, layout, channels)
    _check_parameters(op, params, channels)
    log_scale_min = check_number(op, "log_scale_min", log_scale_min)
    check_reduction(op, reduction)
    if not x.is_floating_point():
        x = _levels_as_values(op, x, bits, wide_dtype(params))
    check_tensor(op, "x", x)
    options = (bits, openai, code, log_scale_min, reduction == "pixel")
    (nll,) = _NLL.run(op, params, (x, params, *options))
    return nll if reduction in ("none", "pixel") else reduced(nll, reduction, math.prod(x.shape[1:]))


def _infer_channels(op: str, params: Tensor, layout: object, u: Tensor | None) -> int:
    if u is not None and u.dim() > 1 and u.shape[1] in (2, 4):
        return int(u.shape[1]) - 1
    if layout == "wavenet":
        return 1
    fits = [channels for channels in (3, 1) if params.shape[1] % _per_component(channels) == 0]
    if len(fits) > 1:
        raise ValueError(
            f"{op}: params has {params.shape[1]} channels, of {params.shape[1] // 10} components of 3 channels or of "
            f"{params.shape[1] // 3} of 1: say which by channels="
        )
    return fits[0] if fits else 3


def discretized_logistic_mixture_sample(
    params: Tensor,
    *,
    channels: int | None = None,
    bits: int = 8,
    layout: str = "openai",
    log_scale_min: float = -7.0,
    temperature: float = 1.0,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    snap: bool = True,
) -> Tensor:
    r"""Draw pixels from mixtures of logistics, as PixelCNN++ does (arXiv 1701.05517, section 2.2).

    A component is chosen by inversion in the order of the components, as `categorical_sample` does: the first whose
    cumulated probability exceeds the first uniform. Each channel is :math:`\mu + s (\ln u - \ln(1 - u))`, clamped to
    [-1, 1], with u clamped to [1e-5, 1 - 1e-5]. The means of green and blue take the channels before them as they were
    drawn: clamped and, with ``snap``, rounded.

    Args:
        params: ``[B, 10 M, *S]`` for three channels, ``[B, 3 M, *S]`` for one, as for
            `discretized_logistic_mixture_nll`; float32, float64, bfloat16 or float16 (computed in float32).
        channels: C, 3 or 1; None: by the channels of u or the layout, or by the number of parameters if it is a
            multiple of 10 or of 3 but not of both.
        bits: of a level, 1 to 24.
        layout: how the parameters lie.
        log_scale_min: the least log-scale. (The published sampler of audio has none by default.)
        temperature: divides the logits and multiplies the scales; above 0, and a normal number of the result's dtype
            (float32: at least 1.2e-38).
        u: uniform numbers in [0, 1), ``[B, 1 + C, *S]``, instead of drawn ones, of any floating dtype.
        generator: where the random pair comes from if neither u nor rng is given; default torch's of params' device.
        rng: int64 ``[2]`` on params' device, the pair (seed, offset): u is then `philox_uniform` of it.
        snap: round to the nearest of the 2^bits levels. (The published sampler does not.)

    Returns:
        ``[B, C, *S]`` in [-1, 1], without a gradient: float32, or float64 for float64. NaN where a pixel's logits are
        no distribution: NaN, +infinity, or nothing but -infinity.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an unknown layout; a dtype or number out of range; u is not in [0, 1); channels is None, and could
            be both.
        RuntimeError: shapes do not fit; devices differ.

    Example:
        >>> params = torch.tensor([-9.0, 0.0, 0.25, 0.75, -5.0, -5.0]).view(1, 6, 1)
        >>> discretized_logistic_mixture_sample(params, u=torch.full((1, 2, 1), 0.5))
        tensor([[[0.7490]]])
    """
    op = "discretized_logistic_mixture_sample"
    (params,) = under_autocast(params, params)
    check_tensor(op, "params", params)
    if params.dim() < 2:
        raise RuntimeError(f"{op}: params must have at least 2 dimensions, [B, P, ...], got {list(params.shape)}")
    if u is not None:
        check_tensor(op, "u", u)
    if channels is None:
        channels = _infer_channels(op, params, layout, u)
    elif isinstance(channels, bool) or not isinstance(channels, int):
        raise TypeError(f"{op}: channels must be an int or None, got {type(channels).__name__}")
    if channels not in (1, 3):
        raise ValueError(f"{op}: channels must be 1 or 3, got {channels}")
    _check_integer(op, "bits", bits, 1, 24)
    code = _check_layout(op, layout, channels)
    _check_parameters(op, params, channels)
    log_scale_min = check_number(op, "log_scale_min", log_scale_min)
    temperature = check_number(op, "temperature", temperature, above=0.0)
    range_ = torch.finfo(wide_dtype(params))
    if not range_.tiny <= temperature <= range_.max:
        name = str(range_.dtype).rpartition(".")[2]
        raise ValueError(f"{op}: temperature must be within {name}'s normal numbers, got {temperature}")
    if not isinstance(snap, bool):
        raise TypeError(f"{op}: snap must be a bool, got {type(snap).__name__}")
    pair = None
    if u is not None:
        shape = (params.shape[0], 1 + channels, *params.shape[2:])
        if tuple(u.shape) != shape:
            raise RuntimeError(f"{op}: u must have shape {list(shape)}, got {list(u.shape)}")
        if u.device != params.device:
            raise RuntimeError(f"{op}: u must be on {params.device}, as params is; got {u.device}")
        u = u.detach()
        if can_look_at(u) and not bool(((u >= 0) & (u < 1)).all()):
            raise ValueError(f"{op}: u must be in [0, 1)")
        wide = wide_dtype(params)
        if u.dtype == torch.float64 and wide != torch.float64:  # what is just below 1 must not be rounded to 1
            u = u.to(wide).clamp(max=1.0 - 2.0**-24)
        u = u.to(wide)
    else:
        pair = check_rng(op, params, generator, rng)
    options = (channels, bits, code, log_scale_min, temperature, snap)
    (x,) = _SAMPLE.run(op, params, (params.detach(), u, pair, *options))
    return x


for _one, _function in ((_NLL, discretized_logistic_mixture_nll), (_SAMPLE, discretized_logistic_mixture_sample)):
    _one.enter(_function, "params", triton=float64_objection)
    if on_cpu:
        _one.register()
