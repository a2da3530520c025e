"""Gaussians, relaxed and plain categories, codes: what each promises, at the ends of the numbers' range too.

What is asked of all operators alike is in test_operators.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import genfuse
import pytest
import torch
import torch.nn.functional as F
from genfuse import ops
from operator_cases import DTYPE_NAMES, DTYPES, SIZES, check, make
from scipy import stats
from torch import Tensor
from torch import distributions as torchs

EPS = torch.finfo(torch.float32).eps
MAX = torch.finfo(torch.float32).max
INF, NAN = float("inf"), float("nan")
LEAST = 1e-4  # of a p-value: the seeds are fixed, so that it is always the same
close = torch.testing.assert_close
both = pytest.mark.parametrize("backend", ["native", "reference"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(seed: int, offset: int = 0) -> Tensor:
    return torch.tensor([seed, offset])


# ---- noise -----------------------------------------------------------------------------------------------------------

DRAWS: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "gaussian_rsample": (lambda x, **noise: ops.gaussian_rsample(x, 0.3 * x, **noise), "eps", "normal"),
    "gaussian_rsample_kl": (lambda x, **noise: ops.gaussian_rsample_kl(x, 0.3 * x, **noise)[0], "eps", "normal"),
    "gumbel_softmax": (lambda x, **noise: ops.gumbel_softmax(x, 0.8, **noise), "noise", "gumbel"),
    "relaxed_bernoulli": (lambda x, **noise: ops.relaxed_bernoulli(x, 0.8, **noise), "noise", "logistic"),
}
SHAPES = [(1,), (7,), (3, 5), (2, 3, 33), (5, 1025), (4099,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("op", DRAWS)
def test_the_noise_is_that_of_the_random_number_contract(op: str, dtype: torch.dtype) -> None:
    function, name, kind = DRAWS[op]
    for shape in SHAPES:
        x = torch.randn(shape, dtype=dtype)
        noise = getattr(ops, f"philox_{kind}")(shape, 11, 2**40 + 3, dtype=dtype)
        assert torch.equal(function(x, rng=pair(11, 2**40 + 3)), function(x, **{name: noise}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("op", DRAWS)
def test_half_types_draw_float32_noise(op: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 77, dtype=dtype)
    function = DRAWS[op][0]
    if op.startswith("gaussian"):  # whose log-variance is rounded, too
        wide = ops.gaussian_rsample(x.float(), (0.3 * x).float(), rng=pair(5))
    else:
        wide = function(x.float(), rng=pair(5))
    assert torch.equal(function(x, rng=pair(5)), wide.to(dtype))


def test_noise_lies_along_the_dimension_of_the_classes() -> None:
    logits = torch.randn(4, 6, 5)
    noise = ops.philox_gumbel((4, 5, 6), 3, 4).movedim(-1, 1)
    assert torch.equal(
        ops.gumbel_softmax(logits, dim=1, rng=pair(3, 4)), ops.gumbel_softmax(logits, dim=1, noise=noise)
    )


@pytest.mark.parametrize("op", [*DRAWS, "categorical_sample"])
def test_the_generator_governs(op: str) -> None:
    function = DRAWS[op][0] if op in DRAWS else lambda x, **noise: ops.categorical_sample(x, 20, **noise)
    x = torch.zeros(3, 9)
    torch.manual_seed(1)
    first, second = function(x), function(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(function(x), first)
    state = torch.get_rng_state()
    own = function(x, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.get_rng_state(), state)  # the default generator has no part in it
    assert torch.equal(own, function(x, generator=torch.Generator().manual_seed(2)))
    assert not torch.equal(own, function(x, generator=torch.Generator().manual_seed(3)))
    function(x, rng=pair(1))
    if op in DRAWS:
        function(x, **{DRAWS[op][1]: torch.zeros(3, 9)})
    ops.gaussian_kl(x, x)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn where nothing is needed
    # A pair within a larger tensor, as vmap leaves it.
    assert torch.equal(function(x, rng=torch.tensor([[7, 0], [8, 0]])[:, 0]), function(x, rng=pair(7, 8)))


# ---- Gaussians -------------------------------------------------------------------------------------------------------


@both
def test_kl_is_that_of_torchs_distributions(backend: str) -> None:
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 6, 5, dtype=torch.float64)
    with genfuse.use_backend(backend):
        z, kl = ops.gaussian_rsample_kl(mean, logvar, prior_mean, prior_logvar, eps=torch.ones_like(mean))
        alone = ops.gaussian_kl(mean, log_std=0.5 * logvar, prior_mean=prior_mean, prior_logvar=prior_logvar)
        standard = ops.gaussian_kl(mean, logvar)
    posterior = torchs.Normal(mean, torch.exp(0.5 * logvar))
    prior = torchs.Normal(prior_mean, torch.exp(0.5 * prior_logvar))
    close(z, mean + posterior.stddev)
    close(kl, torchs.kl_divergence(posterior, prior).sum(-1))
    close(alone, kl)
    close(standard, torchs.kl_divergence(posterior, torchs.Normal(0.0, 1.0)).sum(-1))


@pytest.mark.parametrize(
    ("shape", "prior", "batch_dims"),
    [
        ((4, 7), (7,), 1),
        ((4, 7), (), 1),
        ((4, 7), (4, 1), 1),
        ((4, 7), (1, 7), 0),
        ((3, 5, 2, 2), (1, 5, 1, 1), 1),
        ((3, 5, 2, 2), (5, 1, 1), 1),
        ((3, 5, 2, 2), (3, 5, 1, 2), 2),
        ((6, 4, 7), (4, 7), 2),
        ((6, 4, 7), (6, 1, 7), 2),
    ],
)
def test_priors_broadcast(shape: tuple[int, ...], prior: tuple[int, ...], batch_dims: int) -> None:
    """As if they had been copied; and their gradients are summed."""
    mean, logvar = torch.randn(2, *shape, dtype=torch.float64)
    values = []
    for copied in (False, True):
        generator = torch.Generator().manual_seed(1)
        priors = [torch.randn(prior, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
        given = [one.expand(shape).contiguous() if copied else one for one in priors]
        kl = ops.gaussian_kl(mean, logvar, *given, batch_dims=batch_dims, free_bits=0.1)
        assert kl.shape == shape[:batch_dims]
        values.append((kl, *torch.autograd.grad(kl.square().sum(), priors)))
    close(*values)


def test_samples_are_many_of_one_mean() -> None:
    mean, logvar = torch.randn(2, 4, 7)
    z, kl = ops.gaussian_rsample_kl(mean.expand(6, 4, 7), logvar, mean, logvar, batch_dims=2, rng=pair(1))
    assert z.shape == (6, 4, 7)
    assert torch.equal(kl, torch.zeros(6, 4))
    assert torch.equal(z, ops.gaussian_rsample(mean.expand(6, 4, 7), logvar, rng=pair(1)))
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    plain = channels_last.contiguous()
    for ours, theirs in zip(
        ops.gaussian_rsample_kl(channels_last, channels_last, rng=pair(1)),
        ops.gaussian_rsample_kl(plain, plain, rng=pair(1)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


EXTREMES = [-170.0, -100.0, -60.0, -1.0, 0.0, 60.0, 100.0, 170.0]


@both
@pytest.mark.parametrize("parametrization", ["logvar", "log_std"])
@pytest.mark.parametrize("difference", [0.0, 1e-20, 1e-3, 3.0, -1e10])
def test_nothing_overflows_that_the_mathematics_does_not(backend: str, parametrization: str, difference: float) -> None:
    """Each value and gradient that float32 can hold is there, and to its digits, whatever the log-variances are."""
    grid = torch.cartesian_prod(torch.tensor(EXTREMES), torch.tensor(EXTREMES))
    scale, prior_scale = (grid * (0.5 if parametrization == "log_std" else 1.0)).unbind(1)
    prior_mean = torch.zeros_like(scale)
    mean = prior_mean + difference
    eps = torch.linspace(-3.0, 3.0, scale.numel())
    names = [parametrization, f"prior_{parametrization}"]

    def values(dtype: torch.dtype, which: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (mean, scale, prior_mean, prior_scale)]
        options = {names[0]: leaves[1], names[1]: leaves[3]}
        with genfuse.use_backend(which):
            z, kl = ops.gaussian_rsample_kl(leaves[0], prior_mean=leaves[2], **options, eps=eps.to(dtype))
        found = [z, kl, *torch.autograd.grad(kl.sum(), leaves, retain_graph=True)]
        return [*found, torch.autograd.grad(z.sum(), leaves[1])[0]]

    for index, (ours, exact) in enumerate(
        zip(values(torch.float32, backend), values(torch.float64, "reference"), strict=True)
    ):
        ours = ours.double()
        there = exact.abs() < MAX / 2
        # The difference of two log-variances of 100 is rounded by 100 eps, and so is its exponential.
        error = (ours - exact).abs()[there]
        assert bool((error <= 400 * EPS * exact.abs()[there] + 1e-37).all()), index
        if index < 2:
            assert not bool(ours.isnan().any())
            assert bool((ours.abs() > MAX / 4)[~there].all())


@both
@pytest.mark.parametrize("log_std", [-100.0, -150.0, -1000.0])
def test_a_mean_met_exactly_by_a_prior_of_no_width(backend: str, log_std: float) -> None:
    """Whose inverse deviation is infinite: nothing times that is nothing."""
    leaves = [torch.full((3, 1), value).requires_grad_() for value in (0.7, log_std, 0.7)]
    prior = torch.full((3, 1), log_std)
    with genfuse.use_backend(backend):
        kl = ops.gaussian_kl(leaves[0], prior_mean=leaves[2], log_std=leaves[1], prior_log_std=prior)
        apart = ops.gaussian_kl(leaves[0] + 1.0, prior_mean=leaves[2], log_std=leaves[1], prior_log_std=prior)
    assert kl.tolist() == [0.0, 0.0, 0.0]
    assert bool((apart > 1e38 / 4).all())
    assert not any(bool(g.any()) for g in torch.autograd.grad(kl.sum(), leaves))


@both
def test_infinite_log_variances(backend: str) -> None:
    """A variance of 0 or infinity is infinitely far from the prior, and no NaN."""
    logvar = torch.tensor([-INF, INF])
    with genfuse.use_backend(backend):
        z, kl = ops.gaussian_rsample_kl(torch.ones(2), logvar, eps=torch.ones(2))
    assert z.tolist() == [1.0, INF]
    assert kl.tolist() == [INF, INF]


@both
@pytest.mark.parametrize("magnitude", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_a_kl_near_zero_keeps_its_digits(backend: str, magnitude: float) -> None:
    """Where e^d - 1 - d has none left in float32. The float64 value, which would lose a few itself, is by a series."""
    d = magnitude * (0.5 + 0.5 * torch.rand(500, 1))
    prior_mean, prior_logvar = torch.randn(2, 500, 1)
    mean, logvar = prior_mean + d * torch.randn(500, 1), prior_logvar + d
    leaves = [t.requires_grad_() for t in (mean, logvar, prior_mean, prior_logvar)]
    with genfuse.use_backend(backend):
        kl = ops.gaussian_kl(*leaves)
    gradients = torch.autograd.grad(kl.sum(), leaves)
    m, lv, m0, lv0 = (t.detach().double() for t in leaves)
    difference, inverse = lv - lv0, torch.exp(-lv0)
    series = sum(difference**k / math.factorial(k) for k in range(2, 20))
    by_mean, by_logvar = (m - m0) * inverse, 0.5 * torch.expm1(difference)
    assert isinstance(series, Tensor)
    exact = [0.5 * (series + (m - m0) ** 2 * inverse)[:, 0], by_mean, by_logvar, -by_mean]
    for ours, theirs in zip((kl, *gradients[:3]), exact, strict=True):
        assert bool(((ours.detach().double() - theirs).abs() <= 16 * EPS * theirs.abs()).all())
    assert float((gradients[3] + by_logvar + 0.5 * (m - m0) * by_mean).abs().max()) < 16 * EPS * float(
        by_logvar.abs().max() + ((m - m0) * by_mean).abs().max()
    )


@both
def test_free_bits_are_a_floor_without_a_gradient(backend: str) -> None:
    mean, logvar = torch.randn(2, 6, 50, dtype=torch.float64)
    mean.requires_grad_()
    logvar.requires_grad_()
    prior_mean = torch.randn(50, dtype=torch.float64, requires_grad=True)
    with genfuse.use_backend(backend):
        each = ops.gaussian_kl(mean, logvar, prior_mean, batch_dims=2)
        floored = ops.gaussian_kl(mean, logvar, prior_mean, free_bits=0.5)
    above = each > 0.5
    assert 0 < int(above.sum()) < 300
    close(floored, torch.where(above, each, 0.5).sum(-1))
    wanted = torch.autograd.grad((each * above).sum(), (mean, logvar, prior_mean))
    found = torch.autograd.grad(floored.sum(), (mean, logvar, prior_mean))
    close(found, wanted)
    assert not bool(found[0][~above].any())


@both
@pytest.mark.parametrize("parametrization", ["logvar", "log_std"])
def test_the_gradient_passes_a_clamp(backend: str, parametrization: str) -> None:
    """It is that at the bound: what lies outside can come back."""
    factor = 1.0 if parametrization == "logvar" else 2.0
    mean = torch.randn(4, 9, dtype=torch.float64)
    scale = torch.linspace(-8, 8, 36, dtype=torch.float64).view(4, 9).requires_grad_()
    inside = scale.detach().clamp(-2.0, 3.0).requires_grad_()
    results = []
    for value, clamp in ((scale, (-2.0, 3.0)), (inside, None)):
        with genfuse.use_backend(backend):
            z, kl = ops.gaussian_rsample_kl(mean, **{parametrization: value}, clamp=clamp, eps=torch.ones_like(mean))
        results.append((z, kl, *torch.autograd.grad((z.sum() + kl.sum()), value)))
    close(*results)
    bound = torch.exp(torch.tensor(factor * 3.0, dtype=torch.float64))
    close(results[0][2][-1, -1], factor * 0.5 * (bound.sqrt() + bound - 1))
    with genfuse.use_backend(backend):
        half = ops.gaussian_rsample(mean, **{parametrization: scale}, clamp=(-INF, 3.0), eps=torch.ones_like(mean))
    close(half, mean + torch.exp(0.5 * factor * scale.clamp(max=3.0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_results_dtypes(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z, kl = ops.gaussian_rsample_kl(x, x)
    quantized, indices, loss = ops.vector_quantize(x, x)
    counts, sums = ops.vector_quantize_statistics(x, indices, 2)
    assert [t.dtype for t in (z, kl, quantized, indices, loss, counts, sums)] == [
        *(dtype, wide, dtype, torch.int64, wide, wide, wide)
    ]
    assert ops.gumbel_softmax(x).dtype == ops.relaxed_bernoulli(x).dtype == dtype
    assert ops.categorical_sample(x).dtype == torch.int64
    assert ops.bernoulli_nll(x, x).dtype == ops.gaussian_nll(x, x, x).dtype == wide


# ---- relaxed categories ----------------------------------------------------------------------------------------------


@both
def test_gumbel_softmax_is_a_softmax(backend: str) -> None:
    logits, noise = torch.randn(2, 5, 11, dtype=torch.float64)
    with genfuse.use_backend(backend):
        close(ops.gumbel_softmax(logits, 0.3, noise=noise), torch.softmax((logits + noise) / 0.3, -1))
        close(ops.gumbel_softmax(logits, 0.3, dim=0, noise=noise), torch.softmax((logits + noise) / 0.3, 0))
        close(ops.relaxed_bernoulli(logits, 0.3, noise=noise), torch.sigmoid((logits + noise) / 0.3))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_hard_samples_are_exactly_one_hot(backend: str, dtype: torch.dtype) -> None:
    for classes in (1, 2, 3, 16, 17, 33, 1025):
        logits = torch.randn(20, classes, dtype=dtype)
        with genfuse.use_backend(backend):
            y = ops.gumbel_softmax(logits, 0.5, hard=True, rng=pair(classes))
        wide = logits.double() + ops.philox_gumbel((20, classes), classes, dtype=torch.float64)
        assert torch.equal(y, F.one_hot(wide.argmax(-1), classes).to(dtype))
        with genfuse.use_backend(backend):
            bits = ops.relaxed_bernoulli(logits, 0.5, hard=True, rng=pair(classes))
        wide = logits.double() + ops.philox_logistic((20, classes), classes, dtype=torch.float64)
        assert torch.equal(bits, (wide > 0).to(dtype))


@both
@pytest.mark.parametrize("classes", [2, 5, 16, 17, 31, 64, 67, 129])
def test_of_equal_classes_the_first_is_chosen(backend: str, classes: int) -> None:
    logits = torch.randn(classes, classes) - 9.0
    want = []
    for row in range(classes):
        first = row * 7 % classes
        logits[row, [first, (first + 1) % classes, classes - 1]] = 2.5
        want.append(min(first, (first + 1) % classes, classes - 1))
    with genfuse.use_backend(backend):
        y = ops.gumbel_softmax(logits, hard=True, noise=torch.zeros_like(logits))
        same = ops.gumbel_softmax(torch.zeros(classes, classes), hard=True, noise=torch.zeros_like(logits))
    assert y.argmax(-1).tolist() == want
    assert bool((y.sum(-1) == 1).all())
    assert bool((same[:, 0] == 1).all())


@both
@pytest.mark.parametrize("op", ["gumbel_softmax", "relaxed_bernoulli"])
def test_the_gradient_of_a_hard_sample_is_the_soft_ones(backend: str, op: str) -> None:
    logits, cotangent = torch.randn(2, 6, 9)
    gradients = []
    for hard in (False, True):
        leaf = logits.clone().requires_grad_()
        with genfuse.use_backend(backend):
            y = getattr(ops, op)(leaf, 0.4, hard, rng=pair(2))
        gradients.append(torch.autograd.grad(y, leaf, cotangent)[0])
    close(*gradients, rtol=1e-5, atol=1e-6)
    assert float(gradients[1].abs().max()) > 1e-3


@both
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_impossible_classes_and_rows_without_a_distribution(backend: str, hard: bool, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 20, dtype=dtype)
    logits[0, ::2] = -INF
    logits[1] = -INF
    logits[2, 3] = INF
    logits[3, 5] = NAN
    logits[4, 1:] = -INF
    leaf = logits.clone().requires_grad_()
    with genfuse.use_backend(backend):
        y = ops.gumbel_softmax(leaf, 0.5, hard, rng=pair(9))
    assert bool(y[1:4].isnan().all())
    assert not bool(y[0, ::2].any())
    assert abs(float(y[0].sum()) - 1.0) < 0.02
    assert torch.equal(y[4], F.one_hot(torch.tensor(0), 20).to(dtype))
    assert bool(y[5].isfinite().all())
    good = torch.tensor([0, 4, 5])
    (gradient,) = torch.autograd.grad(y[good], leaf, torch.randn(3, 20).to(dtype))
    assert bool(gradient[good].isfinite().all())
    assert not bool(gradient[0, ::2].any())
    assert not bool(gradient[4].any())


@both
def test_impossible_and_certain_bits(backend: str) -> None:
    leaf = torch.tensor([-INF, INF, NAN, 0.0, 200.0, -200.0], requires_grad=True)
    for hard in (False, True):
        with genfuse.use_backend(backend):
            y = ops.relaxed_bernoulli(leaf, 0.5, hard, noise=torch.zeros(6))
        assert y[:2].tolist() == [0.0, 1.0]
        assert bool(y[2].isnan())
        assert y[3].item() == (0.0 if hard else 0.5)
        assert y[4:].tolist() == [1.0, 0.0]
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        assert gradient[:2].tolist() == [0.0, 0.0]
        assert gradient[4:].tolist() == [0.0, 0.0]
        assert gradient[3].item() == 0.5


@both
@pytest.mark.parametrize("tau", [1e-3, 1e-30, 1e30])
@pytest.mark.parametrize("op", ["gumbel_softmax", "relaxed_bernoulli"])
def test_any_temperature(backend: str, op: str, tau: float) -> None:
    leaf = torch.randn(8, 33, requires_grad=True)
    for hard in (False, True):
        with genfuse.use_backend(backend):
            y = getattr(ops, op)(leaf, tau, hard, rng=pair(4))
        (gradient,) = torch.autograd.grad(y, leaf, torch.randn(8, 33))
        assert bool(y.isfinite().all())
        assert bool(gradient.isfinite().all())
        if tau < 1 and op == "gumbel_softmax":
            close(y.sum(-1), torch.ones(8))
            close(y.amax(-1), torch.ones(8), atol=1e-2, rtol=0)
        if tau > 1 and not hard:
            close(y, torch.full_like(y, 0.5 if op == "relaxed_bernoulli" else 1 / 33))


@both
def test_the_largest_logits_do_not_overflow(backend: str) -> None:
    logits = torch.tensor([[3e38, 3e38, -3e38], [-3e38, 0.0, 1.0], [1e30, 1e30, 2e30]])
    with genfuse.use_backend(backend):
        y = ops.gumbel_softmax(logits, noise=torch.zeros(3, 3))
        cold = ops.gumbel_softmax(logits, 1e-3, noise=torch.zeros(3, 3))
    close(y, torch.tensor([[0.5, 0.5, 0.0], [0.0, 1 / (1 + math.e), math.e / (1 + math.e)], [0.0, 0.0, 1.0]]))
    close(cold, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))


LOGITS = torch.tensor([0.0, 1.5, -2.0, 0.7, -INF, 3.0, -0.3])


def chi_squared(counts: Tensor, probabilities: Tensor) -> float:
    possible = probabilities > 0
    assert int(counts[~possible].sum()) == 0
    expected = probabilities[possible] * counts.sum()
    return float(stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue)


@pytest.mark.parametrize("seed", [0, 1])
def test_classes_are_as_frequent_as_they_should_be(seed: int) -> None:
    probabilities = torch.softmax(LOGITS.double(), -1)
    probabilities /= probabilities.sum()
    one_hot = ops.gumbel_softmax(LOGITS.expand(100_000, 7), 0.1, hard=True, rng=pair(seed, 3))
    assert chi_squared(one_hot.double().sum(0), probabilities) > LEAST
    many = ops.categorical_sample(LOGITS, 300_000, rng=pair(seed, 4))
    assert chi_squared(torch.bincount(many, minlength=7).double(), probabilities) > LEAST
    rows = ops.categorical_sample(LOGITS.expand(100_000, 7), rng=pair(seed, 5))
    assert chi_squared(torch.bincount(rows, minlength=7).double(), probabilities) > LEAST
    p = torch.sigmoid(torch.tensor(0.8, dtype=torch.float64))
    ones = ops.relaxed_bernoulli(torch.full((200_000,), 0.8), hard=True, rng=pair(seed, 6)).double().sum()
    assert chi_squared(torch.stack((ones, 200_000 - ones)), torch.stack((p, 1 - p))) > LEAST
    # Neighbouring rows are independent.
    both_rows = many[0::2] * 7 + many[1::2]
    assert chi_squared(
        torch.bincount(both_rows, minlength=49).double(), torch.outer(probabilities, probabilities).flatten()
    ) > LEAST  # fmt: skip


def test_relaxed_samples_have_their_distribution() -> None:
    """Back through the sigmoid the noise is logistic; a Gaussian sample is normal."""
    y = ops.relaxed_bernoulli(torch.full((50_000,), 0.8, dtype=torch.float64), 0.7, rng=pair(3))
    assert stats.kstest((torch.logit(y) * 0.7 - 0.8).numpy(), stats.logistic.cdf).pvalue > LEAST
    z = ops.gaussian_rsample(torch.full((50_000,), 2.0), torch.full((50_000,), 1.0), rng=pair(3))
    assert stats.kstest(z.double().numpy(), stats.norm(2.0, math.exp(0.5)).cdf).pvalue > LEAST
    theirs = torchs.RelaxedOneHotCategorical(torch.tensor(0.7), logits=LOGITS[:4].double())
    soft = ops.gumbel_softmax(LOGITS[:4].double().expand(50_000, 4), 0.7, rng=pair(8))
    torch.manual_seed(0)
    for k in range(4):
        assert stats.ks_2samp(soft[:, k].numpy(), theirs.sample((50_000,))[:, k].numpy()).pvalue > LEAST


# ---- plain categories ------------------------------------------------------------------------------------------------


def assert_drawn_right(logits: Tensor, u: Tensor, found: Tensor) -> None:
    """Each class is the one of its u, but where u is within rounding of a boundary; and none is impossible."""
    weights = torch.softmax(logits.double(), -1)
    cumulated = weights.cumsum(-1)
    cumulated = cumulated / cumulated[..., -1:]
    above = cumulated.gather(-1, found)
    below = above - weights.gather(-1, found)
    # A weight is rounded to the dtype a few times; their sum is one of float64.
    slack = 4 * EPS if logits.dtype != torch.float64 else 1e-15 * logits.size(-1)
    u = u.double()
    assert bool((weights.gather(-1, found) > 0).all())
    assert bool((below - slack <= u).all())
    assert bool((u < above + slack).all())


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("classes", [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65, 129, 1025, 5000])
def test_categories_by_inversion(backend: str, dtype: torch.dtype, classes: int) -> None:
    logits = (2.0 * torch.randn(3, classes, dtype=torch.float64)).to(dtype)
    if classes > 2:
        logits[1, torch.rand(classes) < 0.5] = -INF
        logits[1, 1] = 0.0
    largest = 1.0 - 2.0 ** (-53 if dtype == torch.float64 else -24)
    for width in (1, 4, 77):
        u = torch.rand(3, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        u[:, 0] = 0.0
        u[:, -1] = largest
        with genfuse.use_backend(backend):
            assert_drawn_right(logits, u, ops.categorical_sample(logits, width, u=u))
            single = ops.categorical_sample(logits, u=u[:, 0])
        assert single.shape == (3,)
        assert torch.equal(single, ops.categorical_sample(logits, width, u=u)[:, 0])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_class_of_probability_zero_is_never_drawn(backend: str, dtype: torch.dtype) -> None:
    """Neither by u = 0 nor by a u just below 1, nor one whose probability is no number above 0."""
    ends = torch.tensor([0.0, 1.0 - 2.0**-24, 1.0 - 2.0**-53], dtype=torch.float64).to(dtype)
    ends = ends.clamp(max=1.0 - torch.finfo(dtype).eps / 2)
    rows = torch.tensor(
        [
            [-INF, -INF, 0.0, 1.0, -INF, -INF],
            [-INF, 3.0, -INF, -INF, -INF, -INF],
            [-2000.0, 0.0, 0.0, 0.0, -2000.0, -INF],
            [-1e30, -1e30, -1e30, 50.0, -1e30, -1e30],
            [-INF, -1e38, -INF, -1e38, -INF, -INF],
        ],
        dtype=dtype,
    )
    with genfuse.use_backend(backend):
        found = ops.categorical_sample(rows, 3, u=ends.expand(5, 3))
        many = ops.categorical_sample(rows, 5000, rng=pair(3))
    assert [sorted(set(row)) for row in found.tolist()] == [[2, 3], [1], [1, 3], [3], [1, 3]]
    assert [sorted(set(row)) for row in many.tolist()] == [[2, 3], [1], [1, 2, 3], [3], [1, 3]]


@both
def test_a_uniform_of_more_digits_is_not_rounded_to_one(backend: str) -> None:
    u = torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)
    for dtype in DTYPES:
        logits = torch.tensor([0.0, 0.0, -INF], dtype=dtype)
        with genfuse.use_backend(backend):
            assert ops.categorical_sample(logits, 1, u=u).tolist() == [1]
            assert ops.categorical_sample(logits, 1, u=torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [1]


def test_a_hundred_thousand_classes() -> None:
    logits = 3.0 * torch.randn(2, 100_000)
    logits[:, torch.rand(100_000) < 0.3] = -INF
    u = torch.rand(2, 2000)
    u[:, 0], u[:, 1] = 0.0, 1.0 - 2.0**-24
    assert_drawn_right(logits, u, ops.categorical_sample(logits, 2000, u=u))


def test_uniforms_are_addressed_by_row_and_sample() -> None:
    logits = torch.randn(2, 3, 50)
    drawn = ops.categorical_sample(logits, 7, rng=pair(5, 6))
    u = ops.philox_uniform((2, 3, 7), 5, 6)
    assert torch.equal(drawn, ops.categorical_sample(logits, 7, u=u))
    assert torch.equal(ops.categorical_sample(logits.double(), 7, rng=pair(5, 6)), drawn)
    single = ops.categorical_sample(logits, rng=pair(5, 6))
    assert torch.equal(single, ops.categorical_sample(logits, u=ops.philox_uniform((2, 3), 5, 6)))
    transposed = logits.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.categorical_sample(transposed, 7, rng=pair(5, 6)), drawn)
    assert torch.equal(ops.categorical_sample(logits.bfloat16(), 7, rng=pair(5, 6)),
                       ops.categorical_sample(logits.bfloat16().float(), 7, rng=pair(5, 6)))  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.categorical_sample(logits, 7, rng=pair(5, 6)), drawn)


@both
def test_no_rows_no_samples(backend: str) -> None:
    with genfuse.use_backend(backend):
        assert ops.categorical_sample(torch.zeros(0, 5)).shape == (0,)
        assert ops.categorical_sample(torch.zeros(0, 5), 3).shape == (0, 3)
        assert ops.categorical_sample(torch.zeros(4, 5), 0).shape == (4, 0)
        assert ops.categorical_sample(torch.zeros(5)).shape == ()
    leaf = torch.zeros(4, 5, requires_grad=True)
    assert not ops.categorical_sample(leaf).requires_grad


def test_categories_under_vmap() -> None:
    logits, u = torch.randn(4, 3, 9), torch.rand(4, 3, 5)
    expected = ops.categorical_sample(logits, 5, u=u)
    assert torch.equal(torch.vmap(lambda x, u: ops.categorical_sample(x, 5, u=u))(logits, u), expected)
    found = torch.vmap(lambda u: ops.categorical_sample(logits[0], 5, u=u), in_dims=1)(u.movedim(0, 1))
    assert torch.equal(found[0], expected[0])
    rng = torch.tensor([[1, 2], [3, 4]])
    drawn = torch.vmap(lambda r: ops.categorical_sample(logits[0], 5, rng=r), in_dims=1)(rng.T.contiguous())
    assert torch.equal(drawn[1], ops.categorical_sample(logits[0], 5, rng=rng[1]))
    direct = torch.vmap(lambda r: torch.ops.genfuse.categorical_sample(logits[0], None, r, 5), in_dims=1)
    assert torch.equal(direct(rng.T.contiguous()), drawn)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_row_without_a_distribution(bad: float) -> None:
    logits = torch.randn(4, 9)
    logits[2, 3] = bad
    with pytest.raises(RuntimeError, match="row 2 of logits is no distribution"):
        ops.categorical_sample(logits)
    logits[2] = -INF
    with pytest.raises(RuntimeError, match="row 2 of logits is no distribution"):
        ops.categorical_sample(logits, 3)
    with genfuse.use_backend("reference"):
        found = ops.categorical_sample(logits, 3)
    assert bool((found[2] == -1).all())
    assert bool((found[[0, 1, 3]] >= 0).all())


# ---- codes -----------------------------------------------------------------------------------------------------------


def assert_nearest(x: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """No code is nearer than the chosen one by more than the dtype's arithmetic can see."""
    wide, codes = x.double().reshape(-1, x.size(-1)), codebook.double()
    distances = torch.cdist(wide, codes).square()
    chosen = distances.gather(1, indices.reshape(-1, 1))[:, 0]
    # |x - e|^2 less |x|^2 is a sum of 2 D products: the bound of its error, for the two that are compared.
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    largest = codes.square().sum(-1).max() + 2 * (wide.abs() @ codes.abs().T).amax(-1)
    assert bool((chosen <= distances.amin(-1) + 2 * (2 * x.size(-1)) ** 0.5 * 2 * eps * largest).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 129])
def test_the_nearest_code(dim: int, dtype: torch.dtype) -> None:
    for codes in (1, 2, 3, 15, 16, 17, 33, 65, 128, 500):
        for count in (1, 5, 67):
            x, codebook = torch.randn(count, dim).to(dtype), torch.randn(codes, dim).to(dtype)
            quantized, indices, _ = ops.vector_quantize(x, codebook)
            assert_nearest(x, codebook, indices)
            assert torch.equal(quantized, codebook[indices])


@pytest.mark.parametrize("size", [size for size in SIZES if size < 2000])
def test_odd_sizes_of_codes(size: int) -> None:
    """Results and gradients, where no rounding decides on an index: the vectors are near to their codes."""
    for rows, dim, codes in ((size, 5, 7), (6, size, 7), (6, 5, size)):
        problem = make("vector_quantize", shape=(rows, dim), codes=codes)
        codebook = problem.inputs["codebook"]
        picked = codebook[torch.randint(0, codes, (rows,))]
        problem.inputs["x"] = picked + 0.01 * torch.randn(rows, dim)
        check(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("dim", [1, 5, 16, 33])
def test_of_equal_codes_the_first_is_chosen(dim: int, dtype: torch.dtype) -> None:
    """Wherever the copies lie among vectors and their tails, their distances are the same to the bit."""
    for codes in (2, 9, 17, 40, 130):
        codebook = torch.randn(codes, dim).to(dtype)
        for first in range(0, codes, 3):
            doubled = torch.cat((codebook, codebook[first:].roll(1, 0), codebook))
            x = codebook + 0.01 * torch.randn(codes, dim).to(dtype)
            indices = ops.vector_quantize(x, doubled).indices
            assert bool((indices < codes).all())
    halfway = torch.tensor([[0.5], [1.5], [-0.5]], dtype=dtype)
    grid = torch.tensor([[1.0], [0.0], [2.0], [-1.0], [1.0]], dtype=dtype)
    assert ops.vector_quantize(halfway, grid).indices.tolist() == [0, 0, 1]
    assert ops.vector_quantize(torch.zeros(50, dim, dtype=dtype), torch.zeros(70, dim, dtype=dtype)).indices.any() == 0


def test_the_loss_is_not_the_difference_of_large_numbers() -> None:
    """|x|^2 - 2 x e + |e|^2 far from 0 has no digits left, and may be negative."""
    problem = make("vector_quantize", shape=(20, 8))
    codebook = problem.inputs["codebook"] * 100.0 + 5000.0
    problem.inputs = {"x": codebook[torch.randint(0, 9, (20,))] + 0.25 * torch.randn(20, 8), "codebook": codebook}
    check(problem)
    assert bool((problem.call().loss >= 0).all())
    same = ops.vector_quantize(codebook, codebook)
    assert same.indices.tolist() == list(range(9))
    assert not bool(same.loss.any())


@both
def test_losses_and_gradients_of_codes(backend: str) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    with genfuse.use_backend(backend):
        quantized, indices, loss = ops.vector_quantize(x, codebook, commitment_weight=0.3, codebook_weight=0.7)
    assert indices.shape == loss.shape == (3, 4)
    assert not indices.requires_grad
    distance = (x - codebook[indices]).square().sum(-1)
    close(loss, distance.detach())
    cotangent = torch.randn_like(x)
    by_x, by_codebook = torch.autograd.grad(
        quantized, (x, codebook), cotangent, retain_graph=True, materialize_grads=True
    )
    assert torch.equal(by_x, cotangent)  # straight through
    assert not bool(by_codebook.any())  # the gradient of a code comes of the loss alone
    by_x, by_codebook = torch.autograd.grad(loss.sum(), (x, codebook))
    difference = 2.0 * (x - codebook[indices]).detach()
    close(by_x, 0.3 * difference)
    wanted = torch.zeros(6, 5, dtype=torch.float64).index_add(0, indices.flatten(), -0.7 * difference.flatten(0, 1))
    close(by_codebook, wanted)


@both
def test_vectors_and_codes_that_are_no_numbers(backend: str) -> None:
    x, codebook = torch.randn(7, 5), torch.randn(20, 5)
    clean = ops.vector_quantize(x, codebook)
    spoiled = x.clone()
    spoiled[1, 2], spoiled[4, 0], spoiled[5, 4] = NAN, INF, -INF
    lost = torch.tensor([1, 4, 5])
    kept = torch.tensor([0, 2, 3, 6])
    leaf, codes = spoiled.requires_grad_(), codebook.clone().requires_grad_()
    with genfuse.use_backend(backend):
        quantized, indices, loss = ops.vector_quantize(leaf, codes)
    assert not bool(indices[lost].any())
    assert bool(quantized[lost].isnan().all())
    assert not bool(loss[lost].isfinite().any())
    for ours, theirs in zip((quantized, indices, loss), clean, strict=True):
        close(ours[kept], theirs[kept])
    (gradient,) = torch.autograd.grad(quantized[kept].sum(), leaf, retain_graph=True)
    assert torch.equal(gradient[kept], torch.ones(4, 5))
    (gradient,) = torch.autograd.grad(quantized.sum(), leaf, retain_graph=True)
    assert torch.equal(gradient, torch.ones(7, 5))  # straight through, whatever the value
    broken = codebook.clone()
    broken[int(clean.indices[0]), 3] = NAN
    broken[3] = INF
    with genfuse.use_backend(backend):
        quantized, indices, _ = ops.vector_quantize(x, broken)
        nowhere = ops.vector_quantize(x, torch.full((4, 5), NAN))
    left = torch.tensor([k for k in range(20) if k not in (int(clean.indices[0]), 3)])
    assert torch.equal(indices, left[ops.vector_quantize(x, codebook[left]).indices])
    assert bool(quantized.isfinite().all())
    assert not bool(nowhere.indices.any())
    assert bool(nowhere.quantized.isnan().all())


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_statistics_of_codes(backend: str, dtype: torch.dtype) -> None:
    for shape, codes in (((50,), 7), ((2, 30), 1), ((0,), 4), ((3, 5, 7), 200), ((1001,), 33)):
        for dim in (1, 3, 16, 33):
            x, indices = torch.randn(*shape, dim).to(dtype), torch.randint(0, codes, shape)
            with genfuse.use_backend(backend):
                counts, sums = ops.vector_quantize_statistics(x, indices, codes)
            assert torch.equal(counts.long(), torch.bincount(indices.flatten(), minlength=codes))
            zeros = torch.zeros(codes, dim, dtype=torch.float64)
            flat, wide = indices.flatten(), x.double().reshape(-1, dim)
            exact, magnitude = zeros.index_add(0, flat, wide), zeros.index_add(0, flat, wide.abs())
            eps = torch.finfo(counts.dtype).eps
            assert bool(((sums - exact).abs() <= eps * counts.sqrt().unsqueeze(-1) * magnitude).all())
    x = torch.randn(5, 8, dtype=torch.float64)[:, ::2].requires_grad_()
    indices = torch.tensor([[0, 9], [1, 9], [0, 9], [2, 9], [1, 9]])[:, 0]
    counts, sums = ops.vector_quantize_statistics(x, indices, 3)
    assert not counts.requires_grad
    assert not sums.requires_grad
    close(sums, torch.zeros(3, 4, dtype=torch.float64).index_add(0, indices, x.detach()))


def test_one_vector_needs_no_batch() -> None:
    codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    quantized, indices, loss = ops.vector_quantize(torch.tensor([0.9, 0.7]), codebook)
    assert quantized.tolist() == [1.0, 1.0]
    assert indices.shape == loss.shape == ()
    assert indices.item() == 1
    counts, sums = ops.vector_quantize_statistics(quantized, indices, 2)
    assert counts.tolist() == [0.0, 1.0]
    assert sums.tolist() == [[0.0, 0.0], [1.0, 1.0]]


# ---- mistakes --------------------------------------------------------------------------------------------------------

X, INT, WIDE = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.float64)
META = torch.zeros(3, 4, device="meta")
RNG = torch.tensor([0, 0])
KL, RSAMPLE = "gaussian_rsample_kl", "gaussian_rsample"
ERRORS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (RSAMPLE, ([0.0], X), {}, TypeError, "mean must be a Tensor, got list"),
    (RSAMPLE, (X, 0.0), {}, TypeError, "logvar must be a Tensor, got float"),
    (RSAMPLE, (X,), {}, TypeError, "exactly one of logvar and log_std must be given"),
    (RSAMPLE, (X, X), {"log_std": X}, TypeError, "exactly one of logvar and log_std must be given"),
    (RSAMPLE, (INT, X), {}, ValueError, "mean must be of a floating dtype .*, got torch.int64"),
    (RSAMPLE, (X, WIDE), {}, RuntimeError, "logvar must be torch.float32, the dtype of mean; got torch.float64"),
    (RSAMPLE, (X, META), {}, RuntimeError, "logvar must be on cpu, as mean is; got meta"),
    (
        RSAMPLE,
        (X, torch.zeros(5)),
        {},
        RuntimeError,
        r"mean and logvar must broadcast together, got \[3, 4\] and",
    ),
    (RSAMPLE, (X, X), {"eps": X[0]}, RuntimeError, r"eps must have the shape \[3, 4\] of mean, got \[4\]"),
    (RSAMPLE, (X, X), {"eps": 0.0}, TypeError, "eps must be a Tensor, got float"),
    (RSAMPLE, (X, X), {"eps": WIDE}, RuntimeError, "eps must be torch.float32, the dtype of mean"),
    (RSAMPLE, (X, X), {"rng": [0, 0]}, TypeError, "rng must be a Tensor, got list"),
    (RSAMPLE, (X, X), {"rng": X[0, :2]}, ValueError, "rng must be torch.int64, got torch.float32"),
    (RSAMPLE, (X, X), {"rng": INT}, RuntimeError, r"rng must be \[2\], the pair \(seed, offset\); got \[3, 4\]"),
    (RSAMPLE, (X, X), {"rng": RNG.to("meta")}, RuntimeError, "rng must be on cpu; got meta"),
    (RSAMPLE, (X, X), {"generator": 1}, TypeError, "generator must be a torch.Generator or None, got int"),
    (RSAMPLE, (X, X), {"clamp": 1.0}, TypeError, r"clamp must be a pair \(low, high\) or None, got 1.0"),
    (RSAMPLE, (X, X), {"clamp": (1.0,)}, TypeError, "clamp must be a pair"),
    (RSAMPLE, (X, X), {"clamp": (1.0, 0.0)}, ValueError, r"clamp must be \(low, high\) with low <= high"),
    (RSAMPLE, (X, X), {"clamp": (NAN, 0.0)}, ValueError, r"clamp must be \(low, high\) with low <= high"),
    (
        KL,
        (X, X, torch.zeros(5)),
        {},
        RuntimeError,
        r"prior_mean must broadcast to \[3, 4\], the shape of mean; got",
    ),
    (KL, (X, X, torch.zeros(2, 3, 4)), {}, RuntimeError, "prior_mean must broadcast"),
    (KL, (X, X, X, WIDE), {}, RuntimeError, "prior_logvar must be torch.float32, the dtype of mean"),
    (KL, (X, X, X, X), {"prior_log_std": X}, TypeError, "exactly one of prior_logvar and prior_log_std"),
    (KL, (X, X), {"prior_log_std": torch.zeros(5)}, RuntimeError, "prior_log_std must broadcast"),
    (KL, (X, X), {"free_bits": -0.1}, ValueError, "free_bits must be at least 0 and finite, got -0.1"),
    (KL, (X, X), {"free_bits": NAN}, ValueError, "free_bits must be at least 0"),
    (KL, (X, X), {"free_bits": "many"}, TypeError, "free_bits must be a number, got str"),
    (KL, (X, X), {"batch_dims": 3}, RuntimeError, "mean must have at least batch_dims = 3 dimensions, and has 2"),
    (KL, (X, X), {"batch_dims": -1}, RuntimeError, "batch_dims must not be negative, got -1"),
    (KL, (X, X), {"batch_dims": 1.0}, TypeError, "batch_dims must be an int, got float"),
    ("gaussian_kl", (X[0, 0], X), {"batch_dims": 3}, RuntimeError, "batch_dims = 3"),
    (
        "gaussian_kl",
        (X[0, 0], X[0, 0]),
        {},
        RuntimeError,
        "at least batch_dims = 1 dimensions, and has 0",
    ),
    ("gumbel_softmax", (None,), {}, TypeError, "logits must be a Tensor, got NoneType"),
    ("gumbel_softmax", (INT,), {}, ValueError, "logits must be of a floating dtype"),
    ("gumbel_softmax", (X, 0.0), {}, ValueError, "tau must be above 0 and finite, got 0.0"),
    ("gumbel_softmax", (X, INF), {}, ValueError, "tau must be above 0 and finite, got inf"),
    ("gumbel_softmax", (X, NAN), {}, ValueError, "tau must be above 0"),
    ("gumbel_softmax", (X, "cold"), {}, TypeError, "tau must be a number, got str"),
    ("gumbel_softmax", (X,), {"dim": 2}, IndexError, r"dim must be in \[-2, 1\], got 2"),
    ("gumbel_softmax", (X[0, 0],), {"dim": -2}, IndexError, r"dim must be in \[-1, 0\], got -2"),
    ("gumbel_softmax", (X,), {"dim": "last"}, TypeError, "dim must be an integer, got str"),
    (
        "gumbel_softmax",
        (X,),
        {"noise": X.T},
        RuntimeError,
        r"noise must have the shape \[3, 4\] of logits, got",
    ),
    ("relaxed_bernoulli", (X, -1.0), {}, ValueError, "tau must be above 0 and finite, got -1.0"),
    ("relaxed_bernoulli", (X,), {"noise": WIDE}, RuntimeError, "noise must be torch.float32, the dtype of logits"),
    ("relaxed_bernoulli", (X,), {"rng": INT}, RuntimeError, r"rng must be \[2\]"),
    ("categorical_sample", ([0.0],), {}, TypeError, "logits must be a Tensor, got list"),
    ("categorical_sample", (INT,), {}, ValueError, "logits must be of a floating dtype"),
    (
        "categorical_sample",
        (X[0, 0],),
        {},
        RuntimeError,
        r"logits must be \[..., V\] with at least one class",
    ),
    ("categorical_sample", (X[:, :0],), {}, RuntimeError, "with at least one class"),
    ("categorical_sample", (X, 1.5), {}, TypeError, "num_samples must be an integer or None, got float"),
    ("categorical_sample", (X, -1), {}, ValueError, "num_samples must not be negative, got -1"),
    ("categorical_sample", (X,), {"u": X}, RuntimeError, r"u must have shape \[3\], got \[3, 4\]"),
    ("categorical_sample", (X, 5), {"u": X}, RuntimeError, r"u must have shape \[3, 5\], got \[3, 4\]"),
    ("categorical_sample", (X,), {"u": INT[:, 0]}, ValueError, "u must be of a floating dtype"),
    ("categorical_sample", (X,), {"u": META[:, 0]}, RuntimeError, "u must be on cpu, as logits is; got meta"),
    ("categorical_sample", (X, 4), {"u": X + 1.0}, ValueError, r"u must be in \[0, 1\)"),
    ("categorical_sample", (X, 4), {"u": X - 0.1}, ValueError, r"u must be in \[0, 1\)"),
    ("categorical_sample", (X, 4), {"u": X + NAN}, ValueError, r"u must be in \[0, 1\)"),
    ("vector_quantize", (X, None), {}, TypeError, "codebook must be a Tensor, got NoneType"),
    ("vector_quantize", (INT, INT), {}, ValueError, "x must be of a floating dtype"),
    ("vector_quantize", (X, WIDE), {}, RuntimeError, "codebook must be torch.float32, the dtype of x"),
    ("vector_quantize", (X, X[:, :3]), {}, RuntimeError, r"got \[3, 4\] and \[3, 3\]"),
    ("vector_quantize", (X, X[:0]), {}, RuntimeError, r"codebook \[K, D\] with K > 0"),
    ("vector_quantize", (X, X[0]), {}, RuntimeError, r"codebook \[K, D\] with K > 0"),
    ("vector_quantize", (X[0, 0], X), {}, RuntimeError, r"x must be \[..., D\]"),
    ("vector_quantize", (X, X), {"commitment_weight": "x"}, TypeError, "commitment_weight must be a number, got str"),
    ("vector_quantize", (X, X), {"codebook_weight": NAN}, ValueError, "codebook_weight must be finite"),
    ("vector_quantize_statistics", (X, [0], 3), {}, TypeError, "indices must be a Tensor, got list"),
    ("vector_quantize_statistics", (X, X[:, 0], 3), {}, ValueError, "indices must be torch.int64, got torch.float32"),
    ("vector_quantize_statistics", (X, INT, 3), {}, RuntimeError, r"indices must be \[3\] on cpu, got \[3, 4\] on cpu"),
    ("vector_quantize_statistics", (X, INT[:, 0], 0), {}, ValueError, "num_codes must be above 0, got 0"),
    ("vector_quantize_statistics", (X, INT[:, 0], 1.0), {}, TypeError, "num_codes must be an integer, got float"),
    ("vector_quantize_statistics", (X, INT[:, 0] + 3, 3), {}, RuntimeError, r"indices must be in \[0, 3\), got 3"),
    ("vector_quantize_statistics", (X, INT[:, 0] - 1, 3), {}, RuntimeError, r"indices must be in \[0, 3\), got -1"),
]


@pytest.mark.parametrize(("op", "arguments", "options", "error", "message"), ERRORS)
def test_errors(
    op: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as info:
        getattr(ops, op)(*arguments, **options)
    assert str(info.value).startswith(f"{op}: ") or "indices must be in" in str(info.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda genfuse: genfuse.gaussian(X, X[:2], None, None, X, None, 1, False, 0.0, -INF, INF, True, True),
        lambda genfuse: genfuse.gaussian(X, X, None, None, X[:2], None, 1, False, 0.0, -INF, INF, True, True),
        lambda genfuse: genfuse.gaussian(X, X, None, None, None, None, 1, False, 0.0, -INF, INF, True, True),
        lambda genfuse: genfuse.gaussian(X, X, None, None, None, RNG[:1], 1, False, 0.0, -INF, INF, True, True),
        lambda genfuse: genfuse.gaussian(X, X, X[:2], None, X, None, 1, False, 0.0, -INF, INF, True, True),
        lambda genfuse: genfuse.gaussian(X, X, None, None, X, None, 3, False, 0.0, -INF, INF, True, True),
        lambda genfuse: genfuse.gaussian(X, WIDE, None, None, X, None, 1, False, 0.0, -INF, INF, True, True),
        lambda genfuse: genfuse.gumbel_softmax(X, X[:2], None, 1.0, False),
        lambda genfuse: genfuse.gumbel_softmax(X, None, None, 1.0, False),
        lambda genfuse: genfuse.gumbel_softmax(INT, None, RNG, 1.0, False),
        lambda genfuse: genfuse.gumbel_softmax_backward(X[:2], X, X, None, X, 1.0, False, 1),
        lambda genfuse: genfuse.relaxed_bernoulli(X, X[:2], None, 1.0, False),
        lambda genfuse: genfuse.relaxed_bernoulli(X, None, X[0, :2], 1.0, False),
        lambda genfuse: genfuse.categorical_sample(X, None, None, 1),
        lambda genfuse: genfuse.categorical_sample(X, X, None, 1),
        lambda genfuse: genfuse.categorical_sample(X, None, RNG, -1),
        lambda genfuse: genfuse.vector_quantize(X, X[:, :2], 1.0, 1.0),
        lambda genfuse: genfuse.vector_quantize(X, WIDE, 1.0, 1.0),
        lambda genfuse: genfuse.vector_quantize_backward(X, X[:, 0], X, X, INT[:, 0] + 9, 1.0, 1.0, 3),
        lambda genfuse: genfuse.vector_quantize_backward(X[:2], None, X, X, INT[:, 0], 1.0, 1.0, 3),
        lambda genfuse: genfuse.vector_quantize_statistics(X, INT[:2, 0], 3),
        lambda genfuse: genfuse.vector_quantize_statistics(X, INT[:, 0], 0),
    ],
)
def test_direct_callers_cannot_reach_out_of_bounds(call: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError):
        call(torch.ops.genfuse)


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_nearest_codes_far_from_the_origin(offset: float) -> None:
    """There |x|^2 and x.e are large and alike; what they differ by is what counts."""
    x, codebook = torch.randn(500, 16) * 0.1 + offset, torch.randn(100, 16) * 0.1 + offset
    nearest = torch.cdist(x.double(), codebook.double()).argmin(1)
    assert torch.equal(ops.vector_quantize(x, codebook).indices, nearest)


def test_a_code_taken_more_than_two_to_the_24_times() -> None:
    count = 2**24 + 1000
    counts, sums = ops.vector_quantize_statistics(torch.ones(count, 1), torch.zeros(count, dtype=torch.int64), 2)
    assert counts.tolist() == [float(count), 0.0]
    assert sums.tolist() == [[float(count)], [0.0]]


@pytest.mark.parametrize("function", [ops.gumbel_softmax, ops.relaxed_bernoulli])
def test_a_hard_sample_may_be_written_over(function: Any) -> None:
    """Backward computes the soft sample anew, so nothing of the hard one is kept."""
    logits, rng = torch.randn(3, 5, requires_grad=True), torch.tensor([1, 2])
    (expected,) = torch.autograd.grad((function(logits, hard=True, rng=rng) * torch.arange(5.0)).sum(), logits)
    sample = function(logits, hard=True, rng=rng)
    (found,) = torch.autograd.grad((sample.mul_(torch.arange(5.0))).sum(), logits)
    assert torch.equal(found, expected)
