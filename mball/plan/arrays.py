"""Arrays, by what is in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def prefix_sums(values: Sequence[float]) -> Floats:
    """Returns the sums of the first 0, 1, … of `values`."""
    return np.concatenate(([0.0], np.cumsum(np.asarray(values, dtype=np.float64))))
