from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def build_info() -> dict[str, Any]: ...
def cpu_features() -> list[str]: ...
def isa() -> str: ...
def lstm_forward(
    x: Any,
    h0: Any,
    c0: Any,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any = None,
    bias_hh: Any = None,
    weight_hr: Any = None,
    *,
    ln_ih_weight: Any = None,
    ln_hh_weight: Any = None,
    ln_c_weight: Any = None,
    ln_c_bias: Any = None,
    eps: float = 1e-5,
    resets: Any = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    reverse: bool = False,
    threads: int = 1,
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating], npt.NDArray[np.floating]]: ...
def philox(
    shape: Sequence[int],
    seed: int,
    offset: int = 0,
    *,
    noise: str = "uniform",
    dtype: npt.DTypeLike | None = None,
    threads: int = 1,
) -> npt.NDArray[Any]: ...
