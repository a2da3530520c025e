"""What a benchmark is: a case, with contestants that do the same work side by side.

A family's file `bench_<family>.py` defines `CASES`, a list of `Case`, and its pytest-benchmark tests come from there by
`benchmark_tests`; `report.py` reads the same list. So the README's table and `pytest benchmarks` time the same code.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


class UnavailableError(Exception):
    """A contestant cannot run here (an optional peer is not installed): it is skipped, and the reason is shown."""


@dataclass(frozen=True)
class Setting:
    """How to build a case's contestants.

    quick: small sizes and few steps, for a pass that only executes the code.
    exact: every contestant is given the same noise, so that results can be compared; without it each draws its own, by
        its fastest means, which is what is timed.
    backend: of torch.compile. `aot_eager` captures the graphs, forward and backward, and leaves out the minutes of C++
        compilation: enough for the pass that is not timed.
    threads: for contestants with a thread pool of their own; torch's is set by `torch.set_num_threads`.
    """

    quick: bool = False
    exact: bool = False
    backend: str = "inductor"
    threads: int = 2


QUICK = Setting(quick=True, backend="aot_eager")

Work = Callable[[], Any]
Factory = Callable[[], Work]


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    name: unique, file-name safe; also the pytest-benchmark group unless `group` is given.
    title: as printed.
    build: setting -> {contestant: factory}. A factory allocates what it needs and returns the work: a function of no
        arguments that returns its results (a tensor or a tuple of tensors, in the same order for every contestant).
    ours: the contestant that the others are compared with; None: no ratios (a list of absolute times).
    targets: peer -> the least speed-up (their time / ours) that the project promises.
    memory_targets: peer -> the most extra memory of ours, as a multiple of theirs. Peak extra memory is measured for
        every contestant where `memory` is set.
    parts: contestant -> of how many equal parts its work is one at full size, by which its time is multiplied: for a
        loop of minutes whose every step is the same. It is not compared then but under `exact`.
    bounds_us: contestant -> the most microseconds that one call may take.
    rtol: allowed difference between contestants, relative to the largest magnitude of each result; None: the
        contestants compute different things and are not compared.
    unchecked: contestants that are not compared (bfloat16 weights, say).
    random: results can be compared only under `exact`.
    """

    name: str
    title: str
    build: Callable[[Setting], Mapping[str, Factory]]
    ours: str | None = "genfuse"
    group: str | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    memory_targets: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    bounds_us: Mapping[str, float] = field(default_factory=dict)
    memory: bool = False
    rtol: float | None = 1e-4
    unchecked: Collection[str] = ()
    random: bool = False
    device: str = "cpu"

    def contestants(self) -> list[str]:
        return list(self.build(QUICK))

    def standard(self) -> str:
        """The contestant whose results the others are held against: the first that is not ours."""
        return next(name for name in self.contestants() if name != self.ours and name not in self.unchecked)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def tensors(result: Any) -> Iterator[torch.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        yield result.detach()
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors(part)


def assert_agree(result: Any, expected: Any, rtol: float, who: str) -> None:
    """Raise AssertionError where two contestants computed different things.

    This is a guard against timing the wrong work, not a test of accuracy: those have derived tolerances.
    """
    left, right = list(tensors(result)), list(tensors(expected))
    assert len(left) == len(right) > 0, f"{who}: {len(left)} results, expected {len(right)}"
    for k, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.shape == b.shape, f"{who}: result {k} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{who}: result {k} differs in {int((a != b).sum())} of {b.numel()} places"
            continue
        scale = float(b.abs().max()) if b.numel() else 0.0
        error = float((a - b).abs().max()) if b.numel() else 0.0
        assert error <= rtol * scale + 1e-30, f"{who}: result {k} is off by {error:.3g}, largest value {scale:.3g}"


def families() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def load(family: str) -> list[Case]:
    cases: list[Case] = importlib.import_module(f"bench_{family}").CASES
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"bench_{family}.CASES: names are not unique")
    return cases


def benchmark_tests(cases: list[Case]) -> tuple[Callable[..., None], Callable[..., None]]:
    """(test_speed, test_agree) for a family's file.

    test_speed times every contestant, in full size (quick size under --benchmark-disable); test_agree holds each
    contestant's results, at quick size and with the same noise, against those of the first peer.
    """
    import pytest

    @functools.cache
    def work(case: int, contestant: str, setting: Setting) -> Work:
        torch.manual_seed(0)
        return cases[case].build(setting)[contestant]()

    def get(case: int, contestant: str, setting: Setting) -> Work:
        try:
            return work(case, contestant, setting)
        except UnavailableError as e:
            pytest.skip(str(e))

    each = [
        pytest.param(k, name, id=f"{case.name}-{name}") for k, case in enumerate(cases) for name in case.contestants()
    ]

    @pytest.mark.timeout(3600)  # a compiled loop may take minutes before its first round
    @pytest.mark.parametrize(("case", "contestant"), each)
    def test_speed(case: int, contestant: str, benchmark: Any, bench_setting: Setting) -> None:
        benchmark.group = cases[case].group or cases[case].name
        benchmark.name = contestant
        function = get(case, contestant, bench_setting)
        if not bench_setting.quick:
            function()  # compile, pack, page in: not part of any round
            work.cache_clear()  # full-size inputs of one contestant must not stay while the next is timed

        def timed() -> None:
            function()
            synchronize(cases[case].device)

        benchmark(timed)

    checked = [p for p in each if cases[p.values[0]].rtol and p.values[1] not in cases[p.values[0]].unchecked]

    @pytest.mark.parametrize(("case", "contestant"), checked)
    def test_agree(case: int, contestant: str) -> None:
        setting = Setting(quick=True, exact=True, backend="aot_eager")
        standard = cases[case].standard()
        rtol = cases[case].rtol
        assert rtol is not None
        assert_agree(get(case, contestant, setting)(), get(case, standard, setting)(), rtol, contestant)

    return test_speed, test_agree
