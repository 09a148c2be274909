"""Jobs over HTTP."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.callers import asking
from services.gateway.core.admission import Admission
from services.gateway.core.jobkeys import parse_key
from services.gateway.core.jobs import Ended, Job, job_of, path_of, view
from services.gateway.httpinfer import HttpAsked, HttpInference
from services.gateway.jobs.jobs import Jobs
from services.gateway.sending import HeldResponse
from services.gateway.table import Row
from shared.errors import InvalidRequest
from shared.names import HEADER_IDEMPOTENCY_KEY

_encode: Final = msgspec.json.Encoder().encode


class HttpJobs:
    """Handlers for the router. Each raises `RoostError`."""

    def __init__(self, http: HttpInference, jobs: Jobs, admission: Admission) -> None:
        self._http = http
        self._jobs = jobs
        self._admission = admission

    def table(self) -> list[Row]:
        model, job = "/v2/models/{model}", path_of("{job}")
        return [
            ("POST", f"{model}/jobs", "infer", self.submit),
            ("POST", f"{model}/versions/{{version}}/jobs", "infer", self.submit),
            ("GET", job, "infer", self.status),
            ("DELETE", job, "infer", self.remove),
            ("GET", f"{job}/result", "infer", self.result),
        ]

    async def submit(self, request: Request) -> Response:
        parameters = request.path_params
        keys = request.headers.getlist(HEADER_IDEMPOTENCY_KEY)
        if len(keys) > 1:
            raise InvalidRequest("there is more than one Idempotency-Key")
        key = parse_key(keys[0]) if keys else ""
        asked = HttpAsked(
            self._http,
            parameters["model"],
            parameters.get("version"),
            _headers(request),
            request.receive,
            "",  # nothing is asked yet: each turn has an id of its own
        )
        job = await self._jobs.submit(asked, key)
        return self._told(job, 202, {"location": path_of(job_of(job).id)})

    async def status(self, request: Request) -> Response:
        return self._told(await self._jobs.find(*self._whose(request)))

    async def result(self, request: Request) -> Response:
        replied = await self._jobs.result(*self._whose(request))
        answer = await self._http.answered(replied, _headers(request))
        return HeldResponse(answer, self._admission)

    async def remove(self, request: Request) -> Response:
        await self._jobs.remove(*self._whose(request))
        return Response(status_code=204)

    def _whose(self, request: Request) -> tuple[str, str | None]:
        caller = asking()
        everybodys = caller.admin and not caller.confined
        return request.path_params["job"], None if everybodys else caller.tenant

    def _told(
        self, what: Job | Ended, status: int = 200, headers: dict[str, str] | None = None
    ) -> Response:
        body = _encode(view(what, keep_s=self._jobs.keep_s))
        return Response(body, status, headers, media_type="application/json")


def _headers(request: Request) -> dict[bytes, bytes]:
    headers: dict[bytes, Any] = dict(request.scope["headers"])
    return headers
