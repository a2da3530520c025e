"""The autoencoders against their twins in plain PyTorch, against integrals, and as torch modules."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from genfuse import models, reference
from genfuse.models import hierarchical_vae
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

LIKELIHOODS = ("bernoulli", "gaussian", "discretized_gaussian")
SHAPE, BATCH = (1, 8, 8), 5
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"latent_dim": 4, "hidden_dims": (11, 9)},
    "conv": {"latent_dim": 4, "hidden_dims": (11,), "architecture": "conv"},
    "iwae": {"latent_dim": 4, "hidden_dims": (11,), "objective": "iwae", "num_samples": 3},
    "samples": {"latent_dim": 4, "hidden_dims": (11,), "num_samples": 3, "beta": 0.5, "free_bits": 0.2},
    "ladder": {"latent_dims": (5, 4, 3), "hidden_dim": 12},
    "ladder, beta": {"latent_dims": (5, 4), "hidden_dim": 12, "beta": 0.5, "free_bits": 0.2},
    "vq": {"num_embeddings": 7, "embedding_dim": 5, "hidden_dim": 6, "prior_hidden_size": 10},
}
SAMPLED = [case for case in SMALL if case != "vq"]  # those with Gaussian latents


@pytest.fixture
def one_thread() -> Iterator[None]:
    """These models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def name_of(case: str) -> str:
    return "VQVAE" if case == "vq" else "HierarchicalVAE" if case.startswith("ladder") else "VAE"


def build(
    package: Any, case: str, shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.float64, **more: Any
) -> Any:
    torch.manual_seed(1)
    return getattr(package, name_of(case))(shape, **(SMALL[case] | more)).to(dtype)


def pair(case: str, **more: Any) -> tuple[Any, Any]:
    """Our model and its twin, built from the same seed."""
    return build(models, case, **more), build(reference, case, **more)


def images(
    batch: int = BATCH, shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise(model: Any, batch: int = BATCH, count: int | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """Standard normals as `elbo` takes them."""
    generator = torch.Generator().manual_seed(5)
    lead = (batch,) if count is None else (count, batch)
    if isinstance(model, (models.HierarchicalVAE, reference.HierarchicalVAE)):
        return [torch.randn(*lead, dim, generator=generator, dtype=dtype) for dim in model.latent_dims]
    return torch.randn(*lead, model.latent_dim, generator=generator, dtype=dtype)


# ---- the twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_state_dict_is_the_twins(case: str) -> None:
    ours, twin = pair(case)
    left, right = ours.state_dict(), twin.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)  # one seed, one initialisation
    twin.load_state_dict(left)
    ours.load_state_dict(right)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    ("case", "shape"), [*((case, SHAPE) for case in SMALL), ("conv", (2, 9, 7)), ("vq", (2, 9, 14))]
)
def test_loss_and_gradients_are_the_twins(case: str, shape: Sequence[int], likelihood: str) -> None:
    x = images(shape=shape)
    found = []
    for model in pair(case, shape=shape, likelihood=likelihood):
        torch.manual_seed(3)  # the noise is drawn, and is the same
        losses = [model.loss(x), model.loss(x.flip(0))]  # the VQ-VAE's second from the codebook that the first left
        sum(losses).backward()
        if case == "vq":
            losses.append(model.prior_loss(x))
            losses[-1].backward()
        losses += [model.elbo(x), *model.state_dict().values()]
        found.append((losses, {name: parameter.grad for name, parameter in model.named_parameters()}))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    for name, gradient in found[0][1].items():
        assert gradient is not None, name
        torch.testing.assert_close(
            gradient, found[1][1][name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", SMALL)
def test_pictures_are_the_twins(case: str) -> None:
    x = images()
    pictures = []
    for model in pair(case, likelihood="gaussian" if case == "conv" else "bernoulli"):
        torch.manual_seed(4)
        drawn = [] if case == "vq" else [model.sample(3)]
        pictures.append([*drawn, model.reconstruct(x), model.interpolate(x[:2], x[2:4], 4)])
    for ours, theirs in zip(*pictures, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert pictures[0][-1].shape == (2, 4, *SHAPE)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", ["mlp", "iwae", "samples", "ladder"])
def test_float32_is_as_accurate_as_the_twin(case: str, likelihood: str) -> None:
    ours, twin = pair(case, likelihood=likelihood, dtype=torch.float32)
    x, eps = images(dtype=torch.float32), noise(ours, count=3 if case in ("iwae", "samples") else None)
    eps = [one.float() for one in eps] if isinstance(eps, list) else eps.float()

    def run(model: Any, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data = change(parameter.detach())
        noise = [change(one) for one in eps] if isinstance(eps, list) else change(eps)
        loss = model.loss(change(x), eps=noise)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [loss.detach(), model.elbo(change(x), eps=noise).detach(), *gradients]

    eager = eager_runs(lambda nudge: run(twin, nudge))
    names = ["loss", "elbo", *(name for name, _ in ours.named_parameters())]
    results = run(ours, lambda tensor: tensor), run(twin, Tensor.double)
    for name, actual, runs, exact in zip(names, results[0], eager, results[1], strict=True):
        assert_as_accurate(actual, runs, exact, name, gradient=name not in names[:2])


@pytest.mark.parametrize("case", SMALL)
def test_trained_side_by_side(case: str) -> None:
    """Twenty-five steps of Adam from one seed: the curves agree, and the model learns."""
    x = images(24).round()
    curves = []
    for model in pair(case):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        torch.manual_seed(2)
        curve = []
        for _ in range(25):
            loss = model.loss(x)
            if case == "vq":
                loss = loss + model.prior_loss(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-6, atol=1e-6)
    assert curves[0][-5:].mean() < curves[0][:5].mean() - 0.5


def test_the_classic_is_that_of_everybody() -> None:
    """784-400-20 by pytorch/examples' formulas, from fc1, fc21, fc22, fc3, fc4."""
    model = models.VAE().double()
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [
        *((400, 784), (400,), (40, 400), (40,), (400, 20), (400,), (784, 400), (784,))
    ]
    state = model.state_dict()
    for name in ("encoder.1", "posterior", "decoder.0", "decoder.2"):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        bound = weight.size(1) ** -0.5  # torch.nn.Linear's own initialisation
        assert 0.99 * bound < weight.abs().max() <= bound
        assert bias.abs().max() <= bound
    x, eps = images(6, (1, 28, 28)).round(), noise(model, 6)
    h = F.relu(F.linear(x.view(-1, 784), state["encoder.1.weight"], state["encoder.1.bias"]))
    mu = F.linear(h, state["posterior.weight"][:20], state["posterior.bias"][:20])
    logvar = F.linear(h, state["posterior.weight"][20:], state["posterior.bias"][20:])
    z = mu + eps * torch.exp(0.5 * logvar)
    h = F.relu(F.linear(z, state["decoder.0.weight"], state["decoder.0.bias"]))
    recon = torch.sigmoid(F.linear(h, state["decoder.2.weight"], state["decoder.2.bias"]))
    bce = F.binary_cross_entropy(recon, x.view(-1, 784), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    torch.testing.assert_close(model.loss(x, eps=eps), (bce + kld) / 6)
    torch.testing.assert_close(model.sample(2).shape, torch.Size([2, 1, 28, 28]))


# ---- objectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["samples", "ladder, beta"])
def test_beta_and_free_bits_are_in_the_loss_alone(case: str) -> None:
    model = build(models, case)
    x, eps = images(), noise(model, count=3 if case == "samples" else None)
    nll, kl = model.elbo_terms(x, eps=eps)
    per_image = kl if case == "samples" else kl.sum(1)
    torch.testing.assert_close(model.elbo(x, eps=eps), -(nll + per_image))
    loss = model.loss(x, eps=eps)
    model.free_bits = 0.0
    torch.testing.assert_close(model.loss(x, eps=eps), (nll + 0.5 * per_image).mean())
    assert loss > model.loss(x, eps=eps) + 0.01  # with free bits an element counts more
    model.beta = 2.0  # assigned, as warm-up does
    torch.testing.assert_close(model.loss(x, eps=eps), (nll + 2.0 * per_image).mean())


def test_several_samples_are_averaged() -> None:
    model = build(models, "samples")
    x, eps = images(), noise(model, count=3)
    one_by_one = torch.stack([model.elbo(x, eps=one) for one in eps])
    torch.testing.assert_close(model.elbo(x, eps=eps), one_by_one.mean(0))
    torch.manual_seed(0)
    drawn = model.elbo(x)
    torch.manual_seed(0)
    model.num_samples = 1
    assert not torch.allclose(drawn, model.elbo(x))


def test_iwae_is_between_the_elbo_and_the_likelihood() -> None:
    model = build(models, "iwae")
    x, eps = images(), noise(model, count=3)
    encoded = model.encode(x)
    weights = model._log_weights(x, encoded, 3, eps)
    torch.testing.assert_close(model.loss(x, eps=eps), -(weights.exp().mean(0).log().mean()))
    torch.testing.assert_close(model.loss(x, eps=eps[:1]), -weights[0].mean())  # one sample: the ELBO, by one sample
    torch.testing.assert_close(model.loss(x, eps=eps[0]), -weights[0].mean())
    with torch.no_grad():
        model.posterior.weight.mul_(20.0)  # a posterior that is far from right
        bounds = []
        for count in (1, 5, 50):
            model.num_samples = count
            bounds.append(torch.stack([model.loss(x) for _ in range(200)]).mean())
    assert bounds[0] > bounds[1] + 0.1 > bounds[2] + 0.2


@pytest.mark.parametrize("case", SAMPLED)
def test_weights_are_the_twins(case: str) -> None:
    ours, twin = pair(case)
    x, eps = images(), noise(ours, count=4)
    found = ours._log_weights(x, ours.encode(x), 4, eps)
    each = [[part[i] for part in eps] if isinstance(eps, list) else eps[i] for i in range(4)]
    expected = torch.stack([twin.log_weight(x, twin.encode(x), one) for one in each])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def sharpened(model: Any) -> Any:
    """A model whose latents matter, and whose posterior is not the prior."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0)
    return model


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_nll_is_the_integral_over_the_latent(likelihood: str) -> None:
    torch.manual_seed(1)
    model = sharpened(models.VAE((1, 3, 3), 1, (8,), likelihood=likelihood).double())
    x = images(3, (1, 3, 3))
    z = torch.linspace(-9.0, 9.0, 4001, dtype=torch.float64)
    with torch.no_grad():
        pixels = model.decode(z.unsqueeze(1))
        joint = torch.stack([-model._pixel_nll(pixels, one.expand(z.numel(), *one.shape)) for one in x], 1)
    joint = joint - 0.5 * (z.square() + math.log(2.0 * math.pi)).unsqueeze(1)
    exact = torch.logsumexp(joint, 0) + math.log(18.0 / 4000)
    found = model.log_prob(x, 20000)
    torch.testing.assert_close(found, exact, rtol=0.0, atol=0.02)
    model.num_samples = 2000
    assert (model.elbo(x) < exact + 0.01).all()
    assert (model.elbo(x) < exact - 0.02).any()  # the test would see an ELBO in its place


def test_nll_of_the_ladder_is_the_integral_over_its_latents() -> None:
    torch.manual_seed(1)
    model = sharpened(models.HierarchicalVAE((1, 3, 3), (1, 1), 8).double())
    x = images(2, (1, 3, 3)).round()
    with torch.no_grad():
        for message in model.messages:
            message.bias[1:] += 2.0  # a wide posterior: weights of less variance
        z2 = torch.linspace(-7.0, 7.0, 281, dtype=torch.float64)
        mean, logvar = model._prior(0, z2.unsqueeze(1))
        z1 = torch.linspace(-12.0, 12.0, 481, dtype=torch.float64)
        pixels = model.decode(z1.unsqueeze(1))
        given_z1 = torch.stack([-model._pixel_nll(pixels, one.expand(z1.numel(), *one.shape)) for one in x])
        prior1 = torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(z1)  # [z2, z1]
        prior2 = torch.distributions.Normal(0.0, 1.0).log_prob(z2).unsqueeze(1)
        exact = torch.logsumexp((prior1 + prior2) + given_z1.unsqueeze(1), (1, 2)) + math.log(14 / 280 * 24 / 480)
    torch.testing.assert_close(model.log_prob(x, 50000), exact, rtol=0.0, atol=0.03)
    elbo = torch.stack([model.elbo(x).detach() for _ in range(500)]).mean(0)
    assert (elbo < exact).all()


@pytest.mark.parametrize("case", ["mlp", "conv", "ladder"])
def test_nll_is_batched_in_bounded_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(models, case), images()
    sizes: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].size(0)))
    weights: list[Tensor] = []
    log_weights = model._log_weights

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        weights.append(log_weights(*arguments, **options))
        return weights[-1]

    monkeypatch.setattr(model, "_log_weights", recorded)
    for count, chunk in ((3000, 100000), (300, 170), (70, 150), (3, 2), (1, 1)):
        sizes.clear(), weights.clear()
        found = model.nll(x, count, chunk_size=chunk)
        assert max(sizes) <= chunk
        assert sum(sizes) == BATCH * count
        assert len(sizes) <= 2 * BATCH * count / chunk + BATCH  # nor in smaller pieces than need be
        assert not found.requires_grad
        # Image by image (or several at a time), all samples of one before the next.
        parts: list[list[Tensor]] = [[]]
        for piece in weights:
            if sum(map(len, parts[-1])) == count:
                parts.append([])
            parts[-1].append(piece)
        every = torch.cat([torch.cat(part) for part in parts], 1)
        assert every.shape == (count, BATCH)
        torch.testing.assert_close(found, -every.exp().mean(0).log())


@pytest.mark.parametrize("case", SAMPLED)
def test_log_prob_is_less_nll(case: str) -> None:
    model, x = build(models, case), images()
    nll = model.nll(x, 7, chunk_size=9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(nll, -model.log_prob(x, 7, chunk_size=9, generator=torch.Generator().manual_seed(3)))


def test_nll_survives_weights_that_vanish() -> None:
    """exp of these weights is 0, or overflows, in any dtype."""
    torch.manual_seed(1)
    model = models.VAE((1, 3, 3), 2, (8,), likelihood="gaussian")
    with torch.no_grad():
        model.decoder[2].bias[9:] = -30.0  # log-variances at their lower end
    x = images(2, (1, 3, 3), dtype=torch.float32)
    nll = model.nll(x, 50)
    assert nll.isfinite().all()
    assert (nll > 1000.0).all()


def test_merge_is_the_product_of_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    merged, log_variance = hierarchical_vae.merge((mean, logvar), (prior_mean, prior_logvar))
    precision = (-logvar).exp() + (-prior_logvar).exp()
    torch.testing.assert_close(log_variance, -precision.log())
    torch.testing.assert_close(merged, (mean * (-logvar).exp() + prior_mean * (-prior_logvar).exp()) / precision)
    # Precisions that float32 cannot hold.
    wild = torch.tensor([-300.0, 300.0, 0.0, 300.0])
    merged, log_variance = hierarchical_vae.merge((torch.ones(4), wild), (-torch.ones(4), -wild))
    torch.testing.assert_close(merged, torch.tensor([1.0, -1.0, 0.0, -1.0]))
    torch.testing.assert_close(log_variance, torch.tensor([-300.0, -300.0, -math.log(2.0), -300.0]))


# ---- the VQ-VAE's own ------------------------------------------------------------------------------------------------


def test_prior_is_a_distribution_over_codes_alone() -> None:
    torch.manual_seed(0)
    model = models.VQVAE((1, 8, 4), 3, 4, 6, prior_hidden_size=8).double()
    codes = torch.tensor(list(itertools.product(range(3), repeat=2))).view(-1, 2, 1)
    torch.testing.assert_close(model.prior_log_prob(codes).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    drawn = model.float().sample_codes(4000, temperature=3.0)
    assert drawn.max() == 2  # never the start symbol
    optimizer = torch.optim.SGD(model.prior.parameters(), lr=0.1)
    model.prior_loss(torch.rand(4, 1, 8, 4)).backward()
    assert model.prior.head.bias.grad[3] == 0.0
    optimizer.step()
    assert model.prior.head.bias[3] == -1e4


def test_samples_follow_the_prior() -> None:
    torch.manual_seed(0)
    model = models.VQVAE((1, 8, 4), 3, 4, 6, prior_hidden_size=8)
    with torch.no_grad():
        model.prior.head.weight.mul_(4.0)
    codes = torch.tensor(list(itertools.product(range(3), repeat=2))).view(-1, 2, 1)
    drawn = model.sample_codes(20000).flatten(1)
    counts = torch.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=9)
    expected = model.prior_log_prob(codes).detach().exp() * 20000
    assert float(((counts - expected).square() / expected).sum()) < 30.0  # chi-squared, 8 degrees: once in 5000


def test_the_two_losses_share_no_parameter() -> None:
    model, x = build(models, "vq"), images()
    model.loss(x).backward()
    assert all(parameter.grad is None for parameter in model.prior.parameters())
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    model.zero_grad()
    model.prior_loss(x).backward()
    assert all(parameter.grad is not None for parameter in model.prior.parameters())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.startswith("prior"))


def test_only_the_loss_moves_the_codebook() -> None:
    model, x = build(models, "vq").train(), images()
    before = copy.deepcopy(model.state_dict())
    model.encode(x), model.elbo(x), model.nll(x), model.reconstruct(x), model.prior_loss(x), model.sample(2)
    model.interpolate(x, x.flip(0), 3)
    model.eval().loss(x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.train().loss(x)
    assert not torch.equal(before["quantizer.codebook"], model.quantizer.codebook)


def test_nll_of_the_vqvae_is_less_its_bound() -> None:
    model, x = build(models, "vq").eval(), images()
    codes = model.encode(x)
    assert codes.shape == (5, 2, 2)
    bound = model.prior_log_prob(codes) - F.binary_cross_entropy_with_logits(
        model.decode(codes), x, reduction="none"
    ).sum((1, 2, 3))
    torch.testing.assert_close(model.elbo(x), bound)
    torch.testing.assert_close(model.nll(x, chunk_size=2), -bound)
    nll, commitment, parts_codes = model.loss_parts(x)
    assert torch.equal(parts_codes, codes)
    vectors = model.encoder(x)
    torch.testing.assert_close(
        commitment, 0.25 * (vectors - model.quantizer.decode(codes)).square().sum((1, 2, 3)).mean()
    )
    torch.testing.assert_close(model.loss(x), nll.mean() + commitment)


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAMPLED)
def test_seed_and_generator_govern_the_noise(case: str) -> None:
    model, x = build(models, case, dtype=torch.float32), images(dtype=torch.float32)
    calls: list[Callable[[torch.Generator | None], Tensor]] = [
        lambda generator: model.loss(x, generator=generator),
        lambda generator: model.elbo(x, generator=generator),
        lambda generator: model.nll(x, 3, generator=generator),
        lambda generator: model.sample(2, generator=generator),
        lambda generator: model.sample(2, generator=generator, sample_pixels=True),
    ]
    for call in calls:
        torch.manual_seed(7)
        first, second = call(None), call(None)
        assert not torch.equal(first, second)
        torch.manual_seed(7)
        assert torch.equal(first, call(None))
        state = torch.get_rng_state()
        given = call(torch.Generator().manual_seed(8))
        assert torch.equal(torch.get_rng_state(), state)  # the default generator was left alone
        assert torch.equal(given, call(torch.Generator().manual_seed(8)))


def test_codes_are_drawn_from_the_generator() -> None:
    model = build(models, "vq", dtype=torch.float32)
    first = model.sample(20, generator=torch.Generator().manual_seed(8), sample_pixels=True)
    assert torch.equal(first, model.sample(20, generator=torch.Generator().manual_seed(8), sample_pixels=True))
    assert not torch.equal(first, model.sample(20, generator=torch.Generator().manual_seed(9), sample_pixels=True))


@pytest.mark.parametrize("case", ["mlp", "ladder", "vq"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_pictures_are_in_range(case: str, likelihood: str) -> None:
    model = build(models, case, likelihood=likelihood, levels=17, dtype=torch.float32)
    means, drawn = model.sample(6), model.sample(6, sample_pixels=True)
    for picture in (means, drawn, model.reconstruct(images(dtype=torch.float32))):
        assert picture.dtype == torch.float32
        assert picture.min() >= 0.0
        assert picture.max() <= 1.0
    if likelihood == "bernoulli":
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
    if likelihood == "discretized_gaussian":
        torch.testing.assert_close(drawn * 16, (drawn * 16).round())
        assert drawn.unique().numel() > 5


@pytest.mark.parametrize("case", SMALL)
def test_interpolation_begins_and_ends_at_the_reconstructions(case: str) -> None:
    model = build(models, case)
    x0, x1 = images(3), images(3, seed=1)
    path = model.interpolate(x0, x1, 5)
    assert path.shape == (3, 5, *SHAPE)
    torch.testing.assert_close(path[:, 0], model.reconstruct(x0))
    torch.testing.assert_close(path[:, -1], model.reconstruct(x1))
    if case != "vq":
        assert not torch.allclose(path[:, 2], path[:, 0])


# ---- as torch modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_rebuilt_copied_and_pickled(case: str) -> None:
    model, x = build(models, case, likelihood="gaussian"), images()
    rebuilt = getattr(models, name_of(case))(**json.loads(json.dumps(model.config))).double()
    assert rebuilt.config == model.config
    rebuilt.load_state_dict(model.state_dict())
    others = [rebuilt, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    losses = []
    for one in (model, *others):
        torch.manual_seed(0)
        losses.append(one.loss(x))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("case", SMALL)
def test_loss_compiles_in_one_graph_for_all_batch_sizes(case: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = build(models, case, dtype=torch.float32)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch in (4, 6, 9):
        x = images(batch, dtype=torch.float32)
        losses = []
        for one, loss in ((model, compiled), (eager, eager.loss)):
            one.zero_grad()
            torch.manual_seed(batch)
            losses.append(loss(x))
            losses[-1].backward()
        torch.testing.assert_close(losses[0], losses[1])
        for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            if theirs.grad is not None:
                assert ours.grad is not None, name
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


class _Method(torch.nn.Module):
    """One method of a model as a module, which is what torch.export takes."""

    def __init__(self, model: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.method)(x)


@pytest.mark.parametrize("case", ["mlp", "conv", "ladder", "vq"])
def test_encode_and_decode_export(case: str) -> None:
    model = build(models, case, dtype=torch.float32, likelihood="gaussian").eval()
    dims = {"ladder": 5, "vq": None}.get(case, 4)
    for method in ("encode", "decode"):

        def inputs(batch: int, method: str = method) -> Tensor:
            if method == "encode":
                return images(batch, dtype=torch.float32)
            return torch.randint(7, (batch, 2, 2)) if dims is None else torch.randn(batch, dims)

        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(_Method(model, method), (inputs(3),), dynamic_shapes={"x": {0: batch}})
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        x = inputs(6)
        torch.testing.assert_close(torch.export.load(stream).module()(x), getattr(model, method)(x))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("case", SMALL)
def test_autocast_and_bfloat16(case: str, likelihood: str) -> None:
    model, x = build(models, case, likelihood=likelihood, dtype=torch.float32), images(dtype=torch.float32)
    model.eval()  # the VQ-VAE's codebook stays
    torch.manual_seed(0)
    exact = model.loss(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        loss = model.loss(x)
        assert model.elbo(x).dtype == torch.float32
        assert model.nll(x, 4).dtype == torch.float32
        pictures = [model.sample(2), model.reconstruct(x), model.interpolate(x, x.flip(0), 3)]
    assert loss.dtype == torch.float32
    assert not torch.equal(loss, exact)
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(picture.isfinite().all() for picture in pictures)
    half = copy.deepcopy(model).bfloat16()
    torch.manual_seed(0)
    torch.testing.assert_close(half.loss(x.bfloat16()), exact, rtol=0.05, atol=0.0)
    assert half.nll(x.bfloat16(), 4).dtype == torch.float32
    assert half.sample(2).isfinite().all()
    assert half.interpolate(x.bfloat16(), x.bfloat16(), 2).isfinite().all()


@pytest.mark.parametrize("case", SMALL)
def test_nan_stays_in_its_image(case: str) -> None:
    model, x = build(models, case).eval(), images()
    expected = model.nll(x, 3, generator=torch.Generator().manual_seed(0))
    x[2, 0, 4, 4] = math.nan
    assert model.elbo(x).isnan().tolist() == [False, False, True, False, False]
    found = model.nll(x, 3, generator=torch.Generator().manual_seed(0))
    assert found.isnan().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("case", SMALL)
def test_no_images_and_images_of_bits(case: str) -> None:
    model = build(models, case).eval()
    none = images(0)
    assert model.elbo(none).shape == (0,)
    assert model.nll(none, 3).shape == (0,)
    assert model.reconstruct(none).shape == (0, *SHAPE)
    assert model.sample(0).shape == (0, *SHAPE)
    bits = images() > 0.5
    torch.manual_seed(0)
    loss = model.loss(bits)
    torch.manual_seed(0)
    torch.testing.assert_close(loss, model.loss(bits.double()))
    torch.testing.assert_close(model.reconstruct(bits), model.reconstruct(bits.double()))


def test_strided_images() -> None:
    model, x = build(models, "mlp"), images(BATCH).transpose(2, 3)
    eps = noise(model)
    torch.testing.assert_close(model.elbo(x, eps=eps), model.elbo(x.contiguous(), eps=eps))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "VAE",
            {"input_shape": (28, 28)},
            ValueError,
            r"input_shape must be \(channels, height, width\), got \[28, 28\]",
        ),
        ("VAE", {"input_shape": 28}, TypeError, r"input_shape must be \(channels, height, width\), got 28"),
        ("VAE", {"input_shape": (1, 0, 28)}, ValueError, "input_shape must be at least 1, got 0"),
        ("VAE", {"input_shape": (1, 3, 28), "architecture": "conv"}, ValueError, "at least 4 by 4"),
        ("VAE", {"latent_dim": 0}, ValueError, "latent_dim must be at least 1, got 0"),
        ("VAE", {"latent_dim": 2.0}, TypeError, "latent_dim must be an int, got float"),
        ("VAE", {"hidden_dims": 400}, TypeError, "hidden_dims must be a sequence of ints, got int"),
        ("VAE", {"hidden_dims": ()}, ValueError, r"hidden_dims must hold at least 1, got \[\]"),
        ("VAE", {"architecture": "rnn"}, ValueError, "architecture must be 'mlp' or 'conv', got 'rnn'"),
        ("VAE", {"likelihood": "poisson"}, ValueError, "likelihood must be one of bernoulli, .*; got 'poisson'"),
        ("VAE", {"objective": "vi"}, ValueError, "objective must be 'elbo' or 'iwae', got 'vi'"),
        (
            "VAE",
            {"objective": "iwae", "beta": 2.0},
            ValueError,
            "'iwae' has neither beta nor free bits, got 2.0 and 0.0",
        ),
        ("VAE", {"beta": -1.0}, ValueError, "beta must be finite and not negative, got -1.0"),
        ("VAE", {"beta": "much"}, TypeError, "beta must be a number, got str"),
        ("VAE", {"free_bits": math.nan}, ValueError, "free_bits must be finite and not negative, got nan"),
        ("VAE", {"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ("VAE", {"levels": 1}, ValueError, "levels must be at least 2, got 1"),
        ("HierarchicalVAE", {"latent_dims": (8,)}, ValueError, r"latent_dims must hold at least 2, got \[8\]"),
        ("HierarchicalVAE", {"hidden_dim": True}, TypeError, "hidden_dim must be an int, got bool"),
        ("HierarchicalVAE", {"free_bits": -0.1}, ValueError, "free_bits must be finite"),
        ("VQVAE", {"num_embeddings": 0}, ValueError, "num_embeddings must be at least 1"),
        ("VQVAE", {"input_shape": (1, 2, 2)}, ValueError, "at least 4 by 4"),
        ("VQVAE", {"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ("VQVAE", {"prior_hidden_size": None}, TypeError, "prior_hidden_size must be an int, got NoneType"),
    ],
)
def test_wrong_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(models, name)(**options)


@pytest.mark.parametrize("case", SMALL)
def test_wrong_images(case: str) -> None:
    model, x = build(models, case), images()
    calls: list[Callable[[Any], Any]] = [
        model.encode,
        model.elbo,
        model.loss,
        model.nll,
        model.log_prob,
        model.reconstruct,
    ]
    calls.append(lambda images: model.interpolate(images, x, 3))
    for call in calls:
        with pytest.raises(ValueError, match=r"x0? must be \[B, 1, 8, 8\], got \[5, 64\]"):
            call(x.flatten(1))
        with pytest.raises(ValueError, match=r"x0? must be \[B, 1, 8, 8\], got \[5, 2, 8, 4\]"):
            call(x.view(5, 2, 8, 4))
        with pytest.raises(TypeError, match=r"x0? must be floating, in \[0, 1\]; got torch.uint8"):
            call((x * 255).to(torch.uint8))
        with pytest.raises(TypeError, match=r"x0? must be a Tensor, got list"):
            call(x.tolist())
    with pytest.raises(ValueError, match="x0 and x1 must be as many images"):
        model.interpolate(x, x[:2], 3)
    with pytest.raises(ValueError, match="steps must be at least 2"):
        model.interpolate(x, x, 1)
    with pytest.raises(TypeError, match="chunk_size must be an int, got float"):
        model.nll(x, 3, chunk_size=0.5)
    if case != "vq":
        with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
            model.nll(x, 0)


def test_wrong_latents_and_noise() -> None:
    model, ladder, vq, x = build(models, "mlp"), build(models, "ladder"), build(models, "vq"), images()
    with pytest.raises(ValueError, match=r"z must be \[B, 4\], got \[5, 3\]"):
        model.decode(torch.zeros(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"z must be \[B, 5\], got \[5\]"):
        ladder.decode(torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"codes must be \[B, 2, 2\], got \[3, 4\]"):
        vq.decode(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(IndexError):
        vq.decode(torch.full((3, 2, 2), 7))
    for shape in ((5, 3), (4,), (0, 5, 4), (2, 4, 4)):
        with pytest.raises(ValueError, match=r"eps must be \[5, 4\] or \[samples, 5, 4\], got"):
            model.loss(x, eps=torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"eps must be Tensors of shapes \[\[5, 5\], \[5, 4\], \[5, 3\]\], .*; got \[\[5, 5\]\]"
    ):
        ladder.elbo(x, eps=[torch.zeros(5, 5, dtype=torch.float64)])
