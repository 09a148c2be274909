"""Messages into items: whatever is in them, nothing is raised."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.items import Items
from shared.broker.port import Message
from shared.cancels import Cancelled, encode
from shared.models import ModelSpec, Padding, TensorSpec
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


def test_a_request_whose_client_hung_up_is_refused():
    """On arrival, so that it costs no device; others are as before."""
    items = Items()
    items.cancelled.note(encode([Cancelled("gone", 2_000_000)]), 1_000_000)
    for id_, refused in (("gone", True), ("1", False)):
        fact = items.take(Delivery(correlation_id=id_), MODEL, 1, SPEC, now=10.0, wall=1000.0)
        assert (fact.fault is not None, fact.unanswerable) == (refused, None)


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


def asked(length: int, *, other: int | None = None, **parameters: int) -> Delivery:
    """A request for a padded model."""
    x, y = np.zeros((1, length, 2), "f4"), np.zeros((1, other or length), "f4")
    inputs = (from_numpy("x", x), from_numpy("y", y))
    body, size = encode_request(InferRequest(inputs=inputs, parameters=parameters))
    return Delivery(body=body, headers={HEADER_LENGTH: size})


PADDED = ModelSpec(
    inputs=(TensorSpec("x", "FP32", (-1, 2)), TensorSpec("y", "FP32", (-1,))),
    max_batch_size=4,
    padding=Padding(inputs={"x": 0, "y": 0}, sizes=(8, 16)),
)


def test_requests_of_any_length_are_of_one_kind_where_that_is_padded():
    """The length stands beside the kind."""
    short, long = take(asked(3), PADDED).item, take(asked(12), PADDED).item
    assert short.kind == long.kind == (("x", "FP32", (-1, 2)), ("y", "FP32", (-1,)))
    assert (short.length, long.length) == (3, 12)


def test_inputs_of_different_lengths_are_the_asker_s_fault():
    """Where the model declares them to be of one."""
    fault = take(asked(3, other=4), PADDED).fault
    assert fault is not None
    assert fault.code == "invalid_argument"
    assert "one length" in fault.message


def level(default: int = 0, message: int | None = None, **parameters: int) -> int:
    spec = ModelSpec(inputs=PADDED.inputs, max_batch_size=4, default_priority_level=default)
    delivery = asked(3, **parameters)
    delivery.message = msgspec.structs.replace(delivery.message, priority=message)
    return take(delivery, spec).item.priority


def test_the_protocol_s_priority_counts_from_the_model_s_ordinary_one():
    """1 is the most urgent; 0 and nothing are the ordinary one, 5 where the model does not say."""
    assert (level(), level(priority=0), level(message=0)) == (0, 0, 0)
    assert (level(priority=1), level(priority=5), level(priority=9)) == (4, 0, -4)
    assert (level(2, priority=1), level(2, priority=2), level(2, priority=3)) == (1, 0, -1)
    assert level(priority=2**40) == -9


def test_amqp_s_priority_is_the_same_upside_down():
    """9 is the most urgent, all above too; what stands in the request counts before it."""
    assert [level(message=p) for p in (1, 5, 9, 255)] == [-4, 0, 4, 4]
    assert level(message=9, priority=9) == -4


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
