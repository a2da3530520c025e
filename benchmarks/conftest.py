"""`pytest benchmarks` times every case in full; with --benchmark-disable it executes each once, at small sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # holds under every import mode

from cases import QUICK, Setting


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-threads", type=int, default=2, help="threads of every contestant (default 2)")


def pytest_configure(config: pytest.Config) -> None:
    if "bench_*.py" not in config.getini("python_files"):
        config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, where that is installed")


@pytest.fixture(scope="session")
def bench_setting(request: pytest.FixtureRequest) -> Setting:
    option = request.config.getoption
    if option("benchmark_disable") and not option("benchmark_enable"):
        return QUICK
    return Setting(threads=option("--bench-threads"))


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--bench-threads"))
    yield
    torch.set_num_threads(before)
