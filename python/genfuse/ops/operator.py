"""A registered operator and its backward as one object, with every rule that torch wants to know of it.

For operators whose backward needs no more than their inputs and outputs: sampling, likelihoods. (`ops/recurrent.py`
has reserves of its own and says so there.) The forward schema is ``name(*tensors, *options) -> outputs``, the backward
one ``name_backward(*grads, *tensors, *saved outputs, *options, int needs) -> gradients``, where bit i of `needs` asks
for the gradient of tensor i; a gradient not asked for is an empty tensor.

`Operator.run` calls it in the cheapest way that is right: below autograd where no gradient is wanted, through a slim
`autograd.Function` where one is (`register_autograd` costs three times as much), and through the dispatcher under
compile and functorch. Second derivatives differentiate the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import library as registry
from torch.autograd import forward_ad

from genfuse import _native, backends

__all__ = ["Operator", "can_look_at", "float64_objection", "native_objection", "on_cpu", "under_autocast"]

Tensors = tuple[Tensor, ...]

_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_functorch_top = torch._C._functorch.peek_interpreter_stack
_Transform = torch._C._functorch.TransformType
_any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
_is_compiling = torch.compiler.is_compiling
_forced = backends.forced
on_cpu = _native.load()  # asked once: torch.compile cannot trace the asking

_library: registry.Library | None = None


def rule_library() -> Any:
    """The registry's library for rules in Python: one, because registrations live as long as it does."""
    global _library
    if _library is None:
        _library = registry.Library("genfuse", "FRAGMENT")  # type: ignore[no-untyped-call]
    return _library


def _as_tuple(outputs: Any) -> Tensors:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(eq=False)
class Operator:
    """An operator pair `name`, `name_backward`.

    Attributes:
        name: of the operator, in torch.ops.genfuse.
        arguments: names of the tensors and then of the options, in the schema's order and as in the reference.
        tensors: how many of them are tensors.
        differentiable: how many of those, from the first on, take a gradient.
        outputs: how many results there are.
        constants: which results have no gradient (indices).
        saved: which results backward takes.
        reference: the definition, by names of arguments; returns the results as a tuple.
        fake: results by shape, for tracing; takes the arguments by position.
        fake_gradient: a gradient by shape and strides, for tracing; takes the tensor's index and the tensor.
        recomputes: whether backward of a call with these arguments looks at no result, so that an empty tensor is
            kept in its place.
        module: of genfuse.kernels that has the Triton kernels, by the operator's names.
        lowers: whether autocast makes its tensors narrower, as those of a matrix product, and not wider.
        keeps: whether autocast leaves its tensors as they are, as those of an activation.
    """

    name: str
    arguments: tuple[str, ...]
    tensors: int
    differentiable: int
    outputs: int
    reference: Callable[..., Tensors] = field(repr=False)
    fake: Callable[..., Any] = field(repr=False)
    constants: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()
    module: str = "sampling"
    recomputes: Callable[[Sequence[Any]], bool] = field(default=lambda inputs: False, repr=False)
    fake_gradient: Callable[[int, Tensor], Tensor] = field(
        default=lambda index, tensor: tensor.new_empty(tensor.shape), repr=False
    )
    lowers: bool = False
    keeps: bool = False
    op: Any = None
    op_backward: Any = None

    @property
    def grads(self) -> list[int]:
        """The results that have gradients."""
        return [index for index in range(self.outputs) if index not in self.constants]

    def run_reference(self, arguments: Sequence[Any]) -> Tensors:
        """The reference, by the operator's positional arguments."""
        return self.reference(**dict(zip(self.arguments, arguments, strict=True)))

    # ---- calling it --------------------------------------------------------------------------------------------------

    def run(self, public: str, subject: Tensor, arguments: tuple[Any, ...]) -> Tensors:
        """The results of a call of the public function `public`; `subject` decides on the backend."""
        if on_cpu and _forced() is None and subject.is_cpu:
            backend = "native"
        else:
            named = {**dict(zip(self.arguments, arguments, strict=True)), backends.subject_of(public): subject}
            backend = backends.select(public, named)
        if backend == "reference" or self.op is None or _wants_reference():
            return self.run_reference(arguments)
        if _is_compiling():
            return _as_tuple(self.op(*arguments))
        if _functorch_top() is not None:
            if _Transform.Grad in _transforms():
                return _as_tuple(_Transformed.apply(*arguments, self))  # type: ignore[no-untyped-call]
            return _as_tuple(self.op(*arguments))
        if torch.is_grad_enabled() and _any_requires_grad(*arguments[: self.tensors]):
            return _as_tuple(_Forward.apply(*arguments, self))  # type: ignore[no-untyped-call]
        with _BelowAutograd():
            return _as_tuple(self.op(*arguments))

    # ---- its derivatives ---------------------------------------------------------------------------------------------

    def save_for_backward(self, ctx: Any, inputs: Sequence[Any], outputs: Tensors) -> None:
        kept = [outputs[index] for index in self.saved]
        if kept and self.recomputes(inputs):  # the caller may write over what is not needed
            kept = [output.new_empty(0) for output in kept]
        ctx.save_for_backward(*inputs[: self.tensors], *kept)
        ctx.set_materialize_grads(False)
        ctx.options = tuple(inputs[self.tensors : len(self.arguments)])

    def backward(
        self, ctx: Any, grads: Sequence[Tensor | None], needed: Sequence[bool] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of all the operator's arguments; `needed` says of which, if not of all that take one."""
        nothing = (None,) * len(self.arguments)
        wanted = [grads[index] for index in self.grads]
        if all(grad is None for grad in wanted):
            return nothing
        if needed is None:
            needed = ctx.needs_input_grad[: self.differentiable]
        needs = sum(1 << index for index, need in enumerate(needed) if need)
        arguments = (*wanted, *ctx.saved_tensors, *ctx.options, needs)
        if _is_compiling():
            outputs = self.op_backward(*arguments)
        elif _functorch_top() is not None:
            outputs = _TransformedBackward.apply(*arguments, self)  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled():
            outputs = _Backward.apply(*arguments, self)  # type: ignore[no-untyped-call]
        else:
            with _BelowAutograd():
                outputs = self.op_backward(*arguments)
        found = _as_tuple(outputs)
        return tuple(found[i] if i < self.differentiable and needed[i] else None for i in range(len(self.arguments)))

    def save_for_second(self, ctx: Any, inputs: Sequence[Any]) -> None:
        # Saved outputs are functions of the inputs: the reference computes them anew.
        grads = len(self.grads)
        ctx.save_for_backward(*inputs[: grads + self.tensors])
        ctx.set_materialize_grads(False)
        ctx.arity = len(inputs)
        first = grads + self.tensors + len(self.saved)
        ctx.options, ctx.needs = tuple(inputs[first : first + len(self.arguments) - self.tensors]), inputs[first:][-1]

    def second(self, ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of all the arguments of the backward operator: the reference's gradient, differentiated."""
        count = len(self.grads)
        saved, keep_graph = ctx.saved_tensors, torch.is_grad_enabled()
        result: list[Tensor | None] = [None] * ctx.arity
        wanted = [
            (index, cotangent)
            for index, cotangent in enumerate(cotangents)
            if cotangent is not None and ctx.needs >> index & 1
        ]
        if not wanted:
            return tuple(result)
        if not _is_compiling() and _functorch_top() is not None:  # where nothing may require grad
            for place, gradient in self._second_by_vjp(ctx, wanted).items():
                result[place] = gradient
            return tuple(result)

        def leaf(tensor: Tensor | None) -> Tensor | None:
            """A tensor to differentiate by, on the graph of the original if a third derivative may follow."""
            if tensor is None:
                return None
            if keep_graph and tensor.requires_grad:
                return tensor.view_as(tensor)
            return tensor.detach().requires_grad_()

        with torch.enable_grad():
            grads = [leaf(grad) for grad in saved[:count]]
            inputs = [leaf(tensor) for tensor in saved[count : count + self.differentiable]]
            subjects = [tensor for index, _ in wanted if (tensor := inputs[index]) is not None]  # asked for, so there
            outputs = self.run_reference((*inputs, *saved[count + self.differentiable :], *ctx.options))
            pairs = [
                (outputs[index], grad)
                for index, grad in zip(self.grads, grads, strict=True)
                if grad is not None and outputs[index].requires_grad
            ]
            first = torch.autograd.grad(
                [output for output, _ in pairs],
                subjects,
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

    def _second_by_vjp(self, ctx: Any, wanted: list[tuple[int, Tensor]]) -> dict[int, Tensor]:
        """The same under functorch, by place among the backward operator's arguments."""
        count, given = len(self.grads), ctx.saved_tensors
        used = [place for place in range(count) if given[place] is not None]
        inputs = [index for index, _ in wanted]
        needed = ctx.needs_input_grad[: count + self.differentiable]
        targets = [place for place, need in enumerate(needed) if need and given[place] is not None]
        if not used or not targets:
            return {}

        def first(*values: Tensor) -> Tensors:
            """The gradients that have a cotangent, as a function of the targets."""
            arguments = list(given)
            for place, value in zip(targets, values, strict=True):
                arguments[place] = value

            def outputs(*values: Tensor) -> Tensors:
                tensors = arguments[count:]
                for index, value in zip(inputs, values, strict=True):
                    tensors[index] = value
                found = self.run_reference((*tensors, *ctx.options))
                return tuple(found[self.grads[place]] for place in used)

            pull: Any = torch.func.vjp(outputs, *(arguments[count + index] for index in inputs))[1]
            return tuple(pull(tuple(arguments[place] for place in used)))

        pull: Any = torch.func.vjp(first, *(given[place] for place in targets))[1]
        return dict(zip(targets, pull(tuple(cotangent for _, cotangent in wanted)), strict=True))

    # ---- the rules ---------------------------------------------------------------------------------------------------

    def register(self) -> None:
        """Find the operators that the native library has defined, and register every rule for them."""
        library, backward = rule_library(), f"{self.name}_backward"
        self.op = getattr(torch.ops.genfuse, self.name).default
        registry.register_fake(f"genfuse::{self.name}", self.fake, lib=library)
        registry.register_vmap(f"genfuse::{self.name}", vmap_by_loop(self.op), lib=library)
        if not self.keeps:
            autocast_rule(self.name, self.op, lowered if self.lowers else widened)
        library.impl(self.name, self._on_cuda(self.name), "CUDA")
        if not self.differentiable:
            return
        self.op_backward = getattr(torch.ops.genfuse, backward).default
        registry.register_fake(f"genfuse::{backward}", self._fake_backward, lib=library)
        registry.register_vmap(f"genfuse::{backward}", vmap_by_loop(self.op_backward), lib=library)
        library.impl(backward, self._on_cuda(backward), "CUDA")

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = _as_tuple(output)
            ctx.mark_non_differentiable(*(outputs[index] for index in self.constants))
            self.save_for_backward(ctx, inputs, outputs)

        def setup_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self.save_for_second(ctx, inputs)

        registry.register_autograd(
            f"genfuse::{self.name}", lambda ctx, *grads: self.backward(ctx, grads), setup_context=setup, lib=library
        )
        registry.register_autograd(
            f"genfuse::{backward}", lambda ctx, *grads: self.second(ctx, grads), setup_context=setup_second, lib=library
        )

    def _fake_backward(self, *arguments: Any) -> Any:
        first, needs = len(self.grads), arguments[-1]
        tensors = arguments[first : first + self.differentiable]
        subject = tensors[0]
        gradients = tuple(
            self.fake_gradient(index, tensor) if tensor is not None and needs >> index & 1 else subject.new_empty(0)
            for index, tensor in enumerate(tensors)
        )
        return gradients if self.differentiable > 1 else gradients[0]

    def _on_cuda(self, name: str) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            import importlib

            kernels = importlib.import_module(f"genfuse.kernels.{self.module}")
            return getattr(kernels, name)(*arguments)

        return kernel

    def enter(
        self,
        function: Callable[..., Any],
        subject: str,
        *,
        triton: bool | Callable[[backends.Arguments], str | None] = True,
        integers: tuple[torch.dtype, ...] = (),
        native: Callable[[backends.Arguments], str | None] | None = None,
    ) -> None:
        """Enter a public function that this operator serves into the registry of backends; `integers` are the dtypes
        of its subject besides floating ones; `native` and `triton` say why that backend cannot serve a call, where that
        is more than its not being there.
        """
        name, half = function.__name__, (torch.float32, torch.bfloat16, torch.float16, *integers)
        every = (*backends.FLOATS, *integers)
        backends.register_op(name, function, subject)
        backends.register(backends.Kernel(name, "native", ("cpu",), every, objection=native or native_objection))
        if triton:
            more = triton if callable(triton) else lambda arguments: None

            def objection(arguments: backends.Arguments) -> str | None:
                return self.triton_objection(arguments) or more(arguments)

            backends.register(backends.Kernel(name, "triton", ("cuda",), half, proven=False, objection=objection))
        backends.register(backends.Kernel(name, "reference", (), every))

    def triton_objection(self, arguments: backends.Arguments) -> str | None:
        """Why the Triton kernel cannot serve a call."""
        if self.op is None:
            return _native.error()
        try:
            import triton  # noqa: F401
        except ImportError as reason:
            return f"triton is not installed ({reason})"
        return None


class _Forward(torch.autograd.Function):
    """The operator with its gradient, at a third of the cost of the dispatcher's registered rule."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, operator = arguments
        with _BelowAutograd():
            outputs = operator.op(*inputs)
        ctx.operator = operator
        found = _as_tuple(outputs)
        if operator.constants:
            ctx.mark_non_differentiable(*(found[index] for index in operator.constants))
        operator.save_for_backward(ctx, inputs, found)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*ctx.operator.backward(ctx, grads), None)


class _Transformed(torch.autograd.Function):
    """The operator with its gradient under `torch.func.grad`, which does not take the registered rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *inputs, operator = arguments
        return operator.op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = operator = inputs[-1]
        outputs = _as_tuple(output)
        if operator.constants:
            ctx.mark_non_differentiable(*(outputs[index] for index in operator.constants))
        operator.save_for_backward(ctx, inputs, outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*ctx.operator.backward(ctx, grads), None)


class _Backward(torch.autograd.Function):
    """The operator's gradient with the gradient's gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, operator = arguments
        with _BelowAutograd():
            outputs = operator.op_backward(*inputs)
        ctx.operator = operator
        operator.save_for_second(ctx, inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*ctx.operator.second(ctx, cotangents), None)


class _TransformedBackward(torch.autograd.Function):
    """The same under `torch.func.grad`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *inputs, operator = arguments
        return operator.op_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[-1]
        ctx.operator.save_for_second(ctx, inputs[:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*ctx.operator.second(ctx, cotangents), None)


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
    return [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or []]


def can_look_at(tensor: Tensor) -> bool:
    """Whether the values are there to be read, at no cost: on the CPU, and not traced or batched."""
    return tensor.is_cpu and type(tensor) is Tensor and not _is_compiling() and _functorch_top() is None


def widened(device_type: str, *tensors: Any) -> tuple[Any, ...]:
    """Autocast's rule for what must keep its digits: half types of the device become float32."""
    return tuple(
        tensor.float()
        if isinstance(tensor, Tensor)
        and tensor.dtype in (torch.bfloat16, torch.float16)
        and tensor.device.type == device_type
        else tensor
        for tensor in tensors
    )


def under_autocast(subject: object, *tensors: Any) -> tuple[Any, ...]:
    """The tensors as autocast wants them, if it is on for the subject's device."""
    # Of a device without autocast, as meta, torch does not take the question.
    if isinstance(subject, Tensor) and not subject.is_meta and torch.is_autocast_enabled(subject.device.type):
        return widened(subject.device.type, *tensors)
    return tensors


def lowered(device_type: str, *tensors: Any) -> tuple[Any, ...]:
    """Autocast's rule for the operands of a product: floating tensors of the device but float64 become its dtype."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype not in (dtype, torch.float64)
        and tensor.device.type == device_type
        else tensor
        for tensor in tensors
    )


def autocast_rule(name: str, op: Any, change: Callable[..., tuple[Any, ...]]) -> None:
    """Register autocast's rule for direct callers of the operator."""
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def rule(*arguments: Any, device_type: str = device_type, key: str = key) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return op(*change(device_type, *arguments))

        rule_library().impl(name, rule, key)


def vmap_by_loop(op: Any) -> Callable[..., Any]:
    """A vmap rule: one call for each example."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        # Every random pair must be contiguous; what is broadcast must not be copied.
        arguments = tuple(
            argument.movedim(dim or 0, 0).contiguous().movedim(0, dim or 0)
            if isinstance(argument, Tensor) and argument.dtype == torch.int64
            else argument
            for argument, dim in zip(arguments, in_dims, strict=True)
        )

        def example(index: int) -> list[Any]:
            return [
                argument if dim is None or not isinstance(argument, Tensor) else argument.select(dim, index)
                for argument, dim in zip(arguments, in_dims, strict=True)
            ]

        if info.batch_size == 0:  # the shapes of one example that is not there
            one = [
                a
                if dim is None or not isinstance(a, Tensor)
                else a.new_zeros([n for k, n in enumerate(a.shape) if k != dim])
                for a, dim in zip(arguments, in_dims, strict=True)
            ]
            shapes = op(*one)
            if isinstance(shapes, Tensor):
                return shapes.new_empty((0, *shapes.shape)), 0
            return tuple(out.new_empty((0, *out.shape)) for out in shapes), (0,) * len(shapes)
        results = [op(*example(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def float64_objection(arguments: backends.Arguments) -> str | None:
    """Why kernels that compute in float32 cannot serve a call whose tensors may differ in dtype."""
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
            return f"{name} is float64"
    return None


def native_objection(arguments: backends.Arguments) -> str | None:
    """Why the native library cannot serve a call."""
    return None if on_cpu else _native.error()
