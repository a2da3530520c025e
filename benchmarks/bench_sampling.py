"""Random numbers by address, beside torch's: normals and uniforms into fresh and into given memory.

torch's generator is sequential, so `torch.randn` and `torch.rand` use one thread whatever is set; NumPy's PCG64 is the
usual alternative on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cases import Case, Factory, Setting, Work, benchmark_tests

TORCH = {"normals": torch.randn, "uniforms": torch.rand}


def forward(function: Callable[[], Any]) -> Work:
    def work() -> Any:
        with torch.no_grad():
            return function()

    return work


def noise(what: str, count: int, given: bool, setting: Setting) -> Mapping[str, Factory]:
    """`count` numbers; with `given`, into memory that stays."""
    if setting.quick:
        count = 1000

    def ours() -> Work:
        from genfuse import ops

        draw = ops.philox_normal if what == "normals" else ops.philox_uniform
        out = torch.empty(count) if given else None
        return forward(lambda: draw(count, 1, 2, out=out))

    def theirs() -> Work:
        draw: Any = TORCH[what]
        if not given:
            return forward(lambda: draw(count))
        out = torch.empty(count)
        return forward(lambda: draw(count, out=out))

    def compiled() -> Work:
        draw: Any = TORCH[what]
        one = torch.compile(lambda: draw(count), fullgraph=True, backend=setting.backend)
        return forward(one)

    def numpy() -> Work:
        import numpy as np

        generator = np.random.default_rng(0)
        draw = generator.standard_normal if what == "normals" else generator.random
        if not given:
            return lambda: torch.from_numpy(draw(count, dtype=np.float32))
        out = np.empty(count, dtype=np.float32)
        return lambda: torch.from_numpy(draw(dtype=np.float32, out=out))

    name = "torch.randn" if what == "normals" else "torch.rand"
    contestants: dict[str, Factory] = {"genfuse": ours, name + ("(out=)" if given else ""): theirs}
    if not given:
        contestants[f"torch.compile({name})"] = compiled
    contestants["NumPy"] = numpy
    return contestants


MILLION = 1_000_000

CASES: list[Case] = [
    *(
        Case(
            name=f"{what}-1m",
            title=f"1M {what}",
            build=functools.partial(noise, what, MILLION, False),
            targets={peer: 8.0},
            rtol=None,
        )
        for what, peer in (("normals", "torch.randn"), ("uniforms", "torch.rand"))
    ),
    Case(
        name="normals-16m-out",
        title="16M normals into a given tensor",
        build=functools.partial(noise, "normals", 16 * MILLION, True),
        targets={"torch.randn(out=)": 8.0},
        rtol=None,
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
