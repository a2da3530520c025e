"""Recurrent operators: LSTM and GRU over whole sequences, their decoding loops, and the output head's loss.

One call is one layer in one direction over a whole sequence, and one registered operator (`torch.ops.genfuse.lstm`,
`gru`), so that `torch.compile` sees one node whatever the length.

A tour of the file. A public function checks its arguments, takes autocast into account and picks a backend. `_run`
calls the registered operator in the cheapest way that is right: below autograd where no gradient is wanted, through a
slim `autograd.Function` where one is (`register_autograd` costs three times as much), and through the dispatcher under
compile and functorch. The rules for the dispatcher, which also serve direct callers of `torch.ops.genfuse`, are
registered at the end: fake kernels, autograd, autocast, vmap. `_Layer` holds what differs between LSTM and GRU in all
of them. Backward is an operator of its own, whose derivative differentiates the reference: so derivatives of any order
exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import library as registry
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from genfuse import _native, backends
from genfuse.reference import random as reference_random
from genfuse.reference import recurrent as reference

__all__ = ["gru", "gru_generate", "linear_cross_entropy", "lstm", "lstm_generate"]

State = tuple[Tensor, Tensor]
_Tensors = tuple[Tensor, ...]

_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_VF: Any = torch._VF
_functorch_top = torch._C._functorch.peek_interpreter_stack
_Transform = torch._C._functorch.TransformType
_any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
_any_autocast = torch._C._is_any_autocast_enabled
_cudnn_is_available: Callable[[], bool] = torch.backends.cudnn.is_available
_is_compiling = torch.compiler.is_compiling
_forced_backend = backends.forced
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


# ---- what differs between the layers ---------------------------------------------------------------------------------


@dataclass
class _Layer:
    """An operator pair `name`, `name_backward`, and how its arguments and results are laid out.

    forward(*tensors, *options, save) -> (y, *states, *reserves)
    backward(grad_y, *grad_states, *tensors, y, *reserves, *options, needs_x, needs_weights) -> gradients
    """

    name: str
    arguments: tuple[str, ...]  # names of tensors and options, as in the reference's signature
    tensors: int  # how many of the arguments are tensors (x, states, weights, then batch_sizes, resets, rng)
    differentiable: int  # how many of those take a gradient
    states: int  # 2: h and c, 1: h
    reserves: int
    gradients: tuple[tuple[int, ...], ...]  # for each result of backward, the inputs whose gradient it is
    reference: Callable[..., _Tensors]
    op: Any = None  # the registered operators; None where the native library is absent
    op_backward: Any = None
    on_cpu: bool = False  # whether they have a CPU kernel

    @property
    def weights(self) -> range:
        """Indices of the weights among the tensors."""
        return range(1 + self.states, self.differentiable)

    def run_reference(self, arguments: Sequence[Any]) -> _Tensors:
        """The reference, by the operator's positional arguments (`save` left out)."""
        return self.reference(**dict(zip(self.arguments, arguments, strict=True)))


_LSTM = _Layer(
    name="lstm",
    arguments=(
        *("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"),
        *("ln_ih_weight", "ln_hh_weight", "ln_c_weight", "ln_c_bias", "batch_sizes", "resets", "rng"),
        *("zoneout_h", "zoneout_c", "weight_drop", "input_dropout", "output_dropout", "eps", "training", "reverse"),
    ),
    tensors=15,
    differentiable=12,
    states=2,
    reserves=5,
    gradients=((0,), (1,), (2,), (3,), (4,), (5, 6), (7,), (8,), (9,), (10,), (11,)),
    reference=reference.lstm,
)
_GRU = _Layer(
    name="gru",
    arguments=(
        *("x", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "batch_sizes", "resets", "rng"),
        *("zoneout_h", "weight_drop", "input_dropout", "output_dropout", "training", "reverse"),
    ),
    tensors=9,
    differentiable=6,
    states=1,
    reserves=2,
    gradients=((0,), (1,), (2,), (3,), (4,), (5,)),
    reference=reference.gru,
)


# ---- arguments: fast tests that they fit, slow explanations of what does not -----------------------------------------
# A public function tests everything in one expression; if it is false, `_explain` finds the culprit and raises. The
# kinds of exception are those of torch.nn.LSTM: RuntimeError for shapes, devices and dtypes that differ, ValueError for
# dtypes that are not served and for values, TypeError for types.


def _explain(
    op: str,
    tensors: Sequence[tuple[str, object, tuple[tuple[str, int | None], ...]]],
    probabilities: Sequence[tuple[str, object]] = (),
) -> None:
    """Raise for the first tensor or probability that does not fit; return if all fit.

    A tensor comes with its dimensions, each a letter and the size that it must have (None: any). The first tensor's
    dtype and device are wanted of all.
    """
    first_name, first, _ = tensors[0]
    for name, value, wanted in tensors:
        letters = "[" + ", ".join(letter for letter, _ in wanted) + "]"
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor {letters}, got {type(value).__name__}")
        have = list(value.shape)
        if len(have) != len(wanted):
            raise RuntimeError(f"{op}: {name} must have {len(wanted)} dimensions, {letters}; got {len(have)}: {have}")
        if any(size is not None and size != got for got, (_, size) in zip(have, wanted, strict=True)):
            sizes = "[" + ", ".join("*" if size is None else str(size) for _, size in wanted) + "]"
            raise RuntimeError(f"{op}: {name} must be {letters} = {sizes}; got {have}")
        if value.dtype not in _DTYPES:
            raise ValueError(
                f"{op}: {name} must be of a floating dtype (float32, float64, bfloat16 or float16), got {value.dtype}"
            )
        assert isinstance(first, Tensor)  # it was the first to be tested
        if value.dtype != first.dtype:
            raise RuntimeError(
                f"{op}: {name} must be {first.dtype}, the dtype of {first_name}; got {value.dtype}. Convert one."
            )
        if value.device != first.device:
            raise RuntimeError(f"{op}: {name} must be on {first.device}, as {first_name} is; got {value.device}")
    for name, p in probabilities:
        if not isinstance(p, (int, float)):
            raise TypeError(f"{op}: {name} must be a float, got {type(p).__name__}")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"{op}: {name} must be a probability in [0, 1], got {p}")


def _check_eps(op: str, eps: object) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")


def _check_generator(op: str, generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}")


def _want_units(op: str, weight_hh: Tensor) -> None:
    if weight_hh.size(0) == 0:
        raise RuntimeError(f"{op}: weight_hh must have at least one unit, got {list(weight_hh.shape)}")


def _size(value: object, dim: int) -> int | None:
    """A tensor's size, None if it is no tensor or has no such dimension."""
    return value.size(dim) if isinstance(value, Tensor) and -value.dim() <= dim < value.dim() else None


def _check_sequence(
    op: str, x: Tensor, h0: Tensor, batch_sizes: Tensor | None, resets: Tensor | None, rng: Tensor | None
) -> None:
    """Check what describes the sequence: its length, `batch_sizes`, `resets` and `rng`."""
    for name, value in (("batch_sizes", batch_sizes), ("resets", resets), ("rng", rng)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if batch_sizes is None and x.size(0) == 0:
        raise RuntimeError(f"{op}: Expected sequence length to be larger than 0 in RNN; x is {list(x.shape)}")
    if resets is not None:
        if batch_sizes is not None:
            raise ValueError(f"{op}: resets is for the dense layout, it cannot be given together with batch_sizes")
        if resets.dtype != torch.bool:
            raise ValueError(f"{op}: resets must be torch.bool, got {resets.dtype}")
        if resets.shape != x.shape[:2]:
            raise RuntimeError(f"{op}: resets must be [T, B] = {list(x.shape[:2])}, got {list(resets.shape)}")
        if resets.device != x.device:
            raise RuntimeError(f"{op}: resets must be on {x.device}, as x is; got {resets.device}")
    if rng is not None:
        if rng.dtype != torch.int64:
            raise ValueError(f"{op}: rng must be torch.int64, got {rng.dtype}")
        if rng.shape != (2,):
            raise RuntimeError(f"{op}: rng must be [2], the pair (seed, offset); got {list(rng.shape)}")
        if rng.device != x.device:
            raise RuntimeError(f"{op}: rng must be on {x.device}, as x is; got {rng.device}")
    if batch_sizes is not None:
        if batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
            raise ValueError(
                f"{op}: batch_sizes must be torch.int64 on the CPU, got {batch_sizes.dtype} on {batch_sizes.device}"
            )
        if batch_sizes.dim() != 1 or batch_sizes.size(0) == 0:
            raise RuntimeError(f"{op}: batch_sizes must be [T] with T > 0, got {list(batch_sizes.shape)}")
        if _has_values(batch_sizes):
            _check_batch_sizes(op, x, h0, batch_sizes.tolist())


def _has_values(tensor: Tensor) -> bool:
    """Whether there are values to look at: not in a tensor that is traced, fake or transformed."""
    return not _is_compiling() and type(tensor) is Tensor and _functorch_top() is None


def _check_batch_sizes(op: str, x: Tensor, h0: Tensor, counts: list[int]) -> None:
    if any(later > earlier for earlier, later in pairwise(counts)) or counts[-1] <= 0:
        raise ValueError(f"{op}: batch_sizes must be positive and must not increase, got {counts}")
    if sum(counts) != x.size(0):
        raise RuntimeError(f"{op}: batch_sizes must sum to the rows of x, {x.size(0)}; they sum to {sum(counts)}")
    if counts[0] != h0.size(0):
        raise RuntimeError(f"{op}: batch_sizes must begin with the rows of h0, {h0.size(0)}; got {counts[0]}")


def _autocast_is_on(x: object) -> bool:
    return isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)


def _lower(tensor: Tensor | None, device_type: str, dtype: torch.dtype) -> Tensor | None:
    """Autocast's rule for an operand of a product: floating tensors of the device but float64 become `dtype`."""
    if (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype not in (dtype, torch.float64)
        and tensor.device.type == device_type
    ):
        return tensor.to(dtype)
    return tensor


def _lower_all(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(_lower(tensor, device_type, dtype) for tensor in tensors)


# ---- the way to the operator -----------------------------------------------------------------------------------------


def _wants_reference() -> bool:
    """Whether a derivative is being taken that the operators have no rule for: forward mode, or grad inside grad."""
    if _is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if _functorch_top() is None:
        return False
    kinds = _transforms()
    return _Transform.Jvp in kinds or kinds.count(_Transform.Grad) > 1


def _transforms() -> list[Any]:
    """The function transforms that are active, outermost first."""
    return [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or []]


def _run(layer: _Layer, arguments: tuple[Any, ...]) -> _Tensors:
    """The operator's results, reserves left out. `arguments` are its positional ones but `save`."""
    results = 1 + layer.states
    if _is_compiling():
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[: layer.tensors])
        return cast(_Tensors, layer.op(*arguments, save)[:results])
    save = torch.is_grad_enabled() and _any_requires_grad(*arguments)
    if _functorch_top() is not None:
        if _Transform.Grad in _transforms():
            return _call(_Transformed, *arguments, layer)[:results]
        return cast(_Tensors, layer.op(*arguments, save)[:results])
    if save:
        return _call(_Forward, *arguments, layer)
    with _BelowAutograd():
        return cast(_Tensors, layer.op(*arguments, False)[:results])


def _call(function: Any, *arguments: Any) -> _Tensors:
    return cast(_Tensors, function.apply(*arguments))


class _Forward(torch.autograd.Function):
    """The operator with its gradient, at a third of the cost of the dispatcher's registered rule."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> _Tensors:
        *inputs, layer = arguments
        with _BelowAutograd():
            outputs = layer.op(*inputs, True)
        _save_for_backward(ctx, layer, inputs, outputs, True)
        return cast(_Tensors, outputs[: 1 + layer.states])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, grads), None)


class _Transformed(torch.autograd.Function):
    """The operator with its gradient under `torch.func.grad`, which does not take the registered rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> _Tensors:
        *inputs, layer = arguments
        return cast(_Tensors, layer.op(*inputs, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
        layer = inputs[-1]
        ctx.mark_non_differentiable(*output[1 + layer.states :])
        _save_for_backward(ctx, layer, inputs, output, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, grads), None)


class _Backward(torch.autograd.Function):
    """The operator's gradient with the gradient's gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> _Tensors:
        *inputs, layer = arguments
        with _BelowAutograd():
            outputs = layer.op_backward(*inputs)
        _save_for_second(ctx, layer, inputs)
        return cast(_Tensors, outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_second(ctx, cotangents), None)


class _TransformedBackward(torch.autograd.Function):
    """The same under `torch.func.grad`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> _Tensors:
        *inputs, layer = arguments
        return cast(_Tensors, layer.op_backward(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
        _save_for_second(ctx, inputs[-1], inputs[:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_second(ctx, cotangents), None)


def _save_for_backward(ctx: Any, layer: _Layer, inputs: Sequence[Any], outputs: Sequence[Tensor], saved: bool) -> None:
    y, reserves = outputs[0], outputs[1 + layer.states :]
    ctx.save_for_backward(*inputs[: layer.tensors], y, *reserves)
    ctx.set_materialize_grads(False)
    ctx.layer, ctx.saved = layer, saved
    ctx.options = tuple(inputs[layer.tensors : len(layer.arguments)])


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of all the operator's arguments but `save`."""
    layer: _Layer = ctx.layer
    grads = grads[: 1 + layer.states]
    if all(grad is None for grad in grads):
        return (None,) * len(layer.arguments)
    saved = ctx.saved_tensors
    tensors, y, reserves = saved[: layer.tensors], saved[layer.tensors], saved[layer.tensors + 1 :]
    if not ctx.saved:  # a direct caller asked for no reserves but wants the gradient all the same
        with torch.no_grad():
            reserves = layer.op(*tensors, *ctx.options, True)[1 + layer.states :]
    needs = ctx.needs_input_grad[: layer.differentiable]
    needs_weights = any(needs[index] for index in layer.weights)
    arguments = (*grads, *tensors, y, *reserves, *ctx.options, needs[0], needs_weights)
    if _is_compiling():
        outputs = layer.op_backward(*arguments)
    elif _functorch_top() is not None:
        outputs = _call(_TransformedBackward, *arguments, layer)
    elif torch.is_grad_enabled():
        outputs = _call(_Backward, *arguments, layer)
    else:
        with _BelowAutograd():
            outputs = layer.op_backward(*arguments)
    return _by_input(layer, outputs, needs)


def _by_input(layer: _Layer, outputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(layer.arguments)
    for output, indices in zip(outputs, layer.gradients, strict=True):
        wanted = [index for index in indices if needs[index]]
        for index in wanted:
            # Two biases have one gradient; who scales one in place must not scale the other.
            gradients[index] = output if index == wanted[0] else output.clone()
    return tuple(gradients)


def _save_for_second(ctx: Any, layer: _Layer, inputs: Sequence[Any]) -> None:
    # y and the reserves are functions of the other inputs, so nothing of them is kept: the reference computes them
    # anew.
    first = 1 + layer.states
    ctx.save_for_backward(*inputs[: first + layer.tensors])
    ctx.set_materialize_grads(False)
    ctx.layer = layer
    ctx.arity = len(inputs)
    options = first + layer.tensors + 1 + layer.reserves
    ctx.options = tuple(inputs[options : options + len(layer.arguments) - layer.tensors])


def _second(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of all the arguments of the backward operator: the reference's gradient, differentiated."""
    layer: _Layer = ctx.layer
    results = 1 + layer.states
    saved, options = ctx.saved_tensors, ctx.options
    keep_graph = torch.is_grad_enabled()

    def leaf(tensor: Tensor | None) -> Tensor | None:
        """A tensor to differentiate by, on the graph of the original if a third derivative may follow."""
        if tensor is None:
            return None
        if keep_graph and tensor.requires_grad:
            return tensor.view_as(tensor)
        return tensor.detach().requires_grad_()

    grads, inputs = saved[:results], saved[results : results + layer.differentiable]
    constants = saved[results + layer.differentiable : results + layer.tensors]
    result: list[Tensor | None] = [None] * ctx.arity
    wanted: list[tuple[int, Tensor]] = []  # an input's index, and the cotangent of its gradient
    for cotangent, indices in zip(cotangents, layer.gradients, strict=True):
        index = next((index for index in indices if inputs[index] is not None), -1)
        if cotangent is not None and index >= 0 and cotangent.shape == inputs[index].shape:
            wanted.append((index, cotangent))
    if not wanted or all(grad is None for grad in grads):
        return tuple(result)

    with torch.enable_grad():
        grads, inputs = [leaf(grad) for grad in grads], [leaf(tensor) for tensor in inputs]
        outputs = layer.run_reference((*inputs, *constants, *options))
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
        first = torch.autograd.grad(
            [output for output, _ in pairs],
            [inputs[index] for index, _ in wanted],
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
        seconds = [
            (gradient, cotangent)
            for gradient, (_, cotangent) in zip(first, wanted, strict=True)
            if gradient is not None and gradient.requires_grad  # type: ignore[redundant-expr]  # allow_unused
        ]
        targets = [
            (place, tensor)
            for place, tensor in enumerate([*grads, *inputs])
            if tensor is not None and ctx.needs_input_grad[place]
        ]
        if seconds and targets:
            gradients = torch.autograd.grad(
                [gradient for gradient, _ in seconds],
                [tensor for _, tensor in targets],
                [cotangent for _, cotangent in seconds],
                create_graph=keep_graph,
                allow_unused=True,
            )
            for (place, _), gradient in zip(targets, gradients, strict=True):
                result[place] = gradient
    return tuple(result)


# ---- LSTM ------------------------------------------------------------------------------------------------------------


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    ln_ih_weight: Tensor | None = None,
    ln_hh_weight: Tensor | None = None,
    ln_c_weight: Tensor | None = None,
    ln_c_bias: Tensor | None = None,
    eps: float = 1e-5,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    weight_drop: float = 0.0,
    input_dropout: float = 0.0,
    output_dropout: float = 0.0,
    training: bool = False,
    reverse: bool = False,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One LSTM layer, in one direction, over a whole sequence.

    The LSTM of Hochreiter and Schmidhuber (1997) with forget gates, as ``torch.nn.LSTM`` computes it:

    .. math::
        a = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}, \quad (i, f, g, o) = (\sigma, \sigma, \tanh, \sigma)(a), \\
        c_t = f \odot c_{t-1} + i \odot g, \quad h_t = o \odot \tanh(c_t), \quad y_t = h_t

    With the ``ln_*`` weights, the layer-normalised LSTM of Ba, Kiros and Hinton (2016, arXiv 1607.06450, eq. 20-22):
    :math:`a = \gamma_{ih} \odot N(W_{ih} x_t) + b_{ih} + \gamma_{hh} \odot N(W_{hh} h_{t-1}) + b_{hh}` and
    :math:`h_t = o \odot \tanh(\gamma_c \odot N(c_t) + \beta_c)`, N over all 4H features and over the H of the cell.
    With ``weight_hr``, :math:`h_t` is projected to P features (Sak, Senior and Beaufays 2014, arXiv 1402.1128).

    Letters: T steps, B rows, I inputs, H cells, Hy = P with ``weight_hr``, else H. N = sum of ``batch_sizes``.

    Args:
        x: ``[T, B, I]``, any strides; with ``batch_sizes`` packed ``[N, I]``, as ``PackedSequence.data``. float32,
            float64 (computed as such), bfloat16 or float16 (computed in float32 inside).
        h0: ``[B, Hy]``, the first hidden state.
        c0: ``[B, H]``, the first cell state.
        weight_ih: ``[4H, I]``, the gates in the order i, f, g, o.
        weight_hh: ``[4H, Hy]``.
        bias_ih: ``[4H]`` or None.
        bias_hh: ``[4H]`` or None.
        weight_hr: ``[P, H]`` or None.
        ln_ih_weight: ``[4H]``, gain of the normalised input part. All four of the ``ln_*``, or none.
        ln_hh_weight: ``[4H]``, gain of the normalised recurrent part.
        ln_c_weight: ``[H]``, gain of the normalised cell.
        ln_c_bias: ``[H]``.
        eps: added to the variances.
        batch_sizes: int64 ``[T]`` on the CPU, not increasing, as ``PackedSequence.batch_sizes``.
        resets: bool ``[T, B]``: where true, h and c of that row become 0 before that step. Dense layout only.
        zoneout_h: probability with which a hidden unit keeps its last value at a step (Krueger et al. 2016,
            arXiv 1606.01305); outside training the expectation is used.
        zoneout_c: the same of the cell. The new h is computed from the new c, before zoneout.
        weight_drop: probability of dropping a weight of ``weight_hh``, one mask for the call (DropConnect: Merity,
            Keskar and Socher 2017, arXiv 1708.02182). Training only, as the next two.
        input_dropout: probability of dropping a feature of x, one mask per row for all steps (locked or variational
            dropout: Gal and Ghahramani 2016, arXiv 1512.05287).
        output_dropout: the same of y. ``h_n`` is not masked.
        training: whether masks are drawn.
        reverse: run from the last step to the first; a packed row begins at its own last element.
        generator: where the random pair comes from if ``rng`` is None; default torch's of x's device.
        rng: int64 ``[2]`` on x's device: the pair (seed, offset) of the Philox streams, see `genfuse.reference.random`.
            The same pair gives the same masks on every device.

    Returns:
        ``(y, h_n, c_n)``: y as x is laid out (``[T, B, Hy]`` or ``[N, Hy]``), and each row's last states ``[B, Hy]``,
        ``[B, H]``, of x's dtype.

    Raises:
        RuntimeError: a shape or device does not fit, dtypes differ, or T is 0.
        ValueError: a probability is not in [0, 1], ``eps`` is negative, ``batch_sizes`` increase.
        TypeError: an argument is of the wrong type.

    The result is the same run to run and whatever the number of threads. Derivatives of any order exist; those above
    the first, and forward mode, are computed by the reference. `torch.compile` takes this function and its backward
    pass, but not `torch.func.grad` around it, for which gradients registered with torch have no rule: call backward on
    the compiled function's result instead.

    Example:
        >>> T, B, I, H = 5, 3, 4, 6
        >>> x, h0, c0 = torch.randn(T, B, I), torch.zeros(B, H), torch.zeros(B, H)
        >>> y, h_n, c_n = lstm(x, h0, c0, torch.randn(4 * H, I), torch.randn(4 * H, H), zoneout_h=0.1, training=True)
        >>> y.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 6]), torch.Size([3, 6]), torch.Size([3, 6]))
    """
    if _any_autocast() and _autocast_is_on(x):
        kind = x.device.type
        states_and_weights = (x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
        norm = (ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias)
        with torch.autocast(kind, enabled=False):
            return lstm(
                *_lower_all(kind, *states_and_weights),
                **dict(zip(_LSTM.arguments[8:12], _lower_all(kind, *norm), strict=True)),
                eps=eps,
                batch_sizes=batch_sizes,
                resets=resets,
                zoneout_h=zoneout_h,
                zoneout_c=zoneout_c,
                weight_drop=weight_drop,
                input_dropout=input_dropout,
                output_dropout=output_dropout,
                training=training,
                reverse=reverse,
                generator=generator,
                rng=rng,
            )
    try:
        gates, outputs = weight_hh.shape
        batch, hidden = c0.shape
        dtype, device = x.dtype, x.device
        fits = (
            (x.dim() == 3 and x.size(1) == batch if batch_sizes is None else x.dim() == 2)
            and gates == 4 * hidden > 0
            and h0.shape == (batch, outputs)
            and weight_ih.shape == (gates, x.size(-1))
            and dtype is h0.dtype is c0.dtype is weight_ih.dtype is weight_hh.dtype
            and dtype in _DTYPES
            and device == h0.device == c0.device == weight_ih.device == weight_hh.device
            and (bias_ih is None or (bias_ih.shape == (gates,) and bias_ih.dtype is dtype and bias_ih.device == device))
            and (bias_hh is None or (bias_hh.shape == (gates,) and bias_hh.dtype is dtype and bias_hh.device == device))
            and outputs == hidden
            and weight_hr is None
            and ln_ih_weight is None
            and ln_hh_weight is None
            and ln_c_weight is None
            and ln_c_bias is None
            and 0.0 <= zoneout_h <= 1.0
            and 0.0 <= zoneout_c <= 1.0
            and 0.0 <= weight_drop <= 1.0
            and 0.0 <= input_dropout <= 1.0
            and 0.0 <= output_dropout <= 1.0
            and 0.0 <= eps < float("inf")
        )
    except (AttributeError, TypeError, ValueError, IndexError):
        fits = False
    if not fits:  # or there is a projection or layer norm, which the fast test leaves out
        _explain_lstm(
            *(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr),
            *(ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias, batch_sizes),
            *(zoneout_h, zoneout_c, weight_drop, input_dropout, output_dropout),
        )
        _check_eps("lstm", eps)
    if batch_sizes is not None or resets is not None or rng is not None or x.size(0) == 0:
        _check_sequence("lstm", x, h0, batch_sizes, resets, rng)
    if training and rng is None and (zoneout_h or zoneout_c or weight_drop or input_dropout or output_dropout):
        _check_generator("lstm", generator)
        rng = reference_random.draw_rng(x.device, generator)

    arguments = (
        *(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr),
        *(ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias, batch_sizes, resets, rng),
        *(zoneout_h, zoneout_c, weight_drop, input_dropout, output_dropout, eps, training, reverse),
    )
    if not (_LSTM.on_cpu and x.is_cpu and _forced_backend() is None):
        backend = backends.select("lstm", dict(zip(_LSTM.arguments, arguments, strict=True)))
        if backend == "cudnn":
            return _vendor_lstm(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse)
        if backend == "reference":
            return cast("tuple[Tensor, Tensor, Tensor]", _LSTM.run_reference(arguments))
    if _wants_reference():
        return cast("tuple[Tensor, Tensor, Tensor]", _LSTM.run_reference(arguments))
    return cast("tuple[Tensor, Tensor, Tensor]", _run(_LSTM, arguments))


def _explain_lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    ln_ih_weight: Tensor | None,
    ln_hh_weight: Tensor | None,
    ln_c_weight: Tensor | None,
    ln_c_bias: Tensor | None,
    batch_sizes: Tensor | None,
    *probabilities: float,
) -> None:
    batch, rows = _size(h0, 0), _size(weight_hh, 0)
    hidden = _size(c0, 1) if rows is None else rows // 4
    outputs = hidden if weight_hr is None else _size(weight_hr, 0)
    gates = None if hidden is None else 4 * hidden
    inputs = _size(x, -1)
    layout = (("T", None), ("B", batch), ("I", None)) if batch_sizes is None else (("N", None), ("I", None))
    tensors: list[tuple[str, object, tuple[tuple[str, int | None], ...]]] = [
        ("x", x, layout),
        ("h0", h0, (("B", None), ("Hy", outputs))),
        ("c0", c0, (("B", batch), ("H", hidden))),
        ("weight_ih", weight_ih, (("4H", gates), ("I", inputs))),
        ("weight_hh", weight_hh, (("4H", gates), ("Hy", outputs))),
    ]
    norm = (
        ("ln_ih_weight", ln_ih_weight, (("4H", gates),)),
        ("ln_hh_weight", ln_hh_weight, (("4H", gates),)),
        ("ln_c_weight", ln_c_weight, (("H", hidden),)),
        ("ln_c_bias", ln_c_bias, (("H", hidden),)),
    )
    tensors += [
        entry
        for entry in (
            ("bias_ih", bias_ih, (("4H", gates),)),
            ("bias_hh", bias_hh, (("4H", gates),)),
            ("weight_hr", weight_hr, (("P", outputs), ("H", hidden))),
            *norm,
        )
        if entry[1] is not None
    ]
    names = ("zoneout_h", "zoneout_c", "weight_drop", "input_dropout", "output_dropout")
    _explain("lstm", tensors, tuple(zip(names, probabilities, strict=True)))
    _want_units("lstm", weight_hh)
    absent = [name for name, value, _ in norm if value is None]
    if 0 < len(absent) < len(norm):
        raise ValueError(
            f"lstm: layer norm wants all four of the ln_* arguments, or none; missing: {', '.join(absent)}"
        )


def _vendor_lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own LSTM (on CUDA: cuDNN). It has no second derivative."""
    weights = [weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if weight is not None]
    state, biased, train = (h0.unsqueeze(0), c0.unsqueeze(0)), bias_ih is not None, torch.is_grad_enabled()
    if batch_sizes is not None:
        y, h_n, c_n = _VF.lstm(x, batch_sizes, state, weights, biased, 1, 0.0, train, False)
    else:
        x = x.flip(0) if reverse else x
        y, h_n, c_n = _VF.lstm(x, state, weights, biased, 1, 0.0, train, False, False)
        y = y.flip(0) if reverse else y
    return y, h_n.squeeze(0), c_n.squeeze(0)


# ---- GRU -------------------------------------------------------------------------------------------------------------


def gru(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    zoneout_h: float = 0.0,
    weight_drop: float = 0.0,
    input_dropout: float = 0.0,
    output_dropout: float = 0.0,
    training: bool = False,
    reverse: bool = False,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One GRU layer, in one direction, over a whole sequence.

    The GRU of Cho et al. (2014, arXiv 1406.1078) as ``torch.nn.GRU`` and cuDNN compute it, the reset gate after the
    product:

    .. math::
        r, z = \sigma(W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*}), \quad
        n = \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn})), \quad
        h_t = (1 - z) \odot n + z \odot h_{t-1}

    Letters: T steps, B rows, I inputs, H units, N = sum of ``batch_sizes``.

    Args:
        x: ``[T, B, I]``, any strides; with ``batch_sizes`` packed ``[N, I]``, as ``PackedSequence.data``. float32,
            float64 (computed as such), bfloat16 or float16 (computed in float32 inside).
        h0: ``[B, H]``, the first hidden state.
        weight_ih: ``[3H, I]``, the gates in the order r, z, n.
        weight_hh: ``[3H, H]``.
        bias_ih: ``[3H]`` or None.
        bias_hh: ``[3H]`` or None.
        batch_sizes: int64 ``[T]`` on the CPU, not increasing, as ``PackedSequence.batch_sizes``.
        resets: bool ``[T, B]``: where true, h of that row becomes 0 before that step. Dense layout only.
        zoneout_h: probability with which a unit keeps its last value at a step (Krueger et al. 2016, arXiv 1606.01305);
            outside training the expectation is used.
        weight_drop: probability of dropping a weight of ``weight_hh``, one mask for the call (DropConnect: Merity,
            Keskar and Socher 2017, arXiv 1708.02182). Training only, as the next two.
        input_dropout: probability of dropping a feature of x, one mask per row for all steps (locked or variational
            dropout: Gal and Ghahramani 2016, arXiv 1512.05287).
        output_dropout: the same of y. ``h_n`` is not masked.
        training: whether masks are drawn.
        reverse: run from the last step to the first; a packed row begins at its own last element.
        generator: where the random pair comes from if ``rng`` is None; default torch's of x's device.
        rng: int64 ``[2]`` on x's device: the pair (seed, offset) of the Philox streams, see `genfuse.reference.random`.

    Returns:
        ``(y, h_n)``: y as x is laid out (``[T, B, H]`` or ``[N, H]``), and each row's last state ``[B, H]``, of x's
        dtype.

    Raises:
        RuntimeError: a shape or device does not fit, dtypes differ, or T is 0.
        ValueError: a probability is not in [0, 1], ``batch_sizes`` increase.
        TypeError: an argument is of the wrong type.

    The result is the same run to run and whatever the number of threads. Derivatives of any order exist; those above
    the first, and forward mode, are computed by the reference. `torch.compile` takes this function and its backward
    pass, but not `torch.func.grad` around it, for which gradients registered with torch have no rule: call backward on
    the compiled function's result instead.

    Example:
        >>> T, B, I, H = 5, 3, 4, 6
        >>> y, h_n = gru(torch.randn(T, B, I), torch.zeros(B, H), torch.randn(3 * H, I), torch.randn(3 * H, H))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 6]), torch.Size([3, 6]))
    """
    if _any_autocast() and _autocast_is_on(x):
        kind = x.device.type
        with torch.autocast(kind, enabled=False):
            return gru(
                *_lower_all(kind, x, h0, weight_ih, weight_hh, bias_ih, bias_hh),
                batch_sizes=batch_sizes,
                resets=resets,
                zoneout_h=zoneout_h,
                weight_drop=weight_drop,
                input_dropout=input_dropout,
                output_dropout=output_dropout,
                training=training,
                reverse=reverse,
                generator=generator,
                rng=rng,
            )
    try:
        gates, hidden = weight_hh.shape
        dtype, device = x.dtype, x.device
        batch = h0.size(0)
        fits = (
            (x.dim() == 3 and x.size(1) == batch if batch_sizes is None else x.dim() == 2)
            and gates == 3 * hidden > 0
            and h0.shape == (batch, hidden)
            and weight_ih.shape == (gates, x.size(-1))
            and dtype is h0.dtype is weight_ih.dtype is weight_hh.dtype
            and dtype in _DTYPES
            and device == h0.device == weight_ih.device == weight_hh.device
            and (bias_ih is None or (bias_ih.shape == (gates,) and bias_ih.dtype is dtype and bias_ih.device == device))
            and (bias_hh is None or (bias_hh.shape == (gates,) and bias_hh.dtype is dtype and bias_hh.device == device))
            and 0.0 <= zoneout_h <= 1.0
            and 0.0 <= weight_drop <= 1.0
            and 0.0 <= input_dropout <= 1.0
            and 0.0 <= output_dropout <= 1.0
        )
    except (AttributeError, TypeError, ValueError, IndexError):
        fits = False
    if not fits:
        _explain_gru(
            *(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes),
            *(zoneout_h, weight_drop, input_dropout, output_dropout),
        )
    if batch_sizes is not None or resets is not None or rng is not None or x.size(0) == 0:
        _check_sequence("gru", x, h0, batch_sizes, resets, rng)
    if training and rng is None and (zoneout_h or weight_drop or input_dropout or output_dropout):
        _check_generator("gru", generator)
        rng = reference_random.draw_rng(x.device, generator)

    arguments = (
        *(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, rng),
        *(zoneout_h, weight_drop, input_dropout, output_dropout, training, reverse),
    )
    if not (_GRU.on_cpu and x.is_cpu and _forced_backend() is None):
        backend = backends.select("gru", dict(zip(_GRU.arguments, arguments, strict=True)))
        if backend == "cudnn":
            return _vendor_gru(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse)
        if backend == "reference":
            return cast("tuple[Tensor, Tensor]", _GRU.run_reference(arguments))
    if _wants_reference():
        return cast("tuple[Tensor, Tensor]", _GRU.run_reference(arguments))
    return cast("tuple[Tensor, Tensor]", _run(_GRU, arguments))


def _explain_gru(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    batch_sizes: Tensor | None,
    *probabilities: float,
) -> None:
    batch, hidden = _size(h0, 0), _size(weight_hh, 1)
    gates = None if hidden is None else 3 * hidden
    layout = (("T", None), ("B", batch), ("I", None)) if batch_sizes is None else (("N", None), ("I", None))
    tensors: list[tuple[str, object, tuple[tuple[str, int | None], ...]]] = [
        ("x", x, layout),
        ("h0", h0, (("B", None), ("H", hidden))),
        ("weight_ih", weight_ih, (("3H", gates), ("I", _size(x, -1)))),
        ("weight_hh", weight_hh, (("3H", gates), ("H", None))),
    ]
    tensors += [
        (name, bias, (("3H", gates),))
        for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh))
        if bias is not None
    ]
    names = ("zoneout_h", "weight_drop", "input_dropout", "output_dropout")
    _explain("gru", tensors, tuple(zip(names, probabilities, strict=True)))
    _want_units("gru", weight_hh)


def _vendor_gru(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """torch's own GRU (on CUDA: cuDNN). It has no second derivative."""
    weights = [weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh) if weight is not None]
    state, biased, train = h0.unsqueeze(0), bias_ih is not None, torch.is_grad_enabled()
    if batch_sizes is not None:
        y, h_n = _VF.gru(x, batch_sizes, state, weights, biased, 1, 0.0, train, False)
    else:
        x = x.flip(0) if reverse else x
        y, h_n = _VF.gru(x, state, weights, biased, 1, 0.0, train, False, False)
        y = y.flip(0) if reverse else y
    return y, h_n.squeeze(0)


# ---- decoding loops --------------------------------------------------------------------------------------------------

_Layers = Sequence[Sequence[Tensor | None]]


def _check_generate(
    op: str,
    gates: int,
    prompt: Tensor,
    length: int,
    embedding: Tensor,
    layers: _Layers,
    head_weight: Tensor,
    head_bias: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    rng: Tensor | None,
    u: Tensor | None,
    weight_dtype: torch.dtype | None,
    zoneout: Sequence[tuple[str, float]],
) -> list[int]:
    """Check the arguments that both decoding loops have; return the layers' sizes H."""
    if not _is_compiling() and _functorch_top() is not None and _Transform.Vmap in _transforms():
        # Before any random number is drawn, which vmap refuses with a sentence of its own.
        tensors_given = (prompt, embedding, head_weight, head_bias, rng, u, *(t for layer in layers for t in layer))
        if any(isinstance(t, Tensor) and torch._C._functorch.is_batchedtensor(t) for t in tensors_given):
            raise NotImplementedError(_no_vmap_sentence(f"genfuse.ops.{op}"))
    if not isinstance(prompt, Tensor):
        raise TypeError(f"{op}: prompt must be an int64 Tensor [B, P], got {type(prompt).__name__}")
    if prompt.dtype != torch.int64:
        raise ValueError(f"{op}: prompt must be torch.int64, got {prompt.dtype}")
    if prompt.dim() != 2 or prompt.size(1) == 0:
        raise RuntimeError(f"{op}: prompt must be [B, P] with P > 0, got {list(prompt.shape)}")
    if not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"{op}: length must be an int, got {type(length).__name__}")
    if length < 0:
        raise ValueError(f"{op}: length must not be negative, got {length}")
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: temperature must be a float, got {type(temperature).__name__}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be finite and not negative, got {temperature}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise TypeError(f"{op}: top_k must be an int or None, got {type(top_k).__name__}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k must be at least 1, got {top_k}")
    if top_p is not None and not isinstance(top_p, (int, float)):
        raise TypeError(f"{op}: top_p must be a float or None, got {type(top_p).__name__}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")
    if weight_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"{op}: weight_dtype must be None, torch.float32 or torch.bfloat16, got {weight_dtype}")
    _check_generator(op, generator)
    if u is not None and rng is not None:
        raise ValueError(f"{op}: u and rng cannot be given together")
    if u is not None:
        if not isinstance(u, Tensor):
            raise TypeError(f"{op}: u must be a Tensor [B, length], got {type(u).__name__}")
        if u.shape != (prompt.size(0), length):
            raise RuntimeError(f"{op}: u must be [B, length] = {[prompt.size(0), length]}, got {list(u.shape)}")
        if not u.dtype.is_floating_point:
            raise ValueError(f"{op}: u must be of a floating dtype, got {u.dtype}")
        if u.device != prompt.device:
            raise RuntimeError(f"{op}: u must be on {prompt.device}, as prompt is; got {u.device}")
        if u.is_cpu and u.numel() and _has_values(u):
            low, high = (float(bound) for bound in u.aminmax())
            if not (low >= 0.0 and high < 1.0):  # false of NaN, too
                raise ValueError(f"{op}: u must be in [0, 1), got values from {low} to {high}")
    if rng is not None:
        if not isinstance(rng, Tensor):
            raise TypeError(f"{op}: rng must be an int64 Tensor [2], got {type(rng).__name__}")
        if rng.dtype != torch.int64:
            raise ValueError(f"{op}: rng must be torch.int64, got {rng.dtype}")
        if rng.shape != (2,):
            raise RuntimeError(f"{op}: rng must be [2], the pair (seed, offset); got {list(rng.shape)}")
        if rng.device != prompt.device:
            raise RuntimeError(f"{op}: rng must be on {prompt.device}, as prompt is; got {rng.device}")

    if len(layers) == 0:
        raise ValueError(f"{op}: layers must hold at least one layer")
    tensors: list[tuple[str, object, tuple[tuple[str, int | None], ...]]] = [
        ("embedding", embedding, (("V", None), ("E", None)))
    ]
    inputs, sizes = _size(embedding, 1), []
    counts = (4, 8) if gates == 4 else (4,)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "ln_ih", "ln_hh", "ln_c_weight", "ln_c_bias")
    for index, layer in enumerate(layers):
        if len(layer) not in counts or len(layer) != len(layers[0]):
            wants = " or ".join(map(str, counts))
            raise ValueError(f"{op}: layers[{index}] must hold {wants} tensors, alike in all layers; got {len(layer)}")
        hidden = _size(layer[1], 1) or 0
        rows = ("gates", gates * hidden)
        shapes = (
            *((rows, ("I", inputs)), (rows, ("H", hidden)), (rows,), (rows,)),
            *((rows,), (rows,), (("H", hidden),), (("H", hidden),)),
        )
        for place, (name, value, shape) in enumerate(zip(names, layer, shapes, strict=False)):
            if value is not None or place not in (2, 3):
                tensors.append((f"layers[{index}] {name}", value, shape))
        inputs = hidden
        sizes.append(hidden)
    tensors.append(("head_weight", head_weight, (("V", _size(embedding, 0)), ("H", inputs))))
    if head_bias is not None:
        tensors.append(("head_bias", head_bias, (("V", _size(embedding, 0)),)))
    _explain(op, tensors, zoneout)
    if embedding.device != prompt.device:
        raise RuntimeError(f"{op}: prompt must be on {embedding.device}, as embedding is; got {prompt.device}")
    if embedding.size(0) == 0:
        raise ValueError(f"{op}: the vocabulary is empty (embedding is {list(embedding.shape)})")
    if prompt.is_cpu and prompt.numel() and _has_values(prompt):
        least, most = (int(bound) for bound in prompt.aminmax())
        if least < 0 or most >= embedding.size(0):
            worst = least if least < 0 else most
            raise IndexError(f"{op}: prompt has token {worst}, out of range [0, {embedding.size(0)})")
    return sizes


def _kind(value: object) -> str:
    """What an argument is, for a message."""
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


def _check_layers_of_state(op: str, what: str, state: object, layers: int) -> None:
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"{op}: state must be a list with one {what} per layer, got {_kind(state)}")
    if len(state) != layers:
        raise ValueError(f"{op}: state must hold one {what} per layer, {layers}; got {len(state)}")


def _check_state(
    op: str, name: str, state: Sequence[Tensor], batch: int, sizes: list[int], device: torch.device
) -> None:
    for index, (part, size) in enumerate(zip(state, sizes, strict=True)):
        label = f"{op}: state[{index}]{name}"
        if not isinstance(part, Tensor):
            raise TypeError(f"{label} must be a Tensor [B, H], got {type(part).__name__}")
        if part.shape != (batch, size):
            raise RuntimeError(f"{label} must be [B, H] = {[batch, size]}, got {list(part.shape)}")
        if not part.dtype.is_floating_point:
            raise ValueError(f"{label} must be of a floating dtype, got {part.dtype}")
        if part.device != device:
            raise RuntimeError(f"{label} must be on {device}, as prompt is; got {part.device}")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _flat_weights(layers: _Layers) -> list[Tensor]:
    """The layers' tensors in one list, float32 and contiguous, zeros for absent biases."""
    flat = []
    for layer in layers:
        rows = cast(Tensor, layer[1])
        flat += [
            _plain(value) if value is not None else rows.new_zeros(rows.size(0), dtype=torch.float32) for value in layer
        ]
    return flat


def _join(state: Sequence[Tensor] | None, batch: int, sizes: list[int], like: Tensor) -> Tensor:
    """The layers' states side by side, ``[B, sum of H]``."""
    if state is None:
        return like.new_zeros(batch, sum(sizes), dtype=torch.float32)
    return torch.cat([part.to(torch.float32) for part in state], 1)


def _answer(tokens: Tensor, log_probs: Tensor, state: Any, return_log_probs: bool, return_state: bool) -> Any:
    answer = (tokens, *((log_probs,) if return_log_probs else ()), *((state,) if return_state else ()))
    return answer if len(answer) > 1 else tokens


@torch.no_grad()
def lstm_generate(
    prompt: Tensor,
    length: int,
    embedding: Tensor,
    layers: _Layers,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    state: Sequence[State] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    u: Tensor | None = None,
    eps: float = 1e-5,
    weight_dtype: torch.dtype | None = None,
    return_log_probs: bool = False,
    return_state: bool = False,
) -> Any:
    """Sample text from an LSTM language model: read a prompt, then draw token after token, all in one operator.

    At each step: embedding, the layers, the head's logits (float32), temperature, top-k, top-p (Holtzman et al. 2019,
    arXiv 1904.09751), one draw by the inverse of the cumulative distribution. Temperature 0 takes the most probable
    token, the lowest index of equals. `genfuse.reference.sample_token` is the rule to the letter.

    Letters: B rows, P prompt tokens, V words, E features of an embedding, H cells of a layer. Rows are independent: row
    b's text depends on the seed and on b alone, not on B or the number of threads. Weights of any floating dtype; the
    loop computes in float32. Nothing here is differentiable.

    Args:
        prompt: int64 ``[B, P]``, P > 0, tokens in [0, V).
        length: how many tokens to draw.
        embedding: ``[V, E]``.
        layers: per layer ``(weight_ih [4H, I], weight_hh [4H, H], bias_ih [4H] or None, bias_hh [4H] or None)``, and
            for layer norm also ``(ln_ih [4H], ln_hh [4H], ln_c_weight [H], ln_c_bias [H])``, as in `lstm`. I is E, then
            the H below.
        head_weight: ``[V, H of the last layer]``.
        head_bias: ``[V]`` or None.
        state: per layer ``(h [B, H], c [B, H])``; default zeros.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most probable tokens (and those equal to the k-th).
        top_p: keep the smallest set of most probable tokens whose probability, after top_k, reaches top_p.
        zoneout_h: the zoneout that the layers were trained with (its expectation is applied).
        zoneout_c: the same of the cell.
        generator: where the random pair comes from if neither ``rng`` nor ``u`` is given.
        rng: int64 ``[2]``, the pair (seed, offset): row b's draw at step s is element ``b * 2**32 + s`` of its Philox
            stream.
        u: floating ``[B, length]``, the uniforms in [0, 1) themselves.
        eps: layer norm's.
        weight_dtype: torch.bfloat16 rounds the weight matrices and sums in float32: half the memory traffic.
        return_log_probs: also return the log-probabilities in nats, under the tempered and filtered distribution (0 if
            greedy).
        return_state: also return the state. It has read the prompt and all drawn tokens but the last: give it back with
            ``prompt=tokens[:, -1:]`` to continue the text.

    Returns:
        ``tokens`` int64 ``[B, length]``, or a tuple of it, then, as asked, log_probs float32 ``[B, length]`` and the
        state.

    Raises:
        RuntimeError: a shape or device does not fit, or the weights' dtypes differ.
        ValueError: a dtype or value does not fit.
        TypeError: an argument is of the wrong type.
        IndexError: a prompt token is outside [0, V).

    Example:
        >>> V, E, H = 7, 3, 5
        >>> layer = (torch.randn(4 * H, E), torch.randn(4 * H, H), None, None)
        >>> prompt = torch.zeros(2, 1, dtype=torch.int64)
        >>> tokens = lstm_generate(prompt, 4, torch.randn(V, E), [layer], torch.randn(V, H))
        >>> tokens.shape
        torch.Size([2, 4])
    """
    sizes = _check_generate(
        *("lstm_generate", 4, prompt, length, embedding, layers, head_weight, head_bias),
        *(temperature, top_k, top_p, generator, rng, u, weight_dtype),
        (("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c)),
    )
    _check_eps("lstm_generate", eps)
    batch = prompt.size(0)
    if state is not None:
        _check_layers_of_state("lstm_generate", "pair (h, c)", state, len(layers))
        for index, pair in enumerate(cast("Sequence[Any]", state)):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"lstm_generate: state[{index}] must be a pair (h, c), got {_kind(pair)}")
        _check_state("lstm_generate", "[0] (h)", [h for h, _ in state], batch, sizes, prompt.device)
        _check_state("lstm_generate", "[1] (c)", [c for _, c in state], batch, sizes, prompt.device)
    if u is None and rng is None:
        rng = _draw_for(temperature, prompt, generator)
    u = None if u is None else u.to(torch.float32)
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "embedding": embedding,
        "temperature": temperature,
        "zoneout_h": zoneout_h,
        "zoneout_c": zoneout_c,
    }
    backend = backends.select("lstm_generate", arguments)
    if backend == "reference":
        tokens, log_probs, last = reference.lstm_generate(
            *(prompt, length, embedding, layers, head_weight, head_bias),
            state=state,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
            rng=rng,
            u=u,
            eps=eps,
            weight_dtype=weight_dtype,
        )
        return _answer(tokens, log_probs, last, return_log_probs, return_state)
    library = torch.ops.genfuse_cuda if backend == "cuda" else torch.ops.genfuse
    tokens, log_probs, h_n, c_n = library.lstm_generate(
        *(prompt, length, _plain(embedding), _flat_weights(layers)),
        *(_plain(head_weight), None if head_bias is None else _plain(head_bias)),
        _join(None if state is None else [h for h, _ in state], batch, sizes, embedding),
        _join(None if state is None else [c for _, c in state], batch, sizes, embedding),
        *(u, rng, float(temperature), top_k or 0, 1.0 if top_p is None else float(top_p)),
        *(len(layers[0]) == 8, eps, zoneout_h, zoneout_c, weight_dtype is torch.bfloat16),
    )
    last = list(zip(h_n.split(sizes, 1), c_n.split(sizes, 1), strict=True)) if return_state else []
    return _answer(tokens, log_probs, last, return_log_probs, return_state)


@torch.no_grad()
def gru_generate(
    prompt: Tensor,
    length: int,
    embedding: Tensor,
    layers: _Layers,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    state: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    zoneout_h: float = 0.0,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    u: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
    return_log_probs: bool = False,
    return_state: bool = False,
) -> Any:
    """Sample text from a GRU language model: read a prompt, then draw token after token, all in one operator.

    Everything is as in `lstm_generate`, but that a layer is ``(weight_ih [3H, I], weight_hh [3H, H], bias_ih [3H] or
    None, bias_hh [3H] or None)`` and the state is one ``h [B, H]`` per layer.

    Args:
        prompt: int64 ``[B, P]``, P > 0, tokens in [0, V).
        length: how many tokens to draw.
        embedding: ``[V, E]``.
        layers: the layers' tensors, as above.
        head_weight: ``[V, H of the last layer]``.
        head_bias: ``[V]`` or None.
        state: per layer ``h [B, H]``; default zeros.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most probable tokens (and those equal to the k-th).
        top_p: keep the smallest set of most probable tokens whose probability, after top_k, reaches top_p.
        zoneout_h: the zoneout that the layers were trained with (its expectation is applied).
        generator: where the random pair comes from if neither ``rng`` nor ``u`` is given.
        rng: int64 ``[2]``, the pair (seed, offset).
        u: floating ``[B, length]``, the uniforms in [0, 1) themselves.
        weight_dtype: torch.bfloat16 rounds the weight matrices and sums in float32.
        return_log_probs: also return the log-probabilities in nats.
        return_state: also return the state, which has read all drawn tokens but the last.

    Returns:
        ``tokens`` int64 ``[B, length]``, or a tuple of it, then, as asked, log_probs float32 ``[B, length]`` and the
        state.

    Raises:
        RuntimeError, ValueError, TypeError, IndexError: as `lstm_generate`.

    Example:
        >>> V, E, H = 7, 3, 5
        >>> layer = (torch.randn(3 * H, E), torch.randn(3 * H, H), None, None)
        >>> prompt = torch.zeros(2, 1, dtype=torch.int64)
        >>> tokens = gru_generate(prompt, 4, torch.randn(V, E), [layer], torch.randn(V, H))
        >>> tokens.shape
        torch.Size([2, 4])
    """
    sizes = _check_generate(
        *("gru_generate", 3, prompt, length, embedding, layers, head_weight, head_bias),
        *(temperature, top_k, top_p, generator, rng, u, weight_dtype),
        (("zoneout_h", zoneout_h),),
    )
    batch = prompt.size(0)
    if state is not None:
        _check_layers_of_state("gru_generate", "h", state, len(layers))
        _check_state("gru_generate", "", state, batch, sizes, prompt.device)
    if u is None and rng is None:
        rng = _draw_for(temperature, prompt, generator)
    u = None if u is None else u.to(torch.float32)
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "embedding": embedding,
        "temperature": temperature,
        "zoneout_h": zoneout_h,
    }
    backend = backends.select("gru_generate", arguments)
    if backend == "reference":
        tokens, log_probs, last = reference.gru_generate(
            *(prompt, length, embedding, layers, head_weight, head_bias),
            state=state,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            zoneout_h=zoneout_h,
            rng=rng,
            u=u,
            weight_dtype=weight_dtype,
        )
        return _answer(tokens, log_probs, last, return_log_probs, return_state)
    library = torch.ops.genfuse_cuda if backend == "cuda" else torch.ops.genfuse
    tokens, log_probs, h_n = library.gru_generate(
        *(prompt, length, _plain(embedding), _flat_weights(layers)),
        *(_plain(head_weight), None if head_bias is None else _plain(head_bias)),
        _join(state, batch, sizes, embedding),
        *(u, rng, float(temperature), top_k or 0, 1.0 if top_p is None else float(top_p)),
        *(zoneout_h, weight_dtype is torch.bfloat16),
    )
    last = list(h_n.split(sizes, 1)) if return_state else []
    return _answer(tokens, log_probs, last, return_log_probs, return_state)


def _draw_for(temperature: float, prompt: Tensor, generator: torch.Generator | None) -> Tensor:
    """The random pair; greedy decoding leaves the generator as it is."""
    if temperature == 0.0:
        return torch.zeros(2, dtype=torch.int64, device=prompt.device)
    return reference_random.draw_rng(prompt.device, generator)


# ---- the output head's loss ------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy of ``softmax(hidden @ weight.T + bias)``, in nats, whose ``[N, V]`` logits never exist at once.

    ``torch.nn.functional.linear_cross_entropy`` with chunking where torch has it (2.13), else a loop over chunks which
    computes the logits again in backward. Derivatives of any order exist; those above the first, and `torch.func`
    transforms, are computed by the reference, with all logits at once.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        target: int64 ``[N]``, in [0, V) or ``ignore_index``.
        bias: ``[V]`` or None.
        reduction: "mean" (over the targets that count), "sum" or "none".
        ignore_index: the target that does not count.

    Returns:
        A scalar, or ``[N]`` with "none". Under autocast the product is in the autocast dtype, the loss in float32.

    Raises:
        RuntimeError: a shape or device does not fit, or dtypes differ.
        ValueError: reduction is none of the three.
        TypeError: an argument is of the wrong type.
        IndexError: a target is out of range (on the CPU).

    Example:
        >>> loss = linear_cross_entropy(torch.zeros(3, 2), torch.randn(4, 2), torch.tensor([0, 1, 2]))
        >>> round(float(loss), 3)
        1.386
    """
    autocast = _any_autocast() and _autocast_is_on(hidden)
    tensors: list[tuple[str, object, tuple[tuple[str, int | None], ...]]] = [
        ("hidden", hidden, (("N", None), ("D", None))),
        ("weight", weight, (("V", None), ("D", _size(hidden, 1)))),
    ]
    if bias is not None:
        tensors.append(("bias", bias, (("V", _size(weight, 0)),)))
    if not autocast:
        _explain("linear_cross_entropy", tensors)
    if not isinstance(target, Tensor):
        raise TypeError(f"linear_cross_entropy: target must be an int64 Tensor [N], got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: target must be torch.int64, got {target.dtype}")
    if target.shape != hidden.shape[:1]:
        raise RuntimeError(
            f"linear_cross_entropy: target must be [N] = {list(hidden.shape[:1])}, got {list(target.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if target.is_cpu and target.numel() and _has_values(target):
        counted = target[target != ignore_index]
        if counted.numel():
            least, most = (int(bound) for bound in counted.aminmax())
            if least < 0 or most >= weight.size(0):
                worst = least if least < 0 else most
                raise IndexError(f"linear_cross_entropy: target has class {worst}, out of range [0, {weight.size(0)})")
    named = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
    if backends.select("linear_cross_entropy", named) == "reference" or (
        not _is_compiling() and (_functorch_top() is not None or forward_ad._current_level >= 0)
    ):
        return reference.linear_cross_entropy(
            hidden, weight, target, bias, reduction=reduction, ignore_index=ignore_index
        )
    # Under autocast the loop serves, since torch's chunked operator has no autocast rule.
    if not autocast and hasattr(F, "linear_cross_entropy") and hidden.size(0) > 0:
        # Gradients are computed in the forward pass; kept, so that backward may be called again on a retained graph.
        options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
        loss = F.linear_cross_entropy(
            *(hidden, weight, target),
            linear_bias=bias,
            reduction=reduction,
            ignore_index=ignore_index,
            options=options,
        )
        if loss.requires_grad and not _is_compiling():
            arguments = (hidden, weight, target, bias, reduction, ignore_index)
            return cast(Tensor, _TwiceDifferentiable.apply(loss, *arguments))  # type: ignore[no-untyped-call]
        return loss
    return _chunked_linear_cross_entropy(hidden, weight, target, bias, reduction, ignore_index)


class _TwiceDifferentiable(torch.autograd.Function):
    """torch's loss, whose gradient is the reference's where it is to be differentiated again.

    torch returns its gradient as a constant: a second derivative would be wrong without a word.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *arguments: Any) -> Tensor:
        *tensors, ctx.reduction, ctx.ignore_index = arguments
        ctx.save_for_backward(*tensors)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * 4
        if not torch.is_grad_enabled():
            return (grad, *gradients, None, None)
        # Views, so that a gradient stops there: hidden may itself depend on a weight that is tied.
        tensors: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        loss = reference.linear_cross_entropy(*tensors, reduction=ctx.reduction, ignore_index=ctx.ignore_index)
        wanted = [place for place in range(4) if ctx.needs_input_grad[1 + place]]
        found = torch.autograd.grad(loss, [tensors[place] for place in wanted], grad, create_graph=True)
        for place, gradient in zip(wanted, found, strict=True):
            gradients[place] = gradient
        return (None, *gradients, None, None)


def _chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str, ignore_index: int
) -> Tensor:
    """A loop over chunks of rows, each about as large in its logits as `hidden`; backward computes the logits again."""

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(rows, weight, bias)
        kind = "none" if reduction == "none" else "sum"
        return F.cross_entropy(logits, targets, reduction=kind, ignore_index=ignore_index)

    count = max(1, hidden.size(1) * hidden.size(0) // max(1, weight.size(0)))
    losses = [
        cast(Tensor, checkpoint(chunk_loss, rows, targets, use_reentrant=False, preserve_rng_state=False))
        for rows, targets in zip(torch.split(hidden, count), torch.split(target, count), strict=True)
    ]
    if reduction == "none":
        return torch.cat(losses)
    total = torch.stack(losses).sum()
    return total / (target != ignore_index).sum() if reduction == "mean" else total


# ---- rules for the dispatcher ----------------------------------------------------------------------------------------


def _reserve_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor, batch_sizes: Tensor | None) -> int:
    return x.size(0) if batch_sizes is not None else x.size(0) * x.size(1)


def _fake_lstm(*arguments: Any) -> _Tensors:
    x, h0, c0, _, weight_hh = arguments[:5]
    layer_norm, batch_sizes = arguments[8] is not None, arguments[12]
    training, save = arguments[21], arguments[23]
    rows, outputs, hidden = _rows(x, batch_sizes), h0.size(1), c0.size(1)
    reserve = _reserve_dtype(x)
    masked = save and training and arguments[19] > 0.0
    return (
        x.new_empty(*x.shape[:-1], outputs),
        x.new_empty(h0.shape),
        x.new_empty(c0.shape),
        x.new_empty((rows, outputs) if masked else 0, dtype=reserve),
        x.new_empty((rows, hidden) if save else 0, dtype=reserve),
        x.new_empty((rows, weight_hh.size(0)) if save else 0, dtype=reserve),
        x.new_empty((rows, weight_hh.size(0)) if save and layer_norm else 0, dtype=reserve),
        x.new_empty((rows, 6) if save and layer_norm else 0, dtype=reserve),
    )


def _fake_gru(*arguments: Any) -> _Tensors:
    x, h0 = arguments[:2]
    batch_sizes, training, save = arguments[6], arguments[13], arguments[15]
    rows, hidden = _rows(x, batch_sizes), h0.size(1)
    reserve = _reserve_dtype(x)
    masked = save and training and arguments[12] > 0.0
    return (
        x.new_empty(*x.shape[:-1], hidden),
        x.new_empty(h0.shape),
        x.new_empty((rows, hidden) if masked else 0, dtype=reserve),
        x.new_empty((rows, 4 * hidden) if save else 0, dtype=reserve),
    )


def _fake_backward(layer: _Layer, arguments: Sequence[Any]) -> _Tensors:
    first = 1 + layer.states
    inputs, needs_x, needs_weights = arguments[first : first + layer.differentiable], arguments[-2], arguments[-1]
    x = inputs[0]
    outputs = []
    for indices in layer.gradients:
        source = next((inputs[index] for index in indices if inputs[index] is not None), None)
        wanted = needs_x if indices == (0,) else needs_weights if indices[0] in layer.weights else True
        outputs.append(x.new_empty(source.shape if wanted and source is not None else 0))
    return tuple(outputs)


def _fake_lstm_generate(*arguments: Any) -> _Tensors:
    prompt, length, embedding, h0, c0 = arguments[0], arguments[1], arguments[2], arguments[6], arguments[7]
    shape = (prompt.size(0), length)
    return prompt.new_empty(shape), embedding.new_empty(shape), h0.new_empty(h0.shape), c0.new_empty(c0.shape)


def _fake_gru_generate(*arguments: Any) -> _Tensors:
    prompt, length, embedding, h0 = arguments[0], arguments[1], arguments[2], arguments[6]
    shape = (prompt.size(0), length)
    return prompt.new_empty(shape), embedding.new_empty(shape), h0.new_empty(h0.shape)


def _setup_context(layer: _Layer) -> Callable[..., None]:
    def setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1 + layer.states :])
        _save_for_backward(ctx, layer, inputs, output, bool(inputs[-1]))

    return setup


def _setup_second(layer: _Layer) -> Callable[..., None]:
    def setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        _save_for_second(ctx, layer, inputs)

    return setup


def _autocast_rule(layer: _Layer, device_type: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(key)

    def rule(*arguments: Any) -> Any:
        lowered = _lower_all(device_type, *arguments[: layer.differentiable])
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return layer.op(*lowered, *arguments[layer.differentiable :])

    return rule


def _vmap_loop(op: Any) -> Callable[..., Any]:
    """One call per sample. Right for any argument that is batched."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        samples = []
        for index in range(info.batch_size):
            samples.append(
                op(*(a if d is None else a.select(d, index) for a, d in zip(arguments, in_dims, strict=True)))
            )
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


def _vmap_rule(layer: _Layer) -> Callable[..., Any]:
    """Samples become rows of one larger batch, where weights are shared and no mask depends on the row; else a loop."""
    resets = layer.arguments.index("resets")
    batch_sizes = layer.arguments.index("batch_sizes")
    training = layer.arguments.index("training")
    masks = range(layer.tensors, layer.tensors + (5 if layer is _LSTM else 4))
    loop = _vmap_loop(lambda *arguments: layer.op(*arguments))

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        rows = {0: 1, resets: 1, **dict.fromkeys(range(1, 1 + layer.states), 0)}  # where the batch dimension is
        batched = {index for index, dim in enumerate(in_dims) if dim is not None}
        random = arguments[training] and any(arguments[index] for index in masks)
        if not batched <= rows.keys() or arguments[batch_sizes] is not None or random:
            return loop(info, in_dims, *arguments)
        samples = info.batch_size

        def fold(tensor: Tensor | None, dim: int | None, at: int) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor.movedim(dim, at) if dim is not None else _repeated(tensor, samples, at)
            return tensor.flatten(at, at + 1)

        folded: list[Any] = [
            fold(a, d, rows[index]) if index in rows else a
            for index, (a, d) in enumerate(zip(arguments, in_dims, strict=True))
        ]
        outputs = layer.op(*folded)
        steps = folded[0].size(0)
        unfolded: list[Tensor] = []
        dims: list[int | None] = []
        for index, output in enumerate(outputs):
            if output.dim() == 1:  # an absent reserve
                unfolded.append(output)
                dims.append(None)
            elif index <= layer.states:
                at = 1 if index == 0 else 0
                unfolded.append(output.unflatten(at, (samples, -1)) if output.numel() else _empty(output, samples, at))
                dims.append(at)
            else:  # [T * samples * B, F] in the order of the folded rows
                parts = output.reshape(steps, samples, output.size(0) // max(1, steps * samples), output.size(1))
                unfolded.append(parts.movedim(1, 0).flatten(1, 2))
                dims.append(0)
        return tuple(unfolded), tuple(dims)

    return rule


def _repeated(tensor: Tensor, times: int, at: int) -> Tensor:
    shape = list(tensor.shape)
    return tensor.unsqueeze(at).expand(*shape[:at], times, *shape[at:])


def _empty(output: Tensor, samples: int, at: int) -> Tensor:
    shape = list(output.shape)
    return output.reshape(*shape[:at], samples, shape[at] // samples, *shape[at + 1 :])


def _no_vmap_sentence(name: str) -> str:
    return f"{name} has no vmap rule: its rows are independent, put the samples in the batch B"


def _no_vmap(name: str) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(_no_vmap_sentence(name))

    return rule


def _cuda_kernel(layer: _Layer, name: str, tensors_from: int) -> Callable[..., Any]:
    """The operator on CUDA: the backend in force, else the first of ours that can run. Reserves are alike."""

    def kernel(*arguments: Any) -> Any:
        values = arguments[tensors_from : tensors_from + layer.tensors]
        options = [a for a in arguments[tensors_from + layer.tensors :] if not isinstance(a, Tensor)]
        named = dict(zip(layer.arguments, (*values, *options), strict=False))
        forced = _forced_backend()
        for backend in (forced,) if forced in ("triton", "cuda") else ("triton", "cuda"):
            if backends.can_run(layer.name, backend, named, raise_error=backend == forced):
                break
        else:
            raise NotImplementedError(
                f"torch.ops.genfuse.{name} has no CUDA kernel for this call; see genfuse.explain({layer.name!r}, ...)"
            )
        if backend == "triton":
            from genfuse.kernels import recurrent as triton_kernels

            return getattr(triton_kernels, name)(*arguments)
        return getattr(torch.ops.genfuse_cuda, name)(*arguments)

    return kernel


def _has_cpu_kernel(name: str) -> bool:
    qualified = f"genfuse::{name}"
    return hasattr(torch.ops.genfuse, name) and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")


_cpu_kernels: set[str] = set()
_library: registry.Library | None = None  # its registrations live as long as it does


def _register() -> None:
    """Find the operators that the native library has defined, and register every rule for them."""
    global _library
    library: Any = registry.Library("genfuse", "FRAGMENT")  # type: ignore[no-untyped-call]
    _library = library
    for layer, fake in ((_LSTM, _fake_lstm), (_GRU, _fake_gru)):
        name, backward = f"genfuse::{layer.name}", f"genfuse::{layer.name}_backward"
        layer.op = getattr(torch.ops.genfuse, layer.name).default
        layer.op_backward = getattr(torch.ops.genfuse, f"{layer.name}_backward").default
        layer.on_cpu = _has_cpu_kernel(layer.name) and _has_cpu_kernel(f"{layer.name}_backward")
        if layer.on_cpu:
            _cpu_kernels.add(layer.name)
        registry.register_fake(name, fake, lib=library)
        registry.register_fake(backward, _fake_backward_of(layer), lib=library)
        registry.register_autograd(
            name,
            lambda ctx, *grads: (*_backward(ctx, grads), None),
            setup_context=_setup_context(layer),
            lib=library,
        )
        registry.register_autograd(backward, _second, setup_context=_setup_second(layer), lib=library)
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            library.impl(layer.name, _autocast_rule(layer, device_type, getattr(torch._C.DispatchKey, key)), key)
        registry.register_vmap(name, _vmap_rule(layer), lib=library)
        registry.register_vmap(backward, _vmap_loop(layer.op_backward), lib=library)
        library.impl(layer.name, _cuda_kernel(layer, layer.name, 0), "CUDA")
        library.impl(f"{layer.name}_backward", _cuda_kernel(layer, f"{layer.name}_backward", 1 + layer.states), "CUDA")
    for name, generate in (("lstm_generate", _fake_lstm_generate), ("gru_generate", _fake_gru_generate)):
        if _has_cpu_kernel(name):
            _cpu_kernels.add(name)
        registry.register_fake(f"genfuse::{name}", generate, lib=library)
        registry.register_vmap(f"genfuse::{name}", _no_vmap(f"genfuse.ops.{name}"), lib=library)


def _fake_backward_of(layer: _Layer) -> Callable[..., _Tensors]:
    return lambda *arguments: _fake_backward(layer, arguments)


# ---- backends --------------------------------------------------------------------------------------------------------


def _native_objection(name: str) -> Callable[[backends.Arguments], str | None]:
    def objection(arguments: backends.Arguments) -> str | None:
        return None if name in _cpu_kernels else _native.error() or "the native library has no such operator"

    return objection


def _vendor_objection(arguments: backends.Arguments) -> str | None:
    if not (_cudnn_is_available() and torch.backends.cudnn.enabled):
        return "cuDNN is absent or disabled"
    if any(arguments.get(name) is not None for name in ("ln_ih_weight", "resets")):
        return "cuDNN has neither layer norm nor resets"
    if any(arguments.get(name) for name in ("zoneout_h", "zoneout_c")):
        return "cuDNN has no zoneout"
    masks = ("weight_drop", "input_dropout", "output_dropout")
    if arguments["training"] and any(arguments[name] for name in masks):
        return "cuDNN has none of weight_drop, input_dropout, output_dropout"
    if arguments["batch_sizes"] is not None and arguments["reverse"]:
        return "cuDNN runs a packed sequence backwards only together with a forward pass"
    if (arguments["bias_ih"] is None) != (arguments["bias_hh"] is None):
        return "cuDNN wants both biases or none"
    return None


def _triton_objection(layer: _Layer) -> Callable[[backends.Arguments], str | None]:
    def objection(arguments: backends.Arguments) -> str | None:
        if layer.op is None:
            return _native.error()
        try:
            from genfuse.kernels import recurrent as triton_kernels
        except ImportError as reason:
            return f"the Triton kernels cannot be imported: {reason}"
        try:
            getattr(triton_kernels, f"can_run_{layer.name}")(
                *(arguments[name] for name in layer.arguments), raise_error=True
            )
        except RuntimeError as reason:
            return str(reason)
        return None

    return objection


def _cuda_objection(gates: int) -> Callable[[backends.Arguments], str | None]:
    def objection(arguments: backends.Arguments) -> str | None:
        if (reason := _native.cuda_error()) is not None:
            return reason
        for name, what in (
            ("ln_ih_weight", "layer norm"),
            ("weight_hr", "projection"),
            ("batch_sizes", "packed sequences"),
        ):
            if arguments.get(name) is not None:
                return f"the persistent kernel has no {what}"
        x, h0 = arguments["x"], arguments["h0"]
        code = torch.ops.genfuse_cuda.persistent_objection(
            x.device.index or 0, h0.size(1), h0.size(0), gates, x.element_size()
        )
        reasons = (
            None,
            "the device has no cooperative launch",
            "the recurrent weights and states do not fit into the device's shared memory",
        )
        return reasons[code]

    return objection


def _cuda_generate_objection(arguments: backends.Arguments) -> str | None:
    return _native.cuda_error()


def _enter_backends() -> None:
    entries = backends.Kernel
    in_float32 = "computes in float32"
    half, wide = (torch.float32, torch.bfloat16, torch.float16), backends.FLOATS
    for layer, function, gates in ((_LSTM, lstm, 4), (_GRU, gru, 3)):
        backends.register_op(layer.name, function, "x")
        for kernel in (
            entries(layer.name, "native", ("cpu",), wide, objection=_native_objection(layer.name)),
            entries(
                layer.name, "cudnn", ("cuda",), wide, objection=_vendor_objection, note="plain layers, no 2nd order"
            ),
            entries(layer.name, "triton", ("cuda",), half, proven=False, objection=_triton_objection(layer)),
            entries(layer.name, "cuda", ("cuda",), half[:2], proven=False, objection=_cuda_objection(gates)),
            entries(layer.name, "reference", (), wide),
        ):
            backends.register(kernel)
    for name, generate in (("lstm_generate", lstm_generate), ("gru_generate", gru_generate)):
        backends.register_op(name, generate, "embedding")
        backends.register(entries(name, "native", ("cpu",), wide, objection=_native_objection(name), note=in_float32))
        backends.register(
            entries(name, "cuda", ("cuda",), wide, proven=False, objection=_cuda_generate_objection, note=in_float32)
        )
        backends.register(entries(name, "reference", (), wide, note=in_float32))
    backends.register_op("linear_cross_entropy", linear_cross_entropy, "hidden")
    backends.register(entries("linear_cross_entropy", "torch", (), wide, note="chunked"))
    backends.register(entries("linear_cross_entropy", "reference", (), wide, note="all logits at once"))


_enter_backends()
if _native.load():
    _register()
