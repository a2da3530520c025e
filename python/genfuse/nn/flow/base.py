"""Invertible layers, and the chain of them that can run backwards to save memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Flow", "Inverse", "Transform"]

_functorch_top = torch._C._functorch.peek_interpreter_stack


class Transform(torch.nn.Module):
    """Base of the invertible layers: a bijection with the logarithm of its Jacobian determinant.

    `forward` goes from data to noise, `inverse` from noise to data, and each returns ``(result, log_abs_det [B])`` of
    the direction taken, float32 or wider: ``log p(x) = log p(z) + log_abs_det`` with ``z, log_abs_det = forward(x)``.
    The first dimension is the batch. Both take a `context` to be conditional on, which a layer that was built without
    one ignores, so that layers of both kinds make a chain.

    Example:
        >>> class Double(Transform):
        ...     def forward(self, x, context=None):
        ...         return 2 * x, torch.full((len(x),), x[0].numel() * math.log(2))
        ...     def inverse(self, z, context=None):
        ...         return z / 2, torch.full((len(z),), -z[0].numel() * math.log(2))
        >>> import math
        >>> Flow([Double(), Double()])(torch.ones(2, 3))
        (tensor([[4., 4., 4.],
                [4., 4., 4.]]), tensor([4.1589, 4.1589]))
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__}: forward (data to noise) is not defined")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From noise to data: ``(x, log_abs_det)`` of this direction.

        Raises:
            NotImplementedError: this transform has none.
        """
        raise NotImplementedError(f"{type(self).__name__}: inverse (noise to data) is not defined")


class Inverse(Transform):
    """A transform with its directions exchanged.

    Args:
        transform: whose `inverse` becomes `forward`.

    Example:
        >>> from genfuse import nn
        >>> layer = nn.LULinear(3)
        >>> x = torch.randn(2, 3)
        >>> bool(torch.equal(nn.Inverse(layer)(x)[0], layer.inverse(x)[0]))
        True
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.transform(z, context))


class Flow(Transform):
    """A chain of transforms: the first one sees the data.

    With `reversible` the memory for training does not grow with the depth of the chain. Only its result is kept;
    backward recovers each transform's input from its output, by its inverse, and differentiates one transform at a time
    (Gomez et al. 2017, arXiv 1707.04585, who did so for residual networks; flows are invertible already). That costs an
    inverse and a forward pass more, and gradients are those of a stored chain up to the rounding of the inverses. It is
    for chains of cheap inverses: couplings, actnorm, invertible convolutions. What it asks for:

    - No transform draws random numbers (dropout in a conditioner, dequantisation): backward could not repeat them.
      A chain that does raises RuntimeError.
    - First derivatives only; backward with ``create_graph=True`` raises RuntimeError.
    - Results and parameters are as they were when backward runs; torch says so if they were written to.
    - Gradients reach parameters, the input and the context, and no other tensors that a transform may hold.

    Under `torch.compile` and `torch.func` transforms the chain is differentiated as if it were stored.

    Args:
        transforms: the layers, in the order from data to noise. One layer may stand in several places.
        reversible: recompute instead of storing.

    It is indexed, sliced, iterated and appended to as `torch.nn.Sequential`, and names its parameters as that does.

    Raises:
        TypeError: a transform is no Module, or has no inverse method.

    Example:
        >>> from genfuse import nn
        >>> flow = nn.Flow([nn.ActNorm(4), nn.AffineCoupling(4, hidden=(8,))], reversible=True)
        >>> z, log_abs_det = flow(torch.randn(16, 4))
        >>> x, _ = flow.inverse(z)
        >>> z.shape, log_abs_det.shape, len(flow)
        (torch.Size([16, 4]), torch.Size([16]), 2)
    """

    def __init__(self, transforms: Iterable[torch.nn.Module], *, reversible: bool = False) -> None:
        super().__init__()
        self.reversible = bool(reversible)
        for transform in transforms:
            self.append(transform)

    # ---- as a sequence -----------------------------------------------------------------------------------------------

    def append(self, transform: torch.nn.Module) -> Flow:
        """Put a transform at the noise's end."""
        given: object = transform
        if not isinstance(given, torch.nn.Module) or not callable(getattr(given, "inverse", None)):
            raise TypeError(f"Flow: transforms must be Modules with an inverse, got {type(transform).__name__}")
        self.add_module(str(len(self._modules)), transform)
        return self

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Transform]:
        return iter(cast(Iterable[Transform], self._modules.values()))

    def __getitem__(self, index: int | slice) -> Any:
        found = list(self)[index]
        return Flow(found, reversible=self.reversible) if isinstance(found, list) else found

    def extra_repr(self) -> str:
        return "reversible=True" if self.reversible else ""

    # ---- running it --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)

    def _run(self, x: Tensor, context: Tensor | None, invert: bool) -> tuple[Tensor, Tensor]:
        if (
            not self.reversible
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or _functorch_top() is not None
        ):
            return _chain(self, x, context, invert)
        parameters = list(self.parameters())
        wanted = [x, *parameters] if context is None else [x, context, *parameters]
        if not any(tensor.requires_grad for tensor in wanted) or len(self) == 0:
            return _chain(self, x, context, invert)
        found = _Reversible.apply(self, invert, x, context, *parameters)  # type: ignore[no-untyped-call]
        return cast(tuple[Tensor, Tensor], found)


def _chain(flow: Flow, x: Tensor, context: Tensor | None, invert: bool) -> tuple[Tensor, Tensor]:
    total: Tensor | None = None
    for step in reversed(list(flow)) if invert else flow:
        x, log_abs_det = step.inverse(x, context) if invert else step(x, context)
        total = log_abs_det if total is None else total + log_abs_det
    return x, zero_log_det(x) if total is None else total


def zero_log_det(x: Tensor) -> Tensor:
    """The log-determinant of what changes no volume: zeros ``[B]``, float32 or wider."""
    return x.new_zeros(x.size(0), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


# ---- the chain that keeps its end only -------------------------------------------------------------------------------


def _random_state(x: Tensor) -> list[Tensor]:
    state = [torch.get_rng_state()]
    if x.is_cuda and not torch.cuda.is_current_stream_capturing():
        state.append(torch.cuda.get_rng_state(x.device))
    return state


class _Reversible(torch.autograd.Function):
    """Parameters are arguments, though the chain has them: whatever watches their gradients (DDP, hooks,
    autograd.grad) then finds them where it looks."""

    @staticmethod
    def forward(
        ctx: Any, flow: Flow, invert: bool, x: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        before = _random_state(x)
        z, log_abs_det = _chain(flow, x, context, invert)
        if not all(map(torch.equal, before, _random_state(x))):
            raise RuntimeError(
                "Flow: with reversible=True no transform may draw random numbers (dropout in a conditioner, "
                "dequantisation), because backward cannot repeat them; put it outside of the chain, or use "
                "reversible=False"
            )
        ctx.flow, ctx.invert = flow, invert
        kind = x.device.type
        ctx.autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, context, *parameters)
        return z, log_abs_det

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Flow: reversible=True gives first derivatives only, and backward was called with create_graph=True; "
                "use reversible=False"
            )
        z, context, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        loop = _Backward(ctx.flow, ctx.invert, ctx.autocast)
        live = list(ctx.flow.parameters())
        call: Any = loop
        if len(live) != len(parameters) or any(now is not then for now, then in zip(live, parameters, strict=True)):
            # torch.func.functional_call had put other tensors in the parameters' place, and has put them back since.
            names = [f"flow.{name}" for name, _ in ctx.flow.named_parameters()]
            parameters = [
                parameter.detach().requires_grad_(need) for parameter, need in zip(parameters, needed[2:], strict=True)
            ]
            swapped = dict(zip(names, parameters, strict=True))

            def call(*arguments: Any) -> Any:
                return torch.func.functional_call(loop, swapped, arguments)

        return (None, None, *call(z, context, grads, parameters, needed))


class _Backward(torch.nn.Module):
    """The way back through a chain; a module, so that `functional_call` can exchange the chain's parameters."""

    def __init__(self, flow: Flow, invert: bool, autocast: tuple[str, bool, torch.dtype]) -> None:
        super().__init__()
        self.flow, self.invert, self.autocast = flow, invert, autocast

    def forward(
        self,
        z: Tensor,
        context: Tensor | None,
        grads: tuple[Tensor | None, Tensor | None],
        parameters: list[Tensor],
        needed: tuple[bool, ...],
    ) -> list[Tensor | None]:
        grad, log_det_grad = grads
        places = {id(parameter): index for index, parameter in enumerate(parameters) if needed[2 + index]}
        found: list[Tensor | None] = [None] * len(parameters)
        context_grad: Tensor | None = None
        if context is not None:
            context = context.detach().requires_grad_(needed[1])
        steps = list(self.flow) if self.invert else list(self.flow)[::-1]
        z = z.detach()
        for index, step in enumerate(steps):
            last = index == len(steps) - 1
            own = list({id(p): p for p in step.parameters() if id(p) in places}.values())
            with self._as_before():
                with torch.no_grad():
                    x = (step(z, context) if self.invert else step.inverse(z, context))[0]
                with torch.enable_grad():
                    x = x.detach().requires_grad_(needed[0] or not last)
                    outputs = step.inverse(x, context) if self.invert else step(x, context)
            subjects = [x] if x.requires_grad else []
            if context is not None and context.requires_grad:
                subjects.append(context)
            subjects += own
            pairs = [
                (output, cotangent)
                for output, cotangent in zip(outputs, (grad, log_det_grad), strict=True)
                if cotangent is not None and output.requires_grad
            ]
            gradients: list[Tensor | None] = [None] * len(subjects)
            if pairs and subjects:
                gradients = list(
                    torch.autograd.grad(
                        [output for output, _ in pairs], subjects, [one for _, one in pairs], allow_unused=True
                    )
                )
            del outputs, pairs
            grad = gradients.pop(0) if x.requires_grad else None
            if context is not None and context.requires_grad:
                context_grad = _sum(context_grad, gradients.pop(0))
            for parameter, gradient in zip(own, gradients, strict=True):
                place = places[id(parameter)]
                found[place] = _sum(found[place], gradient)
            z = x.detach()
        return [grad, context_grad, *found]

    @contextlib.contextmanager
    def _as_before(self) -> Iterator[None]:
        kind, enabled, dtype = self.autocast
        # Its cache would keep half copies of weights that belong to a graph which is gone by the next step.
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more
