"""The CUDA kernels without a GPU: their source compiled as plain C++, a grid's threads run as host threads.

tests/cuda_host/cuda_on_host.h stands in for the device. The binary compares kernels with plain loops under sanitizers;
the library is the CUDA operators as they are, for tensors on the CPU, and is compared with the reference here.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import ancestral_cases
import pytest
import torch
from genfuse.reference import recurrent as reference
from genfuse.reference.masked_conv import ancestral as ancestral_reference
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / "tests" / "cuda_host"
SOURCES = ROOT / "csrc"
FLAGS = [
    *("-std=c++20", "-O1", "-pthread", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DGENFUSE_CUDA_ON_HOST", "-DGENFUSE_PERSISTENT_THREADS=64"),
]

TORCH = "libtorch_cpu.so"  # loaded already, with the process; naming it makes its symbols visible to the library

compiler = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler is None or not SOURCES.is_dir(), reason="needs g++ and the sources"),
]

SEED = torch.tensor([0x1234_5678_9ABC_DEF, 2**40 + 7])
ALL = {"zoneout_h": 0.3, "zoneout_c": 0.4, "weight_drop": 0.3, "input_dropout": 0.2, "output_dropout": 0.25}


def build(output: Path, *arguments: str | Path) -> Path:
    command = [str(compiler), *FLAGS, f"-I{SOURCES}", f"-I{HARNESS}", *map(str, arguments), "-o", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    return output


def passes(binary: Path, *arguments: str) -> None:
    run = subprocess.run([str(binary), *arguments], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_in_lockstep_under_address_sanitizer(tmp_path: Path) -> None:
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    passes(build(tmp_path / "lockstep", *sanitizers, HARNESS / "test_recurrent.cpp"))


def test_as_threads_under_thread_sanitizer(tmp_path: Path) -> None:
    passes(
        build(tmp_path / "threads", "-fsanitize=thread", "-DGENFUSE_HOST_THREADS", HARNESS / "test_recurrent.cpp"),
        "quick",
    )


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch_root = Path(torch.__file__).parent
    arguments = ["-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", torch_root / "include"]
    files = [HARNESS / "operators.cpp", *sorted(SOURCES.glob("*/*_cuda_ops.cpp"))]
    library = build(tmp_path_factory.mktemp("cuda") / "operators.so", *arguments, *files, torch_root / "lib" / TORCH)
    torch.ops.load_library(library)
    return torch.ops.genfuse_cuda_host


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator) * scale


def _near(found: Tensor, exact: Tensor, name: str, tolerance: float) -> None:
    assert found.shape == exact.shape, name
    exact = exact.detach().double()
    error = float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    assert error <= tolerance, f"{name}: relative error {error:.3g}"


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True, "bias": False},
    "all": {"training": True, "resets": True, **ALL},
    "all reverse": {"training": True, "resets": True, "reverse": True, **ALL},
    "eval": {"zoneout_h": 0.3, "zoneout_c": 0.2},
    "no steps": {"steps": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_operators_match_the_reference(operators: Any, cell: str, case: str, dtype: torch.dtype) -> None:
    options = {**dict.fromkeys(ALL, 0.0), "training": False, "reverse": False, **CASES[case]}
    generator = torch.Generator().manual_seed(5)
    steps, batch, inputs, hidden = options.pop("steps", 3), 9, 4, 7
    gates, lstm = (4, True) if cell == "lstm" else (3, False)
    resets = torch.rand(steps, batch, generator=generator) < 0.3 if options.pop("resets", False) else None
    bias = options.pop("bias", True)
    # A strided x, as batch_first gives it.
    x = _normal(generator, batch, steps, inputs).transpose(0, 1)
    states = [_normal(generator, batch, hidden) for _ in range(1 + lstm)]
    weights = [_normal(generator, gates * hidden, size, scale=0.4) for size in (inputs, hidden)]
    biases = [_normal(generator, gates * hidden, scale=0.3) if bias else None for _ in range(2)]
    given = [None if t is None else t.to(dtype) for t in (x, *states, *weights, *biases)]
    if not lstm:
        options.pop("zoneout_c")
    exact_inputs = [None if t is None else t.double().requires_grad_() for t in given]
    exact = getattr(reference, cell)(*exact_inputs, resets=resets, rng=SEED, **options)
    grads = [torch.randn(t.shape, generator=generator).to(dtype) for t in exact]
    wanted = [t for t in exact_inputs if t is not None]
    exact_grads = torch.autograd.grad(
        exact, wanted, [g.double() for g in grads], allow_unused=True, materialize_grads=True
    )

    names = ["zoneout_h", *(["zoneout_c"] if lstm else []), "weight_drop", "input_dropout", "output_dropout"]
    numbers = [options[name] for name in names] + ([1e-5] if lstm else []) + [options["training"], options["reverse"]]
    head = [*given, *([None] * 5 if lstm else []), None, resets, SEED]
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2
    found = getattr(operators, cell)(*head, *numbers, True)
    for ours, theirs, name in zip(found, exact, ("y", "h_n", "c_n"), strict=False):
        _near(ours, theirs, name, tolerance)
    bare = getattr(operators, cell)(*head, *numbers, False)
    assert all(torch.equal(a, b) for a, b in zip(bare[: len(exact)], found, strict=False))
    assert all(t.numel() == 0 for t in bare[len(exact) :])

    reserves = [found[0], *found[len(exact) :]]
    found_grads = getattr(operators, f"{cell}_backward")(*grads, *head, *reserves, *numbers, True, True)
    index = [0, 1, 2, 3, 4, 5, 5] if lstm else [0, 1, 2, 3, 4, 5]
    present = [found_grads[i] for i, tensor in zip(index, given, strict=True) if tensor is not None]
    for number, (ours, theirs) in enumerate(zip(present, exact_grads, strict=True)):
        assert ours.dtype == dtype
        _near(ours, theirs, f"gradient {number}", 4 * tolerance)


@pytest.mark.parametrize("kind", ["lstm", "norm", "gru"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_generate_matches_the_reference(operators: Any, kind: str, bf16: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    vocab, embed, sizes, batch, length, gates = 23, 5, (6, 8), 3, 6, 3 if kind == "gru" else 4
    embedding, head = _normal(generator, vocab, embed), _normal(generator, vocab, sizes[-1])
    bias = _normal(generator, vocab, scale=0.3)
    layers, inputs = [], embed
    for size in sizes:
        layer = [_normal(generator, gates * size, n, scale=0.6) for n in (inputs, size)]
        layer += [_normal(generator, gates * size, scale=0.3) for _ in range(2)]
        if kind == "norm":
            layer += [_normal(generator, n) for n in (4 * size, 4 * size, size, size)]
        layers.append(layer)
        inputs = size
    prompt = torch.randint(0, vocab, (batch, 3), generator=generator)
    h0, c0 = (_normal(generator, batch, sum(sizes), scale=0.5) for _ in range(2))
    flat = [tensor for layer in layers for tensor in layer]
    parts = list(zip(h0.split(sizes, 1), c0.split(sizes, 1), strict=True))
    weight_dtype = torch.bfloat16 if bf16 else None
    for temperature, top_k, top_p, with_u in ((0.8, 5, 0.9, True), (1.0, None, None, False), (0.0, None, None, False)):
        u = torch.rand(batch, length, generator=generator) if with_u else None
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "u": u}
        sampling |= {"rng": None if with_u else SEED, "weight_dtype": weight_dtype}
        numbers = (u, None if with_u else SEED, temperature, top_k or 0, 1.0 if top_p is None else top_p)
        call = (prompt, length, embedding, flat, head, bias, h0)
        if kind == "gru":
            exact = reference.gru_generate(
                prompt, length, embedding, layers, head, bias, state=[h for h, _ in parts], zoneout_h=0.1, **sampling
            )
            tokens, log_probs, h_n = operators.gru_generate(*call, *numbers, 0.1, bf16)
            wanted = torch.cat(exact[2], 1)
        else:
            zone = {"zoneout_h": 0.1, "zoneout_c": 0.2}
            exact = reference.lstm_generate(
                prompt, length, embedding, layers, head, bias, state=parts, **zone, **sampling
            )
            tokens, log_probs, h_n, c_n = operators.lstm_generate(
                *call, c0, *numbers, kind == "norm", 1e-5, 0.1, 0.2, bf16
            )
            wanted = torch.cat([h for h, _ in exact[2]], 1)
            _near(c_n, torch.cat([c for _, c in exact[2]], 1), "c_n", 1e-5)
        assert torch.equal(tokens, exact[0])
        _near(log_probs + 1.0, exact[1] + 1.0, "log_probs", 1e-5)
        _near(h_n, wanted, "h_n", 1e-5)


@pytest.mark.parametrize("head", ["level_inner", "level_outer", "bernoulli", "mixture"])
def test_ancestral_sample_matches_the_reference(operators: Any, head: str) -> None:
    for seed in range(3):
        batch = (1, 4, 5)[seed % 3]  # more images than the device has multiprocessors, too
        program = ancestral_cases.any_program(seed, batch, torch.float32, head=head)
        call, u = program.encode(), ancestral_cases.uniforms(program, batch, seed, torch.float32)
        levels, outputs = operators.ancestral_sample(program.tensors, u, None, *call, True)
        exact = ancestral_reference.ancestral_sample(
            [tensor.double() for tensor in program.tensors], u.double(), levels, *call, True
        )
        assert torch.equal(exact[0], levels)
        _near(outputs, exact[1], f"outputs of program {seed}", 2e-5)
        drawn = ancestral_reference.ancestral_sample(program.tensors, u, None, *call, False)[0]
        assert torch.equal(levels, drawn), f"program {seed}"
        kept = torch.where(torch.rand(levels.shape) < 0.5, levels, -1)
        again, nothing = operators.ancestral_sample(program.tensors, u, kept, *call, False)
        assert torch.equal(again, levels)
        assert nothing.numel() == 0
    lost = [torch.full_like(tensor, float("nan")) for tensor in program.tensors]
    assert operators.ancestral_sample(lost, u, None, *call, False)[0].eq(-1).all()


def test_refusals(operators: Any) -> None:
    zeros = torch.zeros
    call: list[Any] = [zeros(2, 3, 4), zeros(3, 5), zeros(3, 5), zeros(20, 4), zeros(20, 5), *[None] * 10]
    numbers = [0.0] * 5 + [1e-5, False, False, False]
    operators.lstm(*call, *numbers)
    for index, value, message in (
        (0, zeros(2, 3, 4).double(), "float32 and bfloat16"),
        (0, zeros(6, 4), "3 dimensions"),
        (1, zeros(2, 5), "h0 must have shape"),
        (4, zeros(20, 6), r"weight_hh must have shape \[20, 5\], got \[20, 6\]"),
        (7, zeros(2, 5), "no projection"),
        (8, zeros(20), "no layer norm"),
        (12, torch.tensor([3, 3]), "no packed sequences"),
        (13, zeros(2, 2, dtype=torch.bool), "resets must have shape"),
    ):
        wrong = list(call)
        wrong[index] = value
        with pytest.raises(RuntimeError, match=message):
            operators.lstm(*wrong, *numbers)
    with pytest.raises(RuntimeError, match="rng must be given"):
        operators.lstm(*call, 0.5, *numbers[1:6], True, False, False)
    n = 600
    large = [zeros(1, 1, 1), zeros(1, n), zeros(1, n), zeros(4 * n, 1), zeros(4 * n, n), *[None] * 10]
    with pytest.raises(RuntimeError, match="do not fit"):
        operators.lstm(*large, *numbers)
    assert operators.persistent_objection(0, 7, 9, 4, 4) == 0
    assert operators.persistent_objection(0, 600, 1, 4, 4) == 2


def test_schemas_are_those_of_the_library(operators: Any) -> None:
    import genfuse.ops  # noqa: F401  defines torch.ops.genfuse

    names = ("lstm", "lstm_backward", "gru", "gru_backward", "lstm_generate", "gru_generate", "ancestral_sample")
    for name in names:
        ours, theirs = (str(getattr(space, name).default._schema) for space in (operators, torch.ops.genfuse))
        assert ours.split("::")[1] == theirs.split("::")[1]
