"""The flows against their twins in plain PyTorch, against integrals, and as torch modules."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from genfuse import distributions, models, nn
from genfuse.reference.flow import models as twins
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, D, CONTEXT = 5, 4, 3
SHAPE = (1, 8, 8)
VECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "realnvp": ("RealNVP", {"transforms": 4, "hidden": (9, 8)}),
    "realnvp, context": ("RealNVP", {"transforms": 3, "hidden": (9,), "context_features": CONTEXT, "base": "diagonal"}),
    "realnvp, exp": ("RealNVP", {"transforms": 2, "hidden": (9,), "actnorm": False, "scale": "exp"}),
    "nsf": ("NeuralSplineFlow", {"transforms": 3, "hidden": (9, 8), "num_bins": 5}),
    "nsf, context": (
        "NeuralSplineFlow",
        {"hidden": (9, 9), "residual": True, "linear": "lu", "context_features": CONTEXT},
    ),
    "nsf, permuted": ("NeuralSplineFlow", {"hidden": (9,), "linear": "permutation", "normalizer": "identity"}),
    "nsf, autoregressive": ("NeuralSplineFlow", {"transforms": 2, "hidden": (9, 8), "coupling": False}),
    "nsf, autoregressive, context": (
        "NeuralSplineFlow",
        {"transforms": 2, "hidden": (9,), "coupling": False, "linear": "lu", "context_features": CONTEXT},
    ),
    "maf": ("MAF", {"transforms": 3, "hidden": (9, 8)}),
    "maf, context": (
        "MAF",
        {"transforms": 2, "hidden": (9,), "activation": "tanh", "actnorm": True, "context_features": CONTEXT},
    ),
    "iaf": ("IAF", {"transforms": 3, "hidden": (9, 8), "scale": "softplus"}),
    "iaf, context": ("IAF", {"transforms": 2, "hidden": (9,), "context_features": CONTEXT, "base": "diagonal"}),
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "realnvp of images": ("RealNVP", {"channels": 6}),
    "realnvp of images, context": ("RealNVP", {"channels": 6, "scales": 3, "context_features": CONTEXT}),
    "glow": ("Glow", {"levels": 2, "steps": 2, "channels": 6}),
    "glow, additive": (
        "Glow",
        {"levels": 2, "steps": 2, "channels": 6, "additive": True, "lu": False, "learn_top": False, "pixel_levels": 32},
    ),
    "nsf of images": ("NeuralSplineFlow", {"transforms": 2, "hidden": (9,)}),
    "maf of images": ("MAF", {"transforms": 2, "hidden": (66,), "levels": 16, "context_features": None}),
    "iaf of images": ("IAF", {"transforms": 2, "hidden": (66,), "alpha": 0.1}),
    "glow, context": ("Glow", {"levels": 1, "steps": 3, "channels": 6, "context_features": CONTEXT}),
}
ALL = {**VECTORS, **IMAGES}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(package: Any, case: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    name, options = ALL[case]
    torch.manual_seed(1)
    return getattr(package, name)(SHAPE if case in IMAGES else D, **(options | more)).to(dtype)


def disturbed(case: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A model that is not what it starts as: every parameter moved, actnorm begun."""
    model = build(models, case, **more)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        small = name.endswith(("lower", "upper", "log_s", "conv.weight")) or parameter.dim() == 4
        size = 0.02 if model.flatten else 0.05 if small else 0.2  # sixty-four features in a row add up
        parameter.data += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.ActNorm):
            module.initialized.fill_(True)
            module._ready = True
    return model.to(dtype)


def twin_of(model: Any, case: str) -> Any:
    twin = build(twins, case, next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def data(case: str, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    if case in IMAGES:
        levels = ALL[case][1].get("pixel_levels", ALL[case][1].get("levels" if case[0] != "g" else "", 256))
        x = torch.randint(levels, (batch, *SHAPE), generator=generator).to(dtype)
    else:
        x = torch.randn(batch, D, generator=generator, dtype=torch.float64).to(dtype)
    context = torch.randn(batch, CONTEXT, generator=generator, dtype=torch.float64).to(dtype)
    return (x, context) if "context" in case else (x,)


def noise(case: str, batch: int = BATCH, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Dequantisation noise, for those who have any; multiples of 2^-20, which float32 has, too."""
    if case not in IMAGES:
        return {}
    u = torch.randint(2**20, (batch, *SHAPE), generator=torch.Generator().manual_seed(8))
    return {"u": (u / 2**20).to(dtype)}


# ---- the twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL)
def test_density_gradients_and_samples_are_the_twins(case: str) -> None:
    model, given = disturbed(case), data(case)
    twin = twin_of(model, case)
    assert list(model.state_dict()) == list(twin.state_dict())
    found = []
    for one in (model, twin):
        torch.manual_seed(3)  # of the dequantisation
        loss = one.loss(*given)
        loss.backward()
        log_prob, bits = one.log_prob(*given, **noise(case)), one.bits_per_dim(*given, **noise(case))
        torch.manual_seed(4)
        samples = [one.sample(BATCH, *given[1:]), one.sample(BATCH, *given[1:], temperature=0.7)]
        z, log_abs_det = one.transform(*given, **noise(case))
        found.append(([loss, log_prob, bits, z, log_abs_det, *samples], dict(one.named_parameters())))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    for name, parameter in found[0][1].items():
        assert parameter.grad is not None, name
        want = found[1][1][name].grad
        scale = float(want.abs().max())
        torch.testing.assert_close(parameter.grad, want, rtol=1e-7, atol=1e-9 + 1e-9 * scale, msg=f"{name}: {want}")


@pytest.mark.parametrize("case", ["realnvp", "glow", "realnvp of images", "maf"])
def test_first_batch_is_the_twins(case: str) -> None:
    model, given = build(models, case), data(case, batch=16)
    twin = twin_of(model, case)
    for one in (model, twin):
        one.loss(*given, **noise(case, 16))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("case", ["realnvp, context", "nsf", "nsf, autoregressive", "maf", "iaf", "glow"])
def test_float32_is_as_accurate_as_the_twin(case: str) -> None:
    """Of five batches' gradients by all parameters as one vector: an element's error is a throw of the dice, whose
    spread is wider than any factor."""
    model = disturbed(case, torch.float32)
    twin = twin_of(model, case)
    batches = [[one.flip(0) * (1.0 - 0.05 * k) for one in data(case, torch.float32, 8)] for k in range(5)]
    if case in IMAGES:
        batches = [[one.floor() for one in batch] for batch in batches]

    def run(one: Any, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        one = copy.deepcopy(one)
        for parameter in one.parameters():
            parameter.data = change(parameter.detach())
        dtype = next(one.parameters()).dtype
        for buffer in one.buffers():
            buffer.data = buffer.to(dtype) if buffer.is_floating_point() else buffer
        u = {name: value.to(dtype) for name, value in noise(case, 8).items()}
        log_probs, gradients = [], []
        for x, *context in batches:
            x = x.to(dtype) if case in IMAGES else change(x)
            log_probs.append(one.log_prob(x, *map(change, context), **u))
            gradients += torch.autograd.grad(log_probs[-1].sum(), list(one.parameters()))
        return [torch.cat(log_probs).detach(), torch.cat([gradient.flatten() for gradient in gradients])]

    eager = eager_runs(lambda nudge: run(twin, nudge))
    results = run(model, lambda tensor: tensor), run(twin, Tensor.double)
    for name, actual, runs, exact in zip(("log_prob", "gradient"), results[0], eager, results[1], strict=True):
        assert_as_accurate(actual, runs, exact, name, gradient=name == "gradient")


@pytest.mark.parametrize("case", ["realnvp", "nsf", "nsf, autoregressive", "maf"])
def test_trained_side_by_side(case: str) -> None:
    """Twenty-five steps of Adam from one state: the curves agree, and the model learns."""
    model = build(models, case)
    twin = twin_of(model, case)
    x = torch.randn(64, D, dtype=torch.float64)
    x = torch.cat([x[:, :2], x[:, 2:] * 0.3 + x[:, :2].sin()], 1)
    curves = []
    for one in (model, twin):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.01)
        curve = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = one.loss(x)
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-6, atol=1e-7)
    assert curves[0][-1] < curves[0][0] - 0.2


# ---- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL)
def test_round_trip_and_jacobian(case: str) -> None:
    model, given = disturbed(case).eval(), data(case)
    if case in IMAGES:
        x = torch.randn(BATCH, *SHAPE, dtype=torch.float64)  # of the real images that the chain itself sees
        x = x.flatten(1) if model.flatten else x
        z, log_abs_det = model.flow(x, *given[1:])
        back, behind = model.flow.inverse(z, *given[1:])
        whole, _ = model.transform(*given)
        assert torch.equal(model.inverse(whole, *given[1:])[0], given[0])
        map_of: Any = model.flow
    else:
        (x, *_), map_of = given, model.transform
        z, log_abs_det = model.transform(*given)
        back, behind = model.inverse(z, *given[1:])
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(behind, -log_abs_det, rtol=1e-8, atol=1e-8)
    first = [one[:1] for one in given[1:]]
    jacobian = torch.autograd.functional.jacobian(lambda x: map_of(x.unsqueeze(0), *first)[0].flatten(), x[0])
    exact = torch.linalg.slogdet(jacobian.flatten(1))[1]
    torch.testing.assert_close(log_abs_det[0], exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", VECTORS)
def test_round_trip_in_float32(case: str) -> None:
    """Within 64 ulp of what float64 says rounding in z, and in each layer, may move x by (a hundred times at most)."""
    model, given = disturbed(case, torch.float32).eval(), data(case, torch.float32)
    with torch.no_grad():
        z, _ = model.transform(*given)
        error = (model.inverse(z, *given[1:])[0] - given[0]).abs().max()
    exact, wide = disturbed(case).eval(), [one.double() for one in given]
    first = [one[:1] for one in wide[1:]]
    worst = 0.0
    for row in range(BATCH):
        more = [one[row : row + 1] for one in wide[1:]]
        slopes = torch.autograd.functional.jacobian(
            lambda x, more=more: exact.transform(x.unsqueeze(0), *more)[0][0], wide[0][row]
        )
        worst = max(worst, float(torch.linalg.cond(slopes)))
    assert len(first) == len(given) - 1
    assert float(error) <= 64 * torch.finfo(torch.float32).eps * worst * float(given[0].abs().max())


@pytest.mark.parametrize(
    ("name", "options"),
    [("RealNVP", {"transforms": 4}), ("NeuralSplineFlow", {"num_bins": 6}), ("MAF", {"transforms": 2})],
)
def test_density_integrates_to_one(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = getattr(models, name)(2, hidden=(8,), **options).double()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.eval()
    side = torch.linspace(-12.0, 12.0, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        total = model.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(float(total) - 1.0) < 2e-3


@pytest.mark.parametrize("case", ALL)
def test_rsample_and_log_prob(case: str) -> None:
    more = {"alpha": 0.0} if case in IMAGES else {}  # for which every sample is between 0 and levels
    model, given = disturbed(case, **more).eval(), data(case)
    x, log_prob = model.rsample_and_log_prob(BATCH, *given[1:], generator=torch.Generator().manual_seed(5))
    assert x.requires_grad
    assert log_prob.requires_grad
    if case not in IMAGES:
        torch.testing.assert_close(model.log_prob(x, *given[1:]), log_prob, rtol=1e-7, atol=1e-7)
    else:  # numbers between levels: their floor and the rest are what log_prob takes
        inside = x.detach()
        levels = model.dequantize.levels
        # (Far out in the logit, float64 has few digits of the distance to the end.)
        kept = ((inside > 1e-6) & (inside < levels - 1e-6)).flatten(1).all(1)
        assert bool(kept.any())
        whole = inside.floor().clamp(0, levels - 1)
        again = model.log_prob(whole, *given[1:], u=inside - whole)
        torch.testing.assert_close(again[kept], log_prob[kept], rtol=1e-6, atol=1e-4)
    sample = model.sample(BATCH, *given[1:], generator=torch.Generator().manual_seed(5))
    want = x if case not in IMAGES else x.floor().clamp(0, model.dequantize.levels - 1)
    torch.testing.assert_close(sample, want.detach())


def test_bits_per_dim_is_what_a_uniform_model_has() -> None:
    """A base that is the logit's uniform: log2(levels) bits, whatever the pixels."""

    class LogisticBase(distributions.BaseDistribution):
        def log_prob(self, x: Tensor) -> Tensor:
            return (torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)).flatten(1).sum(1)

    first = nn.DequantizeLogit(256, 0.0)
    model = models.FlowModel(
        nn.Flow([nn.Squeeze(1)]), LogisticBase((1, 4, 4)), event_shape=(1, 4, 4), dequantize=first
    ).double()
    x = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(
        model.bits_per_dim(x, u=torch.full(x.shape, 0.5).double()), torch.full((3,), 8.0).double()
    )


@pytest.mark.parametrize("case", ["glow", "realnvp of images"])
def test_bytes_and_floats_are_the_same(case: str) -> None:
    model, (x,) = disturbed(case, torch.float32), data(case)
    found = [model.log_prob(one, **noise(case, dtype=torch.float32)) for one in (x.to(torch.uint8), x.float())]
    torch.testing.assert_close(*found)
    assert model.sample(2).dtype == torch.float32
    picture = model.sample(3)
    assert torch.equal(picture, picture.floor())
    assert model.double().log_prob(x.to(torch.uint8)).dtype == torch.float64
    assert picture.min() >= 0
    assert picture.max() <= 255


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["nsf", "maf", "glow", "realnvp, context"])
def test_seed_generator_and_temperature_govern_the_samples(case: str) -> None:
    model, given = disturbed(case, torch.float32), data(case, torch.float32)
    call = lambda **options: model.sample(BATCH, *given[1:], **options)  # noqa: E731
    torch.manual_seed(7)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(first, call())
    state = torch.get_rng_state()
    drawn = call(generator=torch.Generator().manual_seed(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn, call(generator=torch.Generator().manual_seed(8)))
    still = [call(temperature=0.0) for _ in range(2)]
    assert torch.equal(*still)


def test_one_context_for_all() -> None:
    model, (x, context) = disturbed("nsf, context"), data("nsf, context")
    torch.testing.assert_close(model.log_prob(x, context[0]), model.log_prob(x, context[:1].expand(BATCH, CONTEXT)))
    torch.manual_seed(0)
    drawn = model.sample(7, context[0])
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, model.sample(7, context[:1].expand(7, CONTEXT)))
    assert not torch.allclose(model.log_prob(x, context), model.log_prob(x, context.flip(0)))
    assert disturbed("maf, context").sample(7, context[0]).shape == (7, D)


# ---- as torch modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL)
def test_rebuilt_copied_and_pickled(case: str) -> None:
    model, given = disturbed(case), data(case)
    rebuilt = type(model)(**json.loads(json.dumps(model.config))).double()
    assert rebuilt.config == model.config
    rebuilt.load_state_dict(model.state_dict())
    want = model.log_prob(*given, **noise(case))
    for one in (rebuilt, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(one.log_prob(*given, **noise(case)), want)
        assert torch.equal(one(*given), one.log_prob(*given)) or case in IMAGES


@pytest.mark.parametrize("case", ["nsf", "realnvp, context", "realnvp of images", "glow", "nsf, context"])
def test_reversible_gradients_are_the_stored_ones(case: str) -> None:
    model, given = disturbed(case), data(case)
    reversible = disturbed(case, reversible=True)
    for one in (model, reversible):
        one.loss(*given, **noise(case)).backward()
    assert sum(isinstance(module, nn.Flow) and module.reversible for module in reversible.modules()) > 0
    for (name, left), right in zip(model.named_parameters(), reversible.parameters(), strict=True):
        scale = float(left.grad.abs().max())
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-6, atol=1e-9 * (1 + scale), msg=name)


COMPILED = ["realnvp", "nsf", "nsf, context", "nsf, autoregressive", "maf", "iaf", "realnvp of images", "glow"]


@pytest.mark.parametrize("case", COMPILED)
def test_log_prob_compiles_in_one_graph(case: str) -> None:
    torch._dynamo.reset()
    model, given = disturbed(case, torch.float32), data(case, torch.float32)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.log_prob, fullgraph=True, backend=counter)
    u = noise(case, dtype=torch.float32)
    for _ in range(2):
        ours, theirs = compiled(*given, **u), eager.log_prob(*given, **u)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    ours.sum().backward()
    theirs.sum().backward()
    for (name, left), right in zip(model.named_parameters(), eager.parameters(), strict=True):
        scale = float(right.grad.abs().max())
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-3, atol=1e-5 + 1e-4 * scale, msg=name)


class _LogProb(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model.log_prob(x)
        return found


@pytest.mark.parametrize("case", ["nsf", "realnvp", "maf"])
def test_log_prob_exports(case: str) -> None:
    model = disturbed(case, torch.float32).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(_LogProb(model), (torch.randn(3, D),), dynamic_shapes={"x": {0: batch}})
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    x = torch.randn(6, D)
    torch.testing.assert_close(torch.export.load(stream).module()(x), model.log_prob(x))


@pytest.mark.parametrize("case", ALL)
def test_autocast(case: str) -> None:
    model, given = disturbed(case, torch.float32), data(case, torch.float32)
    exact = model.log_prob(*given, **noise(case, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.log_prob(*given, **noise(case, dtype=torch.float32))
        assert model.bits_per_dim(*given).dtype == torch.float32
        sample = model.sample(BATCH, *given[1:])
    assert found.dtype == torch.float32
    assert torch.equal(found, exact) == (case in ("iaf", "iaf of images"))  # whose solver computes in float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.3)
    assert bool(sample.isfinite().all())
    found.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("case", ALL)
def test_nothing_in_nothing_out(case: str) -> None:
    model, given = disturbed(case), data(case, batch=0)
    assert model.log_prob(*given).shape == (0,)
    assert model.sample(0, *given[1:]).shape == (0, *model.event_shape)


@pytest.mark.parametrize("case", VECTORS)
def test_nan_stays_in_its_row(case: str) -> None:
    model, given = disturbed(case).eval(), data(case)
    want = model.log_prob(*given)
    given[0][2, 1] = math.nan
    found = model.log_prob(*given)
    assert found.isnan().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(found[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


# ---- base distributions ----------------------------------------------------------------------------------------------


def bases() -> dict[str, distributions.BaseDistribution]:
    torch.manual_seed(0)
    diagonal, mixture = distributions.DiagonalNormal(2), distributions.GaussianMixture(2, 3)
    for parameter in (*diagonal.parameters(), *mixture.parameters()):
        parameter.data += 0.3 * torch.randn_like(parameter)
    box = distributions.UniformBox(torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 0.5]))
    found = {"standard": distributions.StandardNormal(2), "diagonal": diagonal, "mixture": mixture, "box": box}
    return {name: base.double() for name, base in found.items()}


@pytest.mark.parametrize("name", ["standard", "diagonal", "mixture", "box"])
def test_base_distributions(name: str) -> None:
    base = bases()[name]
    side = torch.linspace(-9.0, 9.0, 1801, dtype=torch.float64) + 0.003
    grid = torch.cartesian_prod(side, side)
    density = base.log_prob(grid).detach().exp()
    assert abs(float(density.sum()) * 1e-4 - 1.0) < 5e-3
    mean = (grid * density.unsqueeze(1)).sum(0) * 1e-4
    drawn = base.sample(20000)
    assert drawn.shape == (20000, 2)
    assert drawn.dtype == torch.float64
    assert float((drawn.mean(0) - mean).abs().max()) < 5 * float(drawn.std(0).max()) / math.sqrt(20000)
    square = ((grid - mean).square() * density.unsqueeze(1)).sum(0) * 1e-4
    torch.testing.assert_close(drawn.var(0), square, rtol=0.06, atol=0.0)  # a normal's has 1 % of deviation
    assert base.sample(0).shape == (0, 2)
    assert torch.equal(*(base.sample(3, generator=torch.Generator().manual_seed(1)) for _ in range(2)))
    assert base.log_prob(torch.full((1, 2), math.nan, dtype=torch.float64)).isnan().all()
    if name != "box":
        assert torch.autograd.gradcheck(base.log_prob, (torch.randn(3, 2, dtype=torch.float64, requires_grad=True),))
    with pytest.raises(ValueError, match=r"x must be \[B, 2\], got \[3\]"):
        base.log_prob(torch.zeros(3))


def test_base_distributions_are_torchs() -> None:
    base, x = bases(), torch.randn(6, 2, dtype=torch.float64)
    normal = torch.distributions.Normal
    standard = torch.distributions.Independent(normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    torch.testing.assert_close(base["standard"].log_prob(x), standard.log_prob(x))
    diagonal = base["diagonal"]
    want = torch.distributions.Independent(normal(diagonal.mean, diagonal.log_std.exp()), 1)
    torch.testing.assert_close(diagonal.log_prob(x), want.log_prob(x))
    mixture = base["mixture"]
    want = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=mixture.logits),
        torch.distributions.Independent(normal(mixture.mean, mixture.log_std.exp()), 1),
    )
    torch.testing.assert_close(mixture.log_prob(x), want.log_prob(x))


def test_models_of_other_bases() -> None:
    mixture = distributions.GaussianMixture(D, 3)
    model = models.MAF(D, hidden=(8,), transforms=1, base=mixture)
    x = torch.randn(9, D)
    model.loss(x).backward()
    assert mixture.logits.grad is not None
    assert model.sample(3).shape == (3, D)
    with pytest.raises(RuntimeError, match="samples have no gradient by the weights"):
        model.rsample_and_log_prob(3)
    mixture.logits.requires_grad_(False)
    model.rsample_and_log_prob(3)[1].sum().backward()
    box = distributions.UniformBox(-3.0 * torch.ones(D), 3.0)
    bounded = models.NeuralSplineFlow(D, hidden=(8,), base=box)  # which maps the box to itself
    inside = bounded.log_prob(x.clamp(-2.9, 2.9))
    assert bool(inside.isfinite().all())
    assert float(bounded.sample(50).abs().max()) <= 3.0
    with pytest.raises(ValueError, match=r"temperature must be 1, got 0\.5"):
        bounded.sample(3, temperature=0.5)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: models.RealNVP(0), ValueError, "RealNVP: input_shape must be at least 1, got 0"),
        (lambda: models.RealNVP(2.0), TypeError, "RealNVP: input_shape must be an int, got float"),
        (lambda: models.RealNVP((8, 8)), ValueError, r"input_shape must be \(channels, height, width\), got \[8, 8\]"),
        (lambda: models.RealNVP((1, 6, 6), scales=3), ValueError, "multiples of 4, got 6 and 6"),
        (lambda: models.RealNVP(3, transforms=0), ValueError, "transforms must be at least 1"),
        (lambda: models.Glow((1, 28, 28), levels=3), ValueError, "multiples of 8, got 28 and 28"),
        (lambda: models.Glow(4), TypeError, r"input_shape must be \(channels, height, width\), got 4"),
        (lambda: models.Glow((1, 8, 8), steps=True), TypeError, "steps must be an int, got bool"),
        (lambda: models.NeuralSplineFlow(1), ValueError, "at least one channel to transform and one to see"),
        (lambda: models.NeuralSplineFlow(3, linear="qr"), ValueError, "linear must be 'lu', 'permutation' or None"),
        (lambda: models.NeuralSplineFlow(3, coupling=False, residual=True), ValueError, "residual networks are for"),
        (lambda: models.MAF(3, base="cauchy"), ValueError, "base must be 'standard', 'diagonal' or a BaseDistribution"),
        (
            lambda: models.MAF(3, base=distributions.StandardNormal(2)),
            ValueError,
            r"base must be of \[3\], got \[2\]",
        ),
        (lambda: models.IAF(3, hidden=()), ValueError, "hidden must hold at least 1"),
        (lambda: models.FlowModel(nn.LULinear(2), "standard"), TypeError, "base must be a BaseDistribution, got str"),
        (lambda: models.FlowModel(3, distributions.StandardNormal(2)), TypeError, "flow must be a Transform, got int"),
        (lambda: distributions.StandardNormal("x"), TypeError, "shape must be an int or a sequence of ints, got str"),
        (lambda: distributions.StandardNormal((2, 0)), ValueError, "shape must be at least 1, got 0"),
        (lambda: distributions.GaussianMixture(2, 0), ValueError, "components must be at least 1, got 0"),
        (lambda: distributions.UniformBox(0.0, 1.0), ValueError, "must have the shape of a sample, got two numbers"),
        (lambda: distributions.UniformBox(torch.ones(2), 1.0), ValueError, "low must be below high everywhere"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_wrong_calls() -> None:
    model, (x, context) = disturbed("nsf, context"), data("nsf, context")
    with pytest.raises(ValueError, match=r"context must be \[5, 3\], got None"):
        model.log_prob(x)
    with pytest.raises(ValueError, match=r"context must be \[5, 3\], got \[4, 3\]"):
        model.log_prob(x, context[:4])
    with pytest.raises(TypeError, match="context must be a Tensor, got list"):
        model.sample(5, [1.0])
    with pytest.raises(ValueError, match="built without context_features"):
        disturbed("nsf").log_prob(x, context)
    with pytest.raises(ValueError, match=r"x must be \[B, 4\], got \[5, 3\]"):
        model.log_prob(context, context)
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        model.log_prob([1.0], context)
    with pytest.raises(ValueError, match=r"z must be \[B, 4\], got \[5, 3\]"):
        model.inverse(context, context)
    with pytest.raises(TypeError, match="n must be an int, got float"):
        model.sample(5.0, context)
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        model.sample(-1, context)
    with pytest.raises(ValueError, match="temperature must be finite and not negative"):
        model.sample(5, context, temperature=-1.0)
    with pytest.raises(ValueError, match=r"x must be \[B, 1, 8, 8\], got \[5, 64\]"):
        disturbed("glow").loss(data("glow")[0].flatten(1))
