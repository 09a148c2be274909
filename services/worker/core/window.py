"""How many messages of one queue a worker may hold, where some hold several requests.

The broker counts messages, the worker wants about two batches of *requests*: more would hide the
backlog from the placer and let one worker hoard. So the window in messages follows the mean of
what came in each.
"""

from __future__ import annotations

from math import ceil
from typing import Final

_UNKNOWN: Final = 8
"""Messages at first, until it is known what they hold: enough to learn that in one go, and not
many windows too much if each is a full pack."""
_WEIGHT: Final = 1 / 8
"""Of the newest message in the mean."""
_WORTH: Final = 1.5
"""The window is changed when it is wrong by this factor: a change costs the broker three calls."""


class Window:
    """Of one subscription."""

    def __init__(self, requests: int, mean: float | None = None) -> None:
        """For so many requests. `mean` of requests in a message, if it is known from before."""
        self._requests = requests
        self._mean = mean
        self.messages = self._wanted() if mean else min(requests, _UNKNOWN)
        """That the broker was told."""
        self._packs = 0
        self._members = 0

    def __repr__(self) -> str:
        return f"Window({self.messages} messages of {self.mean:.3g} requests)"

    @property
    def mean(self) -> float:
        """Requests in a message; 1 as long as nothing is known."""
        return self._mean or 1.0

    def came(self, requests: int) -> None:
        """A message with so many requests."""
        known = self._mean
        self._mean = float(requests) if known is None else known + (requests - known) * _WEIGHT

    def opened(self, requests: int) -> None:
        """A pack of so many is held."""
        self._packs += 1
        self._members += requests

    def settled(self, last: bool) -> None:
        """A member of a pack; the last one takes the pack along."""
        self._members -= 1
        self._packs -= last

    def change(self) -> int | None:
        """The window to ask the broker for now; None when that it has will do."""
        if self._mean is None:
            return None
        wanted = self._wanted()
        if self.messages / _WORTH < wanted < self.messages * _WORTH:
            return None
        self.messages = wanted
        return wanted

    def full(self, held: int) -> bool:
        """With so many requests held, whether the broker may keep back messages."""
        return held - self._members + self._packs >= self.messages

    def _wanted(self) -> int:
        return max(ceil(self._requests / self.mean), min(self._requests, 2))
