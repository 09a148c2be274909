"""Who has an `Idempotency-Key`: of all that come with one, one gets it (ADR 0028).

Laws: a job with a key has its turn and its answer only while, or after, its key has led to it; of
several that were stored for the same key at the same moment that is one. A key is free when its job
was removed, or has been kept for long enough. Synchronous, for threads; may raise `Unavailable`.
"""

from __future__ import annotations

from services.gateway.core.jobkeys import Claim
from services.gateway.core.jobs import is_over
from services.gateway.jobs.clock import now_ms
from services.gateway.jobs.files import JobFiles
from shared.errors import Unavailable


class JobKeys:
    def __init__(self, files: JobFiles, keep_s: float) -> None:
        self._files = files
        self._keep_s = keep_s

    def holder(self, name: str) -> Claim | None:
        """Who has the key."""
        held = self._files.key(name)
        if held is None:
            return None
        found = self._files.find(held.id)
        if found is not None and not is_over(found, now_ms(), self._keep_s):
            return held
        if not self._files.free(name, held.id):
            raise Unavailable("the last job of this key is about to be removed", retry_after_s=1)
        return None

    def claim(self, name: str, mine: Claim) -> Claim:
        """Who has the key from now on: `mine`, unless somebody else came first."""
        held = self._files.key(name)
        if held is not None and held.id == mine.id:
            return held
        for _ in range(3):
            held = self.holder(name)
            if held is not None:
                return held
            if self._files.claim(name, mine):
                return mine
        raise Unavailable("jobs with this key come and go", retry_after_s=1)
