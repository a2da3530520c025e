"""Affine and additive couplings: split, scale, shift, merge and log-determinant in one pass, for every convention.

The definitions are in `genfuse.reference.flow.coupling`; each function is one registered operator with the rules of
`operator.py`. Backward recomputes from the inputs, and writes the gradient of packed parameters as they are packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfuse.ops.operator import Operator, on_cpu, under_autocast
from genfuse.ops.sampling import check_number, check_tensor, same_shape
from genfuse.reference.flow import coupling as reference

__all__ = ["additive_coupling", "affine_coupling"]

# The operator's codes are places in these.
_SCALES = tuple(reference.SCALES)
_LAYOUTS = ("shift_scale", "scale_shift", "interleaved_shift_scale", "interleaved_scale_shift")
_SPLITS = ("all", "first", "second", "even", "odd", "list", "mask")
_ORDERS = ("multiply_add", "add_multiply")
# What a kind of scale takes.
_TAKES = {
    "sigmoid": ("offset", "eps"),
    "inverse_sigmoid": ("offset",),
    "softplus": ("eps", "clamp"),
    "tanh": ("clamp",),
    "atan": ("clamp",),
    "sigmoid_clamp": ("clamp",),
    "softclip": ("clamp",),
    "clip": ("clamp",),
}


def _wide(*tensors: Tensor | None) -> torch.dtype:
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _affine_reference(
    x: Tensor,
    params: Tensor,
    shift: Tensor | None,
    channels: Tensor | None,
    scale: int,
    layout: int,
    split: int,
    add_first: bool,
    inverse: bool,
    offset: float,
    eps: float,
    low: float,
    clamp: float,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    name = _SCALES[scale]
    return reference.affine_coupling(
        x,
        params,
        shift,
        scale=name,
        layout=_LAYOUTS[layout],
        order=_ORDERS[add_first],
        split=_SPLITS[split] if channels is None else channels,
        inverse=inverse,
        offset=offset,
        eps=eps,
        clamp=(low, clamp) if name == "clip" else clamp,
        reduce=reduce,
    )


def _affine_fake(x: Tensor, params: Tensor, shift: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(x.shape[:1] if rest[-1] else x.shape, dtype=_wide(x, params, shift))
    return x.new_empty(x.shape), sums


_AFFINE = Operator(
    name="affine_coupling",
    arguments=(
        *("x", "params", "shift", "channels"),
        *("scale", "layout", "split", "add_first", "inverse", "offset", "eps", "low", "clamp", "reduce"),
    ),
    tensors=4,
    differentiable=3,
    outputs=2,
    reference=_affine_reference,
    fake=_affine_fake,
    module="flow",
)


def _additive_reference(
    x: Tensor, shift: Tensor, channels: Tensor | None, split: int, inverse: bool
) -> tuple[Tensor, ...]:
    where = _SPLITS[split] if channels is None else channels
    return (reference.additive_coupling(x, shift, split=where, inverse=inverse),)


_ADDITIVE = Operator(
    name="additive_coupling",
    arguments=("x", "shift", "channels", "split", "inverse"),
    tensors=3,
    differentiable=2,
    outputs=1,
    reference=_additive_reference,
    fake=lambda x, shift, channels, split, inverse: x.new_empty(x.shape),
    module="flow",
)


def _one_of(op: str, name: str, value: object, choices: tuple[str, ...]) -> int:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices.index(value)


def _check_flag(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    return value


def check_rows(op: str, x: Tensor) -> Tensor:
    check_tensor(op, "x", x)
    if x.dim() < 2:
        raise RuntimeError(f"{op}: x must have at least 2 dimensions, [B, C, ...], got {list(x.shape)}")
    return x


def _check_split(op: str, x: Tensor, split: object) -> tuple[int, Tensor | None, int]:
    """Its code, the channels that come as a tensor, and how many are transformed."""
    channels = x.shape[1]
    if isinstance(split, Tensor):
        if split.device != x.device:
            raise RuntimeError(f"{op}: split must be on {x.device}, as x is; got {split.device}")
        if split.dtype == torch.bool:
            row = x.shape[1:]
            if not same_shape(split.shape, row):
                try:
                    split = split.expand(row)
                except RuntimeError:
                    raise RuntimeError(
                        f"{op}: a mask must broadcast with a batch row of x, {list(row)}; got {list(split.shape)}"
                    ) from None
            return 6, split, channels
        if split.dtype != torch.int64:
            raise ValueError(f"{op}: split must be a bool mask or int64 channels, got {split.dtype}")
        if split.dim() != 1:
            raise RuntimeError(f"{op}: the channels of split must be a vector, got {list(split.shape)}")
        return 5, split, split.shape[0]
    code = _one_of(op, "split", split, _SPLITS[:5]) if isinstance(split, str) else -1
    if code < 0:
        raise TypeError(f"{op}: split must be a str or a Tensor, got {type(split).__name__}")
    middle = (channels + 1) // 2
    return code, None, (channels, middle, channels - middle, middle, channels - middle)[code]


def _check_parameter(op: str, name: str, value: object, x: Tensor, channels: int) -> Tensor:
    """A floating tensor that broadcasts to x's shape but for its number of channels. Its dtype may be another."""
    tensor = check_tensor(op, name, value)
    if tensor.device != x.device:
        raise RuntimeError(f"{op}: {name} must be on {x.device}, as x is; got {tensor.device}")
    shape = torch.Size((x.shape[0], channels, *x.shape[2:]))
    if same_shape(tensor.shape, shape):
        return tensor
    try:
        if tensor.dim() != x.dim() or tensor.shape[1] != channels:
            raise RuntimeError
        return tensor.expand(shape)
    except RuntimeError:
        raise RuntimeError(
            f"{op}: {name} must be {list(shape)}, of the split's channels of x, {list(x.shape)}, or broadcast to it "
            f"over the batch and the positions; got {list(tensor.shape)}"
        ) from None


def _check_constants(
    op: str, scale: str, offset: object, eps: object, clamp: object
) -> tuple[float, float, float, float]:
    for name, value in (("offset", offset), ("eps", eps), ("clamp", clamp)):
        if value is not None and name not in _TAKES.get(scale, ()):
            raise ValueError(f"{op}: scale={scale!r} takes no {name}, got {value!r}")
    offset, eps, low, high = reference.constants(scale, offset, eps, clamp)  # type: ignore[arg-type]
    offset = check_number(op, "offset", offset)
    eps = check_number(op, "eps", eps, least=0.0)
    if clamp is None:
        return offset, eps, low, high
    if scale == "clip":
        if not isinstance(clamp, tuple) or len(clamp) != 2:
            raise TypeError(f"{op}: clamp must be a pair (lowest, highest) for scale='clip', got {clamp!r}")
        low, high = check_number(op, "clamp", low), check_number(op, "clamp", high)
        if not low <= high:
            raise ValueError(f"{op}: clamp must be (lowest, highest), got {clamp}")
        return offset, eps, low, high
    high = check_number(op, "clamp", clamp, above=0.0)
    if scale == "softclip" and high >= 1.0:
        raise ValueError(f"{op}: clamp must be below 1 for scale='softclip', the least slope; got {clamp}")
    return offset, eps, low, high


def affine_coupling(
    x: Tensor,
    params: Tensor,
    shift: Tensor | None = None,
    *,
    scale: str = "exp",
    layout: str = "shift_scale",
    order: str = "multiply_add",
    split: str | Tensor = "all",
    inverse: bool = False,
    offset: float | None = None,
    eps: float | None = None,
    clamp: float | tuple[float, float] | None = None,
    reduce: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""The affine coupling of flows: y = x s + t on some channels, the others as they are, and ln \|det dy/dx\|.

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803), eq. 7 and 8; Kingma and Dhariwal 2018 (arXiv 1807.03039),
    table 1. s is a function of a raw scale r; r and t come from a network that sees the other channels alone:

    ================= ================================== =========================================================
    ``scale``         s                                  options
    ================= ================================== =========================================================
    exp               e^r
    sigmoid           sigmoid(r + offset) + eps          ``offset=2``, ``eps=0``
    inverse_sigmoid   1 / sigmoid(r + offset)            ``offset=2``
    softplus          min(softplus(r) + eps, clamp)      ``eps=1e-3``, ``clamp``: none by default
    tanh              e^(clamp tanh r)                   ``clamp=2``
    atan              e^(clamp 0.636 atan r)             ``clamp=2``
    sigmoid_clamp     e^(clamp (2 sigmoid(r) - 1))       ``clamp=2``
    softclip          e^(r / (1 + \|r / ln clamp\|))       ``clamp=1e-3``, the least slope
    clip              e^(r within clamp)                 ``clamp=(-5, 3)``; the gradient passes through the clip
    ================= ================================== =========================================================

    Which arguments give what others compute (each ``inverse`` as theirs, but for the last column):

    ====================================== ==================================================== ======================
    peer                                   arguments                                            their inverse is ours
    ====================================== ==================================================== ======================
    nflows AffineCouplingTransform         ``scale="sigmoid", eps=1e-3``, split by its mask     inverse
    the same, general activation           ``scale="softplus", clamp=3.0``                      inverse
    nflows MAF (params of [B, 2 D])        ``scale="softplus",``                                a loop
                                           ``layout="interleaved_scale_shift", split="all"``
    normflows AffineCouplingBlock, "exp"   ``layout="interleaved_shift_scale", split="second"`` inverse
    the same, "sigmoid"                    the same and ``scale="inverse_sigmoid"``             inverse
    the same, "sigmoid_inv"                the same and ``scale="sigmoid"``                     inverse
    normflows MaskedAffineFlow(b, t, s)    ``s, shift=t, split=~b.bool()``                      inverse
    zuko MonotonicAffineTransform          ``scale="softclip"``: ``scale, shift=shift``         inverse
    FrEIA GLOWCouplingBlock, each half     ``scale="atan", layout="scale_shift"``               inverse
                                           ("tanh", "sigmoid_clamp": the other activations)
    pyro AffineCoupling                    ``scale="clip"``: ``log_scale, shift=mean``          inverse
    Glow (openai)                          ``scale="sigmoid", order="add_multiply",``           inverse
                                           ``layout="interleaved_shift_scale"``
    Glow (rosinality)                      the same but ``layout="scale_shift"``                inverse
    RealNVP (chrischute)                   ``order="add_multiply"``: ``s, shift=t``             inverse
    ====================================== ==================================================== ======================

    (normflows' ``forward`` is from latent to data, so in training it calls its inverse.)

    Args:
        x: ``[B, C, *S]``, any strides; float32, float64, bfloat16 or float16; differentiable, as params and shift.
        params: ``[B, 2 Ct, *S]`` for Ct transformed channels: shift and raw scale in ``layout``, in the order of the
            transformed channels. With ``shift`` the raw scale alone, ``[B, Ct, *S]``. Read where it lies; may
            broadcast over the batch and the positions. Of x's dtype or another.
        shift: t, ``[B, Ct, *S]``.
        scale: a kind of scale.
        layout: how params lies along dimension 1: "shift_scale", "scale_shift" (halves), "interleaved_shift_scale" or
            "interleaved_scale_shift" (t and r of each channel side by side).
        order: "multiply_add", x s + t, or "add_multiply", (x + t) s.
        split: which channels are transformed: "all", "first" (the first half, the larger one of an odd number),
            "second" (the rest), "even" (0, 2, ...), "odd"; an int64 vector of channels; or a bool mask that
            broadcasts with x[0], for which Ct = C and parameters of what is not transformed do not matter.
        inverse: the inverse transform: (x - t) / s, or x / s - t.
        offset, eps, clamp: numbers of the kind of scale.
        reduce: sum the log-determinant over all but the batch.

    Returns:
        ``(y, log_abs_det)``: y of x's shape and dtype; log_abs_det ``[B]``, or if not ``reduce`` of x's shape (0 where
        nothing is transformed), of the direction taken; float32, or float64 if an argument is float64 (which is what
        is computed in; half types are computed in float32). It is made of ln s as it follows from r, never of the
        logarithm of an s that may vanish. NaN in gives NaN out, in its own element and row.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype that is not floating; an unknown scale, layout, order or split; a number out of its range,
            or one that this scale does not take.
        RuntimeError: shapes or devices do not fit; channels that x lacks, or one twice.

    Example:
        >>> x, params = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])  # t = 3 and s = e^0 of channel 1
        >>> affine_coupling(x, params, split="second")
        (tensor([[1., 5.]]), tensor([0.]))
    """
    op = "affine_coupling"
    code, layout_code = _one_of(op, "scale", scale, _SCALES), _one_of(op, "layout", layout, _LAYOUTS)
    add_first = _one_of(op, "order", order, _ORDERS) == 1
    _check_flag(op, "inverse", inverse)
    _check_flag(op, "reduce", reduce)
    x, params, shift = under_autocast(x, x, params, shift)
    check_rows(op, x)
    where, channels, moved = _check_split(op, x, split)
    params = _check_parameter(op, "params", params, x, moved if shift is not None else 2 * moved)
    if shift is not None:
        shift = _check_parameter(op, "shift", shift, x, moved)
    offset, eps, low, high = _check_constants(op, scale, offset, eps, clamp)
    arguments = (
        *(x, params, shift, channels),
        *(code, layout_code, where, add_first, inverse, offset, eps, low, high, reduce),
    )
    y, log_abs_det = _AFFINE.run(op, x, arguments)
    return y, log_abs_det


def additive_coupling(x: Tensor, shift: Tensor, *, split: str | Tensor = "all", inverse: bool = False) -> Tensor:
    """The additive coupling of flows: y = x + t on some channels, the others as they are; its determinant is 1.

    Dinh, Krueger and Bengio 2015 (arXiv 1410.8516), eq. 11.

    Args:
        x: ``[B, C, *S]``, any strides; float32, float64, bfloat16 or float16; differentiable, as shift.
        shift: t, ``[B, Ct, *S]`` for Ct transformed channels. May broadcast over the batch and the positions. Of x's
            dtype or another.
        split: which channels are transformed, as for `affine_coupling`.
        inverse: x - t.

    Returns:
        y, of x's shape and dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `affine_coupling`.

    Example:
        >>> additive_coupling(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), split="second")
        tensor([[1., 5.]])
    """
    op = "additive_coupling"
    _check_flag(op, "inverse", inverse)
    x, shift = under_autocast(x, x, shift)
    check_rows(op, x)
    where, channels, moved = _check_split(op, x, split)
    shift = _check_parameter(op, "shift", shift, x, moved)
    (y,) = _ADDITIVE.run(op, x, (x, shift, channels, where, inverse))
    return y


for _one, _function in ((_AFFINE, affine_coupling), (_ADDITIVE, additive_coupling)):
    _one.enter(_function, "x")
    if on_cpu:
        _one.register()
