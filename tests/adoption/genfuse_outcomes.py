"""A pytest plugin: run with libraries patched or not, every test with a seed of its own, and write down what came out.

``pytest -p genfuse_outcomes --outcomes FILE [--patch NAME ...]`` writes JSON: the outcome of every test, the number of
calls that genfuse served, by library, and those that it handed back.
"""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import genfuse
import numpy as np
import pytest
import torch

_results: dict[str, str] = {}
_reports: dict[str, Any] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", required=True, help="file to write the outcomes to")
    parser.addoption("--patch", action="append", default=[], help="library to patch")


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--patch"):
        _reports[name] = genfuse.patch(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    seed = zlib.crc32(item.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from it
    random.seed(seed)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _results[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    calls = {name: report.calls for name, report in _reports.items()}
    written = {
        "outcomes": _results,
        "served": {name: found.total for name, found in calls.items()},
        "handed_back": {
            f"{function}: {reason}": count
            for found in calls.values()
            for (function, reason), count in found.handed_back.items()
        },
    }
    Path(session.config.getoption("--outcomes")).write_text(json.dumps(written, indent=1), encoding="utf-8")
