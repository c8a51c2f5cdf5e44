"""How a cost grows: the exponent of the power law that measured points follow, and how well they follow it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fit_exponent(x: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Exponent b of ``seconds`` ~ a * x ** b (least squares of the logarithms) and the fit's R squared.

    ``seconds`` may be any positive cost, such as bytes. 1 is linear, 0 flat; a constant part beside the growing one
    lowers the exponent, so ``x`` should span a factor of eight or more. A cost that does not vary has R squared 1.

    Raises:
        ValueError: fewer than two different sizes, or a size or cost that is not positive.
    """
    sizes, costs = np.asarray(x, np.float64), np.asarray(seconds, np.float64)
    if sizes.shape != costs.shape or len(np.unique(sizes)) < 2 or min(sizes.min(), costs.min()) <= 0:
        raise ValueError(f"sizes {list(x)} and costs {list(seconds)}: need two or more different positive sizes")
    across, up = np.log(sizes), np.log(costs)
    slope, offset = np.polyfit(across, up, 1)
    rest, spread = float(np.sum((up - slope * across - offset) ** 2)), float(np.sum((up - up.mean()) ** 2))
    return float(slope), 1.0 if spread < 1e-12 else 1 - rest / spread
