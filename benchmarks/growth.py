"""Whether something grows: of samples taken at known cycles, by a rule that is said beforehand.

The first third is for warming up. The rest is cut into blocks of equal length, each block is told
by its median (so that one odd sample counts for nothing, and neighbours in time do not count as
independent), and the slope is Theil and Sen's: the median of the slopes between all pairs of
blocks, with Sen's 95 % confidence interval from the normal approximation of Kendall's statistic
(P. K. Sen, J. Am. Stat. Assoc. 63, 1968).

*Does not grow* is what must be shown, not assumed: the upper end of that interval has to lie below
the limit. A series that is too noisy to tell fails too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

BLOCKS: Final = 20
_WARM: Final = 1 / 3
_Z: Final = 1.959964
_PER: Final = 1000.0


class Slope(msgspec.Struct, frozen=True):
    """What a series did after warming up; slopes are per 1,000 cycles."""

    slope: float
    low: float
    high: float
    """The ends of the 95 % confidence interval."""
    first: float
    last: float
    """Medians of the first and the last block."""

    def grows(self, limit: float) -> bool:
        """Whether it cannot be shown that it grows by less than the limit per 1,000 cycles."""
        return not self.high < limit


def slope(cycles: Sequence[float], values: Sequence[float], blocks: int = BLOCKS) -> Slope:
    """Raises `ValueError` for fewer samples than twice the blocks, after the first third."""
    x, y = np.asarray(cycles, float), np.asarray(values, float)
    kept = x >= x[0] + (x[-1] - x[0]) * _WARM
    x, y = x[kept], y[kept]
    if len(x) < 2 * blocks:
        raise ValueError(f"{len(x)} samples after the first third, {2 * blocks} are needed")
    at = np.array([np.median(each) for each in np.array_split(x, blocks)])
    is_ = np.array([np.median(each) for each in np.array_split(y, blocks)])
    above, below = np.triu_indices(blocks, 1)
    slopes = np.sort((is_[below] - is_[above]) / (at[below] - at[above])) * _PER
    spread = _Z * math.sqrt(blocks * (blocks - 1) * (2 * blocks + 5) / 18)
    pairs = len(slopes)
    low = max(int((pairs - spread) / 2), 0)
    high = min(math.ceil((pairs + spread) / 2), pairs - 1)
    return Slope(
        float(np.median(slopes)),
        float(slopes[low]),
        float(slopes[high]),
        float(is_[0]),
        float(is_[-1]),
    )
