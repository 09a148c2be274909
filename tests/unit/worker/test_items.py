"""Messages into items: whatever is in them, nothing is raised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.items import Items
from shared.broker.port import Message
from shared.models import ModelSpec, TensorSpec
from shared.names import HEADER_DEADLINE, HEADER_LENGTH, ModelId
from shared.tensors import from_numpy
from shared.v2 import InferRequest, encode_request

MODEL = ModelId("m/1")
SPEC = ModelSpec(inputs=(TensorSpec("x", "FP32", (2,)),), max_batch_size=4)
BODY, LENGTH = encode_request(InferRequest(inputs=(from_numpy("x", np.zeros((3, 2), "f4")),)))


class Delivery:
    """What the broker hands over."""

    queue, routing_key, redelivered = "q", "m", False

    def __init__(self, malformed: str | None = None, **fields) -> None:
        self.malformed = malformed
        whole = {
            "body": BODY,
            "headers": {HEADER_LENGTH: LENGTH},
            "reply_to": "roost.reply.t",
            "correlation_id": "1",
        }
        self.message = Message(**(whole | fields))


def take(delivery: Delivery, spec: ModelSpec = SPEC, *, now: float = 10.0, wall: float = 1000.0):
    return Items().take(delivery, MODEL, 1, spec, now=now, wall=wall)


def test_a_request_is_read():
    """Its rows, its bytes, and what it may share a batch with."""
    fact = take(Delivery())
    assert (fact.fault, fact.unanswerable) == (None, None)
    assert (fact.item.rows, fact.item.nbytes) == (3, len(BODY))
    assert fact.item.kind == (("x", "FP32", (2,)),)
    assert fact.item.deadline is None


def test_deadlines_become_our_clock_s():
    """The header's Unix time and the request's own time-out: the sooner counts."""
    header = {HEADER_LENGTH: LENGTH, HEADER_DEADLINE: 1_002_000}
    assert take(Delivery(headers=header)).item.deadline == pytest.approx(12.0)
    body, length = encode_request(
        InferRequest(
            inputs=(from_numpy("x", np.zeros((1, 2), "f4")),), parameters={"timeout": 500_000}
        )
    )
    both = Delivery(body=body, headers=header | {HEADER_LENGTH: length})
    assert take(both).item.deadline == pytest.approx(10.5)


def test_what_expired_on_its_way_is_not_run():
    """It is answered with the reason."""
    fact = take(Delivery(headers={HEADER_LENGTH: LENGTH, HEADER_DEADLINE: 999_999}))
    assert fact.fault is not None
    assert fact.fault.code == "deadline_exceeded"


@pytest.mark.parametrize(
    ("delivery", "reason"),
    [
        (Delivery(malformed="not UTF-8"), "malformed properties: not UTF-8"),
        (Delivery(reply_to=None), "no reply_to"),
        (Delivery(reply_to="roost.dead"), "reply_to is not a reply queue"),
        (Delivery(correlation_id=None), "no correlation_id"),
    ],
)
def test_some_can_be_told_nothing(delivery, reason):
    """Those go to the dead letters with the reason."""
    assert take(delivery).unanswerable == reason


@given(
    body=st.binary(max_size=200),
    length=st.one_of(st.none(), st.integers(-5, 500), st.text(max_size=5), st.binary(max_size=5)),
    deadline=st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary()
    ),
)
def test_garbage_is_a_fault_and_never_an_exception(body, length, deadline):
    """Bodies and headers are whatever a producer likes."""
    headers = {HEADER_LENGTH: length, HEADER_DEADLINE: deadline}
    fact = take(Delivery(body=body, headers=headers))
    assert fact.fault is not None
    garbled = take(Delivery(headers=headers | {HEADER_LENGTH: LENGTH}))
    assert garbled.item.deadline is None or np.isfinite(garbled.item.deadline)
