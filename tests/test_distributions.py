"""`genfuse.distributions` against `torch.distributions`, and the layers that sample."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import genfuse
import pytest
import torch
from genfuse import nn, ops
from genfuse.distributions import DiagonalGaussian
from genfuse.ops import sampling
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

PAIRS = [("logvar", 0.5), ("log_std", 1.0)]  # the name, and what it is times to get ln std


def parameters(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean, scale = torch.randn(2, *shape, generator=generator, dtype=dtype)
    return mean, scale


def both(name: str, factor: float, shape: tuple[int, ...], event_dims: int, seed: int = 0) -> tuple[Any, Any]:
    """Ours and torch's."""
    mean, scale = parameters(*shape, seed=seed)
    normal = Normal(mean, (factor * scale).exp())
    return (
        DiagonalGaussian(mean, **{name: scale}, event_dims=event_dims),
        Independent(normal, event_dims) if event_dims else normal,
    )


@pytest.mark.parametrize(("name", "factor"), PAIRS)
@pytest.mark.parametrize(
    ("shape", "event_dims"), [((3, 4), 0), ((3, 4), 1), ((3, 4), 2), ((2, 3, 4), 2), ((4,), 1), ((), 0)]
)
def test_is_torchs(name: str, factor: float, shape: tuple[int, ...], event_dims: int) -> None:
    ours, theirs = both(name, factor, shape, event_dims)
    assert isinstance(ours, Distribution)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    assert ours.has_rsample
    for attribute in ("mean", "mode", "stddev", "variance"):
        torch.testing.assert_close(getattr(ours, attribute), getattr(theirs, attribute))
    torch.testing.assert_close(ours.logvar, theirs.variance.log())
    torch.testing.assert_close(ours.log_std, theirs.stddev.log())
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    for lead in ((), (5,), (2, 1)):
        value = parameters(*lead, *shape, seed=2)[0]
        torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
        assert ours.rsample(lead).shape == (*lead, *shape)
        assert ours.sample(lead).shape == (*lead, *shape)
    assert ours.support.check(value).shape == ours.log_prob(value).shape


def test_parameters_broadcast() -> None:
    mean, scale = torch.zeros(3, 1), torch.zeros(4)
    ours = DiagonalGaussian(mean, scale)
    assert (ours.batch_shape, ours.event_shape) == ((3,), (4,))
    torch.testing.assert_close(ours.log_prob(torch.zeros(3, 4)), torch.full((3,), -2.0 * math.log(2.0 * math.pi)))
    assert DiagonalGaussian(mean.double(), scale).mean.dtype == torch.float64
    assert DiagonalGaussian(mean, scale).log_prob(torch.zeros(4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(("name", "factor"), PAIRS)
def test_gradients(name: str, factor: float) -> None:
    mean, scale = (tensor.requires_grad_() for tensor in parameters(3, 4))
    value, eps = parameters(2, 3, 4, seed=3)
    value.requires_grad_()

    def results(ours: bool) -> Tensor:
        if ours:
            gaussian: Any = DiagonalGaussian(mean, **{name: scale})
            sample = gaussian.rsample((2,), eps=eps)
        else:
            gaussian = Independent(Normal(mean, (factor * scale).exp()), 1)
            sample = gaussian.mean + gaussian.stddev * eps
        kl = kl_divergence(gaussian, Independent(Normal(torch.zeros(4), torch.ones(4)), 1))
        return sample.square().sum() + gaussian.log_prob(value).square().sum() + kl.sum() + gaussian.entropy().sum()

    left, right = results(True), results(False)
    torch.testing.assert_close(left, right)
    inputs = (mean, scale, value)
    for a, b in zip(torch.autograd.grad(left, inputs), torch.autograd.grad(right, inputs), strict=True):
        torch.testing.assert_close(a, b)
    assert not DiagonalGaussian(mean, **{name: scale}).sample().requires_grad


def test_samples_have_the_moments() -> None:
    gaussian = DiagonalGaussian(torch.tensor([2.0, -1.0]), torch.tensor([0.0, 2.0 * math.log(3.0)]))
    sample = gaussian.sample((40000,))
    torch.testing.assert_close(sample.mean(0), gaussian.mean, rtol=0.0, atol=0.06)  # four deviations
    torch.testing.assert_close(sample.std(0), gaussian.stddev, rtol=0.02, atol=0.0)


def test_seed_and_generator_govern_the_noise() -> None:
    gaussian = DiagonalGaussian(torch.zeros(5), torch.zeros(5))
    torch.manual_seed(0)
    first = gaussian.rsample((2,))
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(0)
    assert torch.equal(gaussian.rsample((2,)), first)
    state = torch.get_rng_state()
    given = gaussian.sample((2,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(given, gaussian.rsample((2,), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("event_dims", [0, 1, 2])
@pytest.mark.parametrize("names", [(a, b) for a in PAIRS for b in PAIRS])
def test_kl_divergences_are_torchs(names: Any, event_dims: int) -> None:
    p, torch_p = both(*names[0], (3, 4), event_dims)
    q, torch_q = both(*names[1], (3, 4), event_dims, seed=1)
    expected = kl_divergence(torch_p, torch_q)
    torch.testing.assert_close(kl_divergence(p, q), expected)
    torch.testing.assert_close(kl_divergence(p, torch_q), expected)
    torch.testing.assert_close(kl_divergence(torch_p, q), expected)
    assert expected.shape == p.batch_shape
    # An event's prior for a batch of events, and a Normal without an event of its own, by which events are summed over.
    if event_dims == 1:
        last, torch_last = both(*names[1], (4,), 1, seed=2)
        expected = kl_divergence(torch_p, torch_last.expand((3,)))
        for one in (last, torch_last, torch_last.base_dist):
            torch.testing.assert_close(kl_divergence(p, one), expected)
        expected = kl_divergence(torch_last.expand((3,)), torch_p)
        for one in (last, torch_last, torch_last.base_dist):
            torch.testing.assert_close(kl_divergence(one, p), expected)
        standard = kl_divergence(p, Normal(0.0, 1.0))
        torch.testing.assert_close(standard, kl_divergence(torch_p, Independent(Normal(torch.zeros(3, 4), 1.0), 1)))
        torch.testing.assert_close(standard, ops.gaussian_kl(p.mean, p.logvar))


def test_kl_divergences_that_do_not_exist() -> None:
    p = both("logvar", 0.5, (3, 4), 1)[0]
    with pytest.raises(ValueError, match=r"different event shapes cannot be computed: \[4\] and \[3, 4\]"):
        kl_divergence(p, both("logvar", 0.5, (3, 4), 2)[0])
    for other in (both("logvar", 0.5, (3, 4), 2)[1], Independent(torch.distributions.Laplace(p.mean, p.stddev), 1)):
        for arguments in ((p, other), (other, p)):
            with pytest.raises(NotImplementedError):
                kl_divergence(*arguments)
    with pytest.raises(NotImplementedError):
        kl_divergence(p, torch.distributions.Laplace(0.0, 1.0))


@pytest.mark.parametrize(("name", "factor"), PAIRS)
def test_kl_divergences_do_not_repeat_an_event(name: str, factor: float) -> None:
    p = both(name, factor, (4, 1), 1)[0]
    wide = Normal(torch.ones(20), 1.0)
    for other in (wide, wide.expand((4, 20))):
        for arguments in ((p, other), (other, p)):
            with pytest.raises(ValueError, match=r"\[4, 1\].*the event \[1\] would be repeated"):
                kl_divergence(*arguments)
    for independent in (Independent(wide, 1), Independent(wide.expand((4, 20)), 1)):
        for arguments in ((p, independent), (independent, p)):
            with pytest.raises(ValueError, match="different event shapes cannot be computed"):
                kl_divergence(*arguments)
    # A batch is: one Gaussian against three.
    one, torch_one = both(name, factor, (4,), 1)
    three = Normal(torch.ones(3, 4), 2.0)
    torch.testing.assert_close(kl_divergence(one, three), kl_divergence(torch_one, Independent(three, 1)))
    torch.testing.assert_close(kl_divergence(three, one), kl_divergence(Independent(three, 1), torch_one))


@pytest.mark.parametrize(("name", "factor"), PAIRS)
def test_kl_divergences_keep_a_prior_small(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    run = type(sampling._GAUSSIAN).run

    def spy(self: Any, public: str, subject: Any, arguments: tuple[Any, ...]) -> Any:
        seen.append(arguments)
        return run(self, public, subject, arguments)

    monkeypatch.setattr(type(sampling._GAUSSIAN), "run", spy)
    p, torch_p = both(name, factor, (3, 4), 1)
    for prior in (Normal(0.5, 2.0), Normal(0.5, 2.0).expand((3, 4)), Normal(torch.tensor(0.5).double(), 2.0)):
        found = kl_divergence(p, prior)
        torch.testing.assert_close(found, kl_divergence(torch_p, Independent(prior.expand((3, 4)), 1)))
        prior_mean, prior_scale = seen[-1][2:4]
        assert prior_mean.stride() == prior_scale.stride() == (0, 0)


def test_extreme_scales() -> None:
    """exp(logvar) overflows float32, or vanishes; what is asked for does neither."""
    mean, logvar = torch.zeros(2, 1), torch.tensor([[160.0], [-160.0]])
    gaussian = DiagonalGaussian(mean, logvar)
    expected = -0.5 * (math.log(2.0 * math.pi) + logvar[:, 0])
    torch.testing.assert_close(gaussian.log_prob(mean), expected)
    torch.testing.assert_close(gaussian.entropy(), -expected + 0.5)
    assert gaussian.rsample().isfinite().all()
    torch.testing.assert_close(kl_divergence(gaussian, DiagonalGaussian(mean, logvar)), torch.zeros(2))
    near = DiagonalGaussian(torch.zeros(1), torch.full((1,), 2e-5))  # ln std = 1e-5: the KL is its square
    torch.testing.assert_close(kl_divergence(near, Normal(0.0, 1.0)), torch.tensor(1e-10), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_torchs(dtype: torch.dtype) -> None:
    mean, logvar = parameters(40, 6, dtype=dtype)
    value = parameters(40, 6, dtype=dtype, seed=1)[0]

    def torchs(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        normal = Independent(Normal(change(mean), (0.5 * change(logvar)).exp()), 1)
        standard = Independent(Normal(torch.zeros_like(normal.mean), 1.0), 1)
        return [normal.log_prob(change(value)), kl_divergence(normal, standard)]

    ours = DiagonalGaussian(mean, logvar)
    results = [ours.log_prob(value), kl_divergence(ours, DiagonalGaussian(0 * mean, 0 * logvar))]
    assert [result.dtype for result in results] == [torch.float32] * 2
    for result, eager, exact in zip(results, eager_runs(torchs), torchs(Tensor.double), strict=True):
        assert_as_accurate(result, eager, exact)


@pytest.mark.parametrize(("name", "factor"), PAIRS)
def test_expand(name: str, factor: float) -> None:
    ours, theirs = both(name, factor, (1, 4), 1)
    ours, theirs = ours.expand((2, 3)), theirs.expand((2, 3))
    assert (ours.batch_shape, ours.event_shape) == ((2, 3), (4,))
    value = parameters(2, 3, 4)[0]
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert ours.rsample((5,)).shape == (5, 2, 3, 4)
    assert repr(ours) == "DiagonalGaussian(batch_shape=[2, 3], event_shape=[4])"
    assert isinstance(Independent(ours, 1).log_prob(value), Tensor)


def test_arguments_are_validated() -> None:
    nan = torch.tensor([float("nan")])
    with pytest.raises(ValueError, match="Expected parameter mean"):
        DiagonalGaussian(nan, torch.zeros(1), validate_args=True)
    with pytest.raises(ValueError, match="Expected parameter log_std"):
        DiagonalGaussian(torch.zeros(1), log_std=nan, validate_args=True)
    assert DiagonalGaussian(nan, torch.zeros(1), validate_args=False).log_prob(torch.zeros(1)).isnan()
    gaussian = DiagonalGaussian(torch.zeros(1), torch.zeros(1), validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        gaussian.log_prob(nan)
    assert DiagonalGaussian(torch.zeros(1), torch.zeros(1), validate_args=False).log_prob(nan).isnan()
    assert set(gaussian.arg_constraints) == {"mean", "logvar"}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(2),), {}, TypeError, "give one of logvar and log_std"),
        ((torch.zeros(2), torch.zeros(2)), {"log_std": torch.zeros(2)}, TypeError, "give one of logvar and log_std"),
        ((0.0, torch.zeros(2)), {}, TypeError, "mean must be a Tensor, got float"),
        ((torch.zeros(2), 0.0), {}, TypeError, "logvar must be a Tensor, got float"),
        ((torch.zeros(2),), {"log_std": 0.0}, TypeError, "log_std must be a Tensor, got float"),
        ((torch.zeros(2), torch.zeros(2)), {"event_dims": 2}, ValueError, "event_dims must be between 0 and 1, got 2"),
        (
            (torch.zeros(2), torch.zeros(2)),
            {"event_dims": -1},
            ValueError,
            "event_dims must be between 0 and 1, got -1",
        ),
        ((torch.zeros(2), torch.zeros(2)), {"event_dims": 1.0}, TypeError, "event_dims must be an int, got float"),
        ((torch.zeros(2), torch.zeros(3)), {}, RuntimeError, "size"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DiagonalGaussian(*arguments, **options)


def test_compiles() -> None:
    torch._dynamo.reset()

    def negative_elbo(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        q = DiagonalGaussian(mean, logvar, validate_args=False)
        z = q.rsample(eps=eps)
        return q.log_prob(z).sum() + ops.gaussian_kl(mean, logvar).sum()

    mean, logvar = parameters(3, 4)
    eps = parameters(3, 4, seed=1)[0]
    compiled = torch.compile(negative_elbo, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mean, logvar, eps), negative_elbo(mean, logvar, eps))


def test_is_an_attribute_of_the_package() -> None:
    assert genfuse.distributions.DiagonalGaussian is DiagonalGaussian
    assert "distributions" in dir(genfuse)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "factor"), PAIRS)
@pytest.mark.parametrize("prior", [False, True])
def test_reparameterization(name: str, factor: float, prior: bool) -> None:
    layer = nn.GaussianReparameterization(free_bits=0.3, clamp=(-0.5, 0.7), parametrization=name)
    mean, scale = parameters(5, 2, 3)
    eps = parameters(5, 2, 3, seed=1)[0]
    of_prior = parameters(2, 3, seed=2) if prior else ()
    clamped = factor * scale.clamp(-0.5, 0.7)
    q = Normal(mean, clamped.exp())
    p = Normal(of_prior[0], (factor * of_prior[1]).exp()) if prior else Normal(0.0, 1.0)
    expected = kl_divergence(q, p).clamp(min=0.3).sum((1, 2))
    for training in (True, False):
        z, kl = layer.train(training)(mean, scale, *of_prior, eps=eps)
        torch.testing.assert_close(z, mean + clamped.exp() * eps)  # in eval, too
        torch.testing.assert_close(kl, expected)
    z, kl = layer(mean, scale, *of_prior, deterministic=True)
    torch.testing.assert_close(z, mean)
    torch.testing.assert_close(kl, expected)
    torch.manual_seed(0)
    z, _ = layer(mean, scale, *of_prior)
    torch.manual_seed(0)
    assert torch.equal(z, layer(mean, scale, *of_prior)[0])
    given = layer(mean, scale, *of_prior, generator=torch.Generator().manual_seed(1))[0]
    assert torch.equal(given, layer(mean, scale, *of_prior, generator=torch.Generator().manual_seed(1))[0])
    assert not torch.equal(given, z)


def test_gumbel_softmax() -> None:
    layer = nn.GumbelSoftmax(tau=0.7, dim=1)
    logits, _ = parameters(3, 4, 2)
    gumbel = -torch.log(-torch.log(torch.rand(3, 4, 2, dtype=torch.float64)))
    torch.testing.assert_close(layer(logits, noise=gumbel), torch.softmax((logits + gumbel) / 0.7, 1))
    layer.tau = 0.1  # annealed
    torch.testing.assert_close(layer(logits, noise=gumbel), torch.softmax((logits + gumbel) / 0.1, 1))
    layer.hard = True
    one_hot = layer(logits, noise=gumbel)
    assert torch.equal(one_hot.argmax(1), (logits + gumbel).argmax(1))
    assert torch.equal(one_hot.sort(1).values[:, -1], torch.ones(3, 2, dtype=torch.float64))
    torch.manual_seed(0)
    first = layer(logits)
    torch.manual_seed(0)
    assert torch.equal(first, layer(logits))
    drawn = layer(logits, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, layer(logits, generator=torch.Generator().manual_seed(1)))
    counts = layer(logits.expand(2000, 3, 4, 2).flatten(0, 1)).view(2000, 3, 4, 2).mean(0)
    torch.testing.assert_close(counts, torch.softmax(logits, 1), rtol=0.0, atol=0.06)


@pytest.mark.parametrize(
    "layer", [nn.GaussianReparameterization(free_bits=0.1, clamp=(-1.0, 1.0)), nn.GumbelSoftmax(0.5, hard=True)]
)
def test_layers_compile_and_are_copied(layer: torch.nn.Module) -> None:
    torch._dynamo.reset()
    inputs = parameters(3, 4) if isinstance(layer, nn.GaussianReparameterization) else parameters(3, 4)[:1]
    results = []
    for one in (
        layer,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.compile(layer, backend="aot_eager", fullgraph=True),
    ):
        torch.manual_seed(0)
        found = one(*inputs)
        results.append(found if isinstance(found, tuple) else (found,))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b)
    assert "=" in repr(layer)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.GumbelSoftmax(0.0), ValueError, "tau must be finite and above 0.0, got 0.0"),
        (lambda: nn.GumbelSoftmax("cold"), TypeError, "tau must be a number, got str"),
        (
            lambda: nn.GaussianReparameterization(free_bits=-1.0),
            ValueError,
            "free_bits must be finite and at least 0.0",
        ),
        (lambda: nn.GaussianReparameterization(clamp=3.0), TypeError, r"clamp must be a pair \(low, high\), got 3.0"),
        (lambda: nn.GaussianReparameterization(clamp=("a", "b")), TypeError, "clamp must hold numbers, got str"),
        (lambda: nn.GaussianReparameterization(clamp=(None, 1.0)), TypeError, "clamp must hold numbers, got NoneType"),
        (lambda: nn.GaussianReparameterization(clamp=(1.0, 0.0)), ValueError, r"clamp must be \(low, high\)"),
        (lambda: nn.GaussianReparameterization(parametrization="std"), ValueError, "must be 'logvar' or 'log_std'"),
    ],
)
def test_wrong_options_of_layers(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
