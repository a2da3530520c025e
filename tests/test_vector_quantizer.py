"""The vector quantiser: nearest codes, the codebook's averages, dead codes, and one codebook over several processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from genfuse import nn, reference
from genfuse.nn import sampling
from torch import Tensor

K, D = 6, 3


def vectors(*lead: int, seed: int = 0, dtype: torch.dtype = torch.float64, size: int = D) -> Tensor:
    return torch.randn(*lead, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantizer(dtype: torch.dtype = torch.float64, **options: Any) -> nn.VectorQuantizer:
    torch.manual_seed(1)
    return nn.VectorQuantizer(K, D, **options).to(dtype)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - codebook).square().sum(-1).argmin(-1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lead", [(), (9,), (2, 4), (2, 3, 2)])
def test_quantises(lead: tuple[int, ...], training: bool) -> None:
    layer = quantizer(commitment_weight=0.4).train(training)
    before = layer.codebook.clone()
    x = vectors(*lead).requires_grad_()
    quantized, indices, loss = layer(x)
    assert torch.equal(indices, nearest(x.detach(), before))  # quantised first, updated after
    torch.testing.assert_close(quantized, before[indices])
    torch.testing.assert_close(loss, 0.4 * (x - before[indices]).square().mean())
    cotangent = vectors(*lead, seed=1)
    through, of_loss = torch.autograd.grad((quantized * cotangent).sum() + 3.0 * loss, x, retain_graph=True), 0.0
    of_loss = 3.0 * 0.4 * 2.0 * (x.detach() - before[indices]) / x.numel()
    torch.testing.assert_close(through[0], cotangent + of_loss)
    assert torch.equal(layer.codebook, before) != training


def test_vectors_in_dimension_one() -> None:
    last, first = quantizer(), quantizer(channel_last=False)
    x = vectors(4, 5, 2)
    for ours, theirs in zip(first(x.movedim(-1, 1)), last(x), strict=True):
        torch.testing.assert_close(ours.movedim(1, -1) if ours.dim() == 4 else ours, theirs)
    assert torch.equal(first.codebook, last.codebook)
    indices = first.encode(x.movedim(-1, 1))
    assert indices.shape == (4, 5, 2)
    torch.testing.assert_close(first.decode(indices), last.decode(indices).movedim(-1, 1))
    torch.testing.assert_close(last.decode(indices), last.codebook[indices])


@pytest.mark.parametrize("options", [{}, {"dead_code_threshold": 1.5}, {"decay": 0.5, "eps": 0.1}])
def test_averages_are_the_references(options: dict[str, Any]) -> None:
    ours = quantizer(channel_last=False, **options)
    torch.manual_seed(1)
    twin = reference.VectorQuantizer(K, D, **options).double()
    for step in range(6):
        x = vectors(5, 2, seed=step).movedim(-1, 1) + step
        found = []
        for layer in (ours, twin):
            torch.manual_seed(step)
            found.append([*layer(x), *layer.state_dict().values()])
        for left, right in zip(*found, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)
    assert list(ours.state_dict()) == list(twin.state_dict())


def test_averages_by_hand() -> None:
    layer = nn.VectorQuantizer(3, 1, decay=0.9, eps=0.5).double()
    layer.codebook.copy_(torch.tensor([[0.0], [10.0], [20.0]]))
    layer(torch.tensor([[1.0], [2.0], [9.0]], dtype=torch.float64))
    size = torch.tensor([0.2, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(layer.cluster_size, size)  # raw: neither smoothed nor corrected
    torch.testing.assert_close(layer.embed_sum, torch.tensor([[0.3], [0.9], [0.0]], dtype=torch.float64))
    smoothed = (size + 0.5) / (0.3 + 1.5) * 0.3
    # The third code was not taken, and stays.
    expected = torch.stack([0.3 / smoothed[0], 0.9 / smoothed[1], torch.tensor(20.0, dtype=torch.float64)])
    torch.testing.assert_close(layer.codebook.flatten(), expected)
    assert layer.num_updates == 1


def test_averages_follow_the_vectors() -> None:
    """Vectors around K centres: the codes end up there, and a code that was taken once and never again stays."""
    centres = 4.0 * vectors(K, seed=3)
    layer = quantizer(decay=0.8, dead_code_threshold=0.5)
    layer.codebook.copy_(centres + 0.5 * vectors(K, seed=4))
    for step in range(60):
        layer(centres.repeat(20, 1) + 0.1 * vectors(20 * K, seed=100 + step))
    nearest_code = (centres.unsqueeze(1) - layer.codebook).norm(dim=-1).min(1)
    assert float(nearest_code.values.max()) < 0.1
    assert nearest_code.indices.unique().numel() == K
    torch.testing.assert_close(layer.cluster_size, torch.full((K,), 20.0, dtype=torch.float64), rtol=0.01, atol=0.0)

    layer = quantizer(decay=0.5, eps=1e-3)
    taken = int(layer(vectors(1))[1])
    after = layer.codebook[taken].clone()
    others = [code for code in range(K) if code != taken]
    for _ in range(50):  # the averages of the first vector are long gone
        layer(layer.codebook[others])
    assert torch.equal(layer.codebook[taken], after)


def test_dead_codes_take_vectors_of_the_batch() -> None:
    layer = quantizer(dead_code_threshold=1.0)
    x = vectors(40) + 100.0  # all nearest to one code
    before = layer.codebook.clone()
    _, indices, _ = layer(x)
    (alive,) = indices.unique().tolist()
    dead = [code for code in range(K) if code != alive]
    is_vector = (layer.codebook.unsqueeze(1) == x).all(-1)
    assert is_vector[dead].any(1).all()
    assert is_vector[dead].long().argmax(1).unique().numel() == K - 1  # each another one
    assert not is_vector[alive].any()
    torch.testing.assert_close(layer.embed_sum, layer.codebook * layer.cluster_size.unsqueeze(1), rtol=1e-3, atol=0.0)
    # They start as codes of average use, and so are not dead at once if the next batch does not take them.
    kept = layer.codebook.clone()
    second = layer(vectors(40, seed=1) - 100.0)[1].unique().tolist()
    idle = [code for code in range(K) if code not in second]
    assert len(idle) >= K - 2
    assert torch.equal(layer.codebook[idle], kept[idle])
    # The seed decides, and nothing is replaced in eval.
    again = quantizer(dead_code_threshold=1.0)
    torch.testing.assert_close(again.codebook, before)
    state = torch.get_rng_state()
    again(x)
    repeat = quantizer(dead_code_threshold=1.0)
    torch.set_rng_state(state)
    repeat(x)
    assert torch.equal(again.codebook, repeat.codebook)
    frozen = quantizer(dead_code_threshold=1.0).eval()
    frozen(x)
    assert torch.equal(frozen.codebook, before)


def test_threshold_is_of_the_average_corrected_for_its_start() -> None:
    """A code that one vector in a batch takes has average 1 from the first batch on."""
    x = torch.tensor([[-1.0], [0.0], [1.0], [50.0]], dtype=torch.float64)
    for threshold, batches, expected in ((0.9, 1, 0.01), (0.9, 3, 1.0 - 0.99**3), (1.1, 1, 0.04 / 2)):
        layer = nn.VectorQuantizer(2, 1, dead_code_threshold=threshold).double()
        layer.codebook.copy_(torch.tensor([[0.0], [50.0]]))
        for _ in range(batches):
            layer(x)
        assert float(layer.cluster_size[1]) == pytest.approx(expected)  # replaced, it would have the average size


def test_fewer_vectors_than_codes_and_none() -> None:
    layer = quantizer(dead_code_threshold=1.0)
    layer(vectors(2))
    assert layer.codebook.isfinite().all()
    before = copy.deepcopy(layer.state_dict())
    quantized, indices, _ = layer(vectors(0))
    assert quantized.shape == (0, D)
    assert indices.shape == (0,)
    assert torch.equal(layer.codebook, before["codebook"])


def test_nan_does_not_reach_the_codebook() -> None:
    layer = quantizer(dead_code_threshold=100.0)  # nearly all are replaced each time
    x = vectors(20)
    x[3, 1], x[7, 0] = float("nan"), float("inf")
    for step in range(10):
        torch.manual_seed(step)
        quantized, _, loss = layer(x)
        assert quantized[3].isnan().all()
        assert quantized[[0, 1, 2, 4]].isfinite().all()
        assert loss.isnan()
        assert all(value.isfinite().all() for value in layer.state_dict().values())


def test_codebook_as_a_parameter() -> None:
    layer = quantizer(ema=False, commitment_weight=0.25)
    assert [name for name, _ in layer.named_parameters()] == ["codebook"]
    assert list(layer.state_dict()) == ["codebook"]
    x = vectors(9).requires_grad_()
    quantized, indices, loss = layer(x)
    expected = 1.25 * (x.detach() - layer.codebook.detach()[indices]).square().mean()
    torch.testing.assert_close(loss, expected)
    (quantized.sum() + loss).backward()
    error = layer.codebook.detach()[indices] - x.detach()
    torch.testing.assert_close(
        layer.codebook.grad, torch.zeros_like(error[:1]).expand(K, D).index_add(0, indices, 2.0 * error / x.numel())
    )
    torch.testing.assert_close(x.grad, 1.0 - 0.25 * 2.0 * error / x.numel())
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(40):
        loss = layer(x.detach())[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer(x.detach())[2] < 0.9 * expected


def test_backward_after_the_codebook_has_moved() -> None:
    layer = quantizer(decay=0.0)
    x = vectors(9).requires_grad_()
    before = layer.codebook.clone()
    _, indices, loss = layer(x)
    layer(x.detach() + 1.0)
    loss.backward()
    torch.testing.assert_close(x.grad, 0.5 * (x.detach() - before[indices]) / x.numel())


@pytest.mark.parametrize("options", [{}, {"dead_code_threshold": 0.5, "channel_last": False}, {"ema": False}])
def test_compiles_in_one_graph(options: dict[str, Any]) -> None:
    """Which also shows that nothing waits for a value: .item() would break the graph."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = quantizer(torch.float32, **options)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch in (5, 7, 12):
        x = vectors(batch, 4, dtype=torch.float32, seed=batch)
        x = x if layer.channel_last else x.movedim(-1, 1)
        found = []
        for one in (compiled, eager):
            torch.manual_seed(batch)
            given = x.clone().requires_grad_()
            quantized, indices, loss = one(given)
            (quantized.square().sum() + loss).backward()
            found.append([quantized, indices, loss, given.grad])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], value)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_compiles_with_what_is_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces some collectives and not others; a group of one process is enough to see that."""
    torch._dynamo.reset()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = quantizer(dead_code_threshold=3.0)
        alone = copy.deepcopy(layer)
        torch.manual_seed(0)
        alone(vectors(9))
        monkeypatch.setattr(sampling, "_several_processes", lambda: True)
        torch.manual_seed(0)
        torch.compile(layer, fullgraph=True, backend="aot_eager")(vectors(9))
    finally:
        torch.distributed.destroy_process_group()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_copied_pickled_and_restored() -> None:
    layer = quantizer(dead_code_threshold=0.5)
    layer(vectors(9))
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), quantizer(dead_code_threshold=0.5)]
    others[-1].load_state_dict(layer.state_dict())
    for one in (layer, *others):
        torch.manual_seed(4)
        one(vectors(9, seed=1))
    for one in others:
        assert all(torch.equal(value, one.state_dict()[name]) for name, value in layer.state_dict().items())


def test_autocast() -> None:
    layer = quantizer(torch.float32, dead_code_threshold=0.5)
    x = vectors(9, dtype=torch.float32).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, indices, loss = layer(x)
        (quantized.sum() + loss).backward()
        assert torch.equal(layer.eval().encode(x), nearest(x.detach().float(), layer.codebook))
    assert loss.dtype == torch.float32
    assert layer.codebook.dtype == torch.float32
    assert indices.shape == (9,)
    assert x.grad.isfinite().all()


def _train(rank: int, folder: str) -> None:
    """One of two processes: three updates with its half of every batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(10 + rank)  # the replacements would differ, were they drawn by each
        states = []
        for options in ({}, {"dead_code_threshold": 3.0}):
            layer = nn.VectorQuantizer(K, D, **options).double()
            layer.codebook.copy_(vectors(K, seed=9))
            for step in range(3):
                layer(vectors(2, 7, seed=step)[rank] + 5.0 * rank * bool(options))
            states.append(layer.state_dict())
        torch.save(states, Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_one_codebook_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for left, right in zip(*states, strict=True):
        for name, value in left.items():
            assert torch.equal(value, right[name]), name
    # As one process that has seen both halves.
    alone = nn.VectorQuantizer(K, D).double()
    alone.codebook.copy_(vectors(K, seed=9))
    for step in range(3):
        alone(vectors(2, 7, seed=step))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(states[0][0][name], value)
    # Replaced codes come from rank 0, whose vectors lie elsewhere than rank 1's.
    batch = vectors(2, 7, seed=2)[0]
    assert (states[0][1]["codebook"].unsqueeze(1) == batch).all(-1).any()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, "num_embeddings must be at least 1, got 0"),
        ((4, 3.0), {}, TypeError, "embedding_dim must be an int, got float"),
        ((4, 3), {"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ((4, 3), {"decay": "slow"}, TypeError, "decay must be a number, got str"),
        (
            (4, 3),
            {"commitment_weight": -1.0},
            ValueError,
            "commitment_weight must be finite and at least 0.0, got -1.0",
        ),
        ((4, 3), {"eps": float("nan")}, ValueError, "eps must be finite"),
        ((4, 3), {"dead_code_threshold": -1.0}, ValueError, "dead_code_threshold must be finite"),
        ((4, 3), {"dead_code_threshold": 1.0, "ema": False}, ValueError, "dead_code_threshold needs the averages"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        nn.VectorQuantizer(*arguments, **options)


@pytest.mark.parametrize("integer", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_sizes_are_any_integers(integer: Callable[[int], Any]) -> None:
    layer = nn.VectorQuantizer(integer(K), integer(D))
    assert type(layer.num_embeddings) is type(layer.embedding_dim) is int
    layer(torch.randn(5, D))
    with pytest.raises(TypeError, match="num_embeddings must be an int, got bool"):
        nn.VectorQuantizer(True, D)
    with pytest.raises(TypeError, match="num_embeddings must be an int, got Tensor"):
        nn.VectorQuantizer(torch.tensor(4.0), D)


def test_wrong_inputs() -> None:
    with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 3\], got \[5, 4\]"):
        quantizer()(vectors(5, size=4))
    with pytest.raises(RuntimeError, match=r"x must be \[B, 3, \.\.\.\], got \[5, 4, 3\]"):
        quantizer(channel_last=False)(vectors(5, 4))
    with pytest.raises(RuntimeError, match=r"x must be \[B, 3, \.\.\.\], got \[3\]"):
        quantizer(channel_last=False).encode(vectors())
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        quantizer()([1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match="dtype of x"):
        quantizer()(vectors(5, dtype=torch.float32))


def test_averages_stay_in_float32() -> None:
    """(1 - decay) times a difference is below what bfloat16 can tell, so averages kept in it would hardly move."""
    torch.manual_seed(0)
    batches = [torch.randn(200, 4).bfloat16() for _ in range(50)]
    half, full = nn.VectorQuantizer(5, 4), nn.VectorQuantizer(5, 4)
    full.load_state_dict(half.state_dict())
    half.bfloat16()
    assert (half.codebook.dtype, half.cluster_size.dtype) == (torch.bfloat16, torch.float32)
    for batch in batches:
        half(batch)
        full(batch.float())
    assert float((half.cluster_size - full.cluster_size).abs().max() / full.cluster_size.max()) < 0.02


def test_the_deterministic_sample_has_the_shape_and_dtype_of_a_drawn_one() -> None:
    layer = nn.GaussianReparameterization()
    mean, logvar = torch.arange(4.0), torch.zeros(3, 4)
    z, kl = layer(mean, logvar, deterministic=True)
    assert z.data_ptr() != mean.data_ptr()
    assert torch.equal(z, mean.expand(3, 4))
    assert torch.equal(kl, layer(mean, logvar)[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(mean.bfloat16(), logvar.bfloat16(), deterministic=True)[0].dtype == torch.float32
