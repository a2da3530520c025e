"""Random numbers by address on a GPU: those of the CPU. Skipped where there is none."""

from __future__ import annotations

import genfuse
import pytest
import torch
from genfuse import ops

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

NOISES = ("bits", "uniform", "normal", "gumbel", "logistic")


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_equals_the_cpu(noise: str, backend: str) -> None:
    draw = getattr(ops, f"philox_{noise}")
    with genfuse.use_backend(backend):
        found = draw((1001, 3), 2**63 + 5, -6, device="cuda").cpu()
    wanted = draw((1001, 3), 2**63 + 5, -6)
    if noise in ("bits", "uniform"):
        assert torch.equal(found, wanted)
    else:
        # Each is within 4 ulp of the exact number (docs/random.md).
        error = (found.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1.0)
        assert float(error.max()) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_uniforms_equal_the_cpu(dtype: torch.dtype) -> None:
    with genfuse.use_backend("triton"):
        found = ops.philox_uniform(5001, 3, dtype=dtype, device="cuda").cpu()
    assert torch.equal(found, ops.philox_uniform(5001, 3, dtype=dtype))


def test_more_than_2_to_the_31_elements() -> None:
    count = 2**31 + 1001
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip("not enough memory")
    with genfuse.use_backend("triton"):
        found = ops.philox_uniform(count, 3, dtype=torch.bfloat16, device="cuda")
    assert 0.49 < float(found[-1000:].float().mean()) < 0.53
    assert float(found.max()) < 1
