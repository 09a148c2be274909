"""When a job's result is asked for again."""

from __future__ import annotations

from typing import Final

from shared.errors import JobNotDone, RoostError, Unavailable

_LOOK_S: Final = 1.0
"""Where a gateway does not say when to come back."""
_PATIENCE_S: Final = 60.0
"""How long no gateway may answer: jobs outlive restarts, so who waits for one does too."""


class Wait:
    """One wait for one job. Times are of one monotonic clock, in seconds."""

    def __init__(self, wait_s: float | None, now: float) -> None:
        """`wait_s` None: until the job has ended."""
        self._until = None if wait_s is None else now + wait_s
        self._told_at: float | None = None
        """When a gateway last said that the job has not ended."""

    def pause_s(self, error: RoostError, now: float) -> float:
        """After this answer. Raises it when it is the job's, or the time is over."""
        if isinstance(error, JobNotDone):
            self._told_at = now
        elif not self._passing(error, now):
            raise error
        pause_s = _LOOK_S if error.retry_after_s is None else error.retry_after_s
        if self._until is None:
            return pause_s
        if now >= self._until:
            raise error
        return min(pause_s, self._until - now)

    def _passing(self, error: RoostError, now: float) -> bool:
        """Whether a gateway, not the job, is in trouble, and not for long yet."""
        told_at = self._told_at
        return (
            isinstance(error, Unavailable) and told_at is not None and now - told_at < _PATIENCE_S
        )
