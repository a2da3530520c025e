"""genfuse._C: kernels for arrays that are not torch's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from genfuse import _C
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor

STEPS, BATCH, INPUT, HIDDEN = 5, 3, 7, 17

Arrays = dict[str, npt.NDArray[np.floating]]


def lstm_arrays(dtype: torch.dtype, projection: int = 0) -> Arrays:
    """The arguments of a layer, its weights by torch's initialisation."""
    layer = torch.nn.LSTM(INPUT, HIDDEN, proj_size=projection, dtype=dtype)
    arrays = {
        "x": torch.randn(STEPS, BATCH, INPUT, dtype=dtype),
        "h0": torch.randn(BATCH, projection or HIDDEN, dtype=dtype),
        "c0": torch.randn(BATCH, HIDDEN, dtype=dtype),
        **{name.removesuffix("_l0"): parameter.detach() for name, parameter in layer.named_parameters()},
    }
    return {name: tensor.numpy() for name, tensor in arrays.items()}


def expected(arrays: Arrays, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """torch's results, after a change of every argument."""
    x, h, c, *weights = (change(torch.from_numpy(array)) for array in arrays.values())
    y, h, c = torch.lstm(x, (h[None], c[None]), weights, True, 1, 0.0, False, False, False)
    return [y, h[0], c[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("projection", [0, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_torch(dtype: torch.dtype, projection: int, threads: int) -> None:
    arrays = lstm_arrays(dtype, projection)
    results = [torch.from_numpy(result) for result in _C.lstm_forward(**arrays, threads=threads)]
    eager = eager_runs(lambda nudge: expected(arrays, nudge))
    exact = expected(arrays, Tensor.double)
    for name, ours, theirs, truth in zip(("y", "h", "c"), results, eager, exact, strict=True):
        assert_as_accurate(ours, theirs, truth, name)


def test_equals_the_operator_to_the_bit() -> None:
    """The same kernel behind both doors, for everything that the array entry point takes."""
    arrays = lstm_arrays(torch.float32)
    rng = np.random.default_rng(0)
    shapes = {"ln_ih_weight": 4 * HIDDEN, "ln_hh_weight": 4 * HIDDEN, "ln_c_weight": HIDDEN, "ln_c_bias": HIDDEN}
    arrays |= {name: rng.standard_normal(size).astype(np.float32) for name, size in shapes.items()}
    resets = rng.random((STEPS, BATCH)) < 0.3
    options = {"eps": 1e-3, "zoneout_h": 0.2, "zoneout_c": 0.4, "reverse": True}
    results = _C.lstm_forward(**arrays, resets=resets, **options)
    from genfuse import ops

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    wanted = ops.lstm(**tensors, resets=torch.from_numpy(resets), **options)
    for result, tensor in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(result, tensor.numpy())


def test_strided_and_dlpack_input() -> None:
    arrays = lstm_arrays(torch.float32)
    wanted = _C.lstm_forward(**arrays)[0]
    batch_first = arrays | {"x": np.ascontiguousarray(arrays["x"].swapaxes(0, 1)).swapaxes(0, 1)}
    backwards = arrays | {"x": arrays["x"][::-1, :, ::-1].copy()[::-1, :, ::-1]}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for variant in (batch_first, backwards, tensors):
        np.testing.assert_array_equal(_C.lstm_forward(**variant)[0], wanted)


@pytest.mark.parametrize(("steps", "batch"), [(0, 2), (3, 0), (0, 0)])
def test_empty(steps: int, batch: int) -> None:
    arrays = lstm_arrays(torch.float32)
    arrays |= {"x": arrays["x"][:steps, :batch], "h0": arrays["h0"][:batch], "c0": arrays["c0"][:batch]}
    y, h, c = _C.lstm_forward(**arrays)
    assert y.shape == (steps, batch, HIDDEN)
    if steps == 0:
        np.testing.assert_array_equal(h, arrays["h0"])
        np.testing.assert_array_equal(c, arrays["c0"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((5, 7), np.float32)}, ValueError, r"x must have shape \(T, B, I\), got \(5, 7\)"),
        ({"x": np.zeros((5, 3, 7), np.int64)}, TypeError, "x must be an array of float32 or float64, got int64"),
        ({"x": None}, TypeError, "x must be an array"),
        ({"h0": np.zeros((3, 16), np.float32)}, ValueError, r"h0 must have shape \(3, 17\), got \(3, 16\)"),
        ({"c0": np.zeros(3, np.float32)}, ValueError, r"c0 must have shape \(B, H\)"),
        ({"weight_hh": np.zeros((68, 17))}, TypeError, "weight_hh must have the dtype of x, float32, got float64"),
        ({"weight_hr": np.zeros((4, 17), np.float32)}, ValueError, "weight_h. must have shape"),
        ({"bias_ih": np.zeros(17, np.float32)}, ValueError, r"bias_ih must have shape \(68,\), got \(17,\)"),
        ({"ln_ih_weight": np.zeros(68, np.float32)}, ValueError, "given together"),
        ({"resets": np.zeros((5, 3))}, TypeError, "resets must be an array of bool"),
        ({"resets": np.zeros((3, 5), bool)}, ValueError, r"resets must have shape \(5, 3\), got \(3, 5\)"),
        ({"zoneout_h": 1.5}, ValueError, "zoneout must be a probability"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"x": torch.zeros(5, 3, 7, requires_grad=True)}, TypeError, "x must be a NumPy array or speak DLPack"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arrays = lstm_arrays(torch.float32)
    with pytest.raises(error, match=message):
        _C.lstm_forward(**{**arrays, **changes})


def test_nan_goes_through() -> None:
    arrays = lstm_arrays(torch.float32)
    arrays["x"][2, 1, 0] = np.nan
    y = _C.lstm_forward(**arrays)[0]
    assert np.isnan(y[2:, 1]).all()
    assert not np.isnan(y[:2]).any()
    assert not np.isnan(y[:, [0, 2]]).any()


def test_needs_no_torch() -> None:
    code = """
import sys
import numpy as np
from genfuse import _C
x, h, w_ih, w_hh = (np.ones(shape, np.float32) for shape in [(5, 2, 3), (2, 4), (16, 3), (16, 4)])
y, _, _ = _C.lstm_forward(x, h, h, w_ih, w_hh)
print(y.shape, "torch" in sys.modules)
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert output.strip() == "(5, 2, 4) False"
