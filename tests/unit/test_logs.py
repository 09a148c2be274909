import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from shared import config, logs
from shared.logs import configure


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    quiet = {name: logging.getLogger(name).level for name in logs._QUIET}
    yield
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    root.handlers[:], root.level = before
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_json_line_with_its_origin() -> None:
    """A line says what happened, when, at which level, in which service and process."""
    stream = io.StringIO()
    logs.configure("gateway", "json", stream=stream)
    structlog.get_logger("any").info("model_loaded", model="bert/1", seconds=0.5)
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "model_loaded",
        "level": "info",
        "service": "gateway",
        "pid": os.getpid(),
        "model": "bert/1",
        "seconds": 0.5,
    }


def test_standard_library_comes_out_in_the_same_form() -> None:
    """What a driver logs is a JSON line too, with its logger's name."""
    stream = io.StringIO()
    logs.configure("worker", "json", stream=stream)
    logging.getLogger("some.driver").warning("lost %s", "it")
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["service"]) == ("lost it", "some.driver", "worker")


def test_python_warnings_are_logged() -> None:
    """A warning does not break the stream of JSON lines."""
    stream = io.StringIO()
    logs.configure("worker", "json", stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old", UserWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    assert lines(stream)[0]["logger"] == "py.warnings"


def test_bound_fields_are_on_every_line_inside() -> None:
    """Request id and model are bound once for all lines of a request, the drivers' too."""
    stream = io.StringIO()
    logs.configure("gateway", "json", stream=stream)
    with logs.bound(request_id="r1"):
        structlog.get_logger().warning("inside")
        logging.getLogger("driver").warning("inside")
    structlog.get_logger().warning("outside")
    assert [line.get("request_id") for line in lines(stream)] == ["r1", "r1", None]


def test_level_holds_for_both() -> None:
    """Lines below the level are not written, and chatty drivers need a warning to be heard."""
    stream = io.StringIO()
    logs.configure("gateway", "json", "info", stream=stream)
    structlog.get_logger().debug("no")
    logging.getLogger("x").debug("no")
    logging.getLogger("aio_pika.connection").info("no")
    logging.getLogger("aio_pika.connection").warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_exception_stays_on_one_line() -> None:
    """A traceback is a field of its line, not forty lines."""
    stream = io.StringIO()
    logs.configure("gateway", "json", stream=stream)
    try:
        {}["gone"]
    except KeyError:
        structlog.get_logger().exception("failed")
    (line,) = lines(stream)
    assert "KeyError: 'gone'" in line["exception"]


@pytest.mark.parametrize("value", ["\ud800", object(), {1: "x"}, b"\xff", float("nan")])
def test_no_value_makes_a_log_call_fail(value: object) -> None:
    """Whatever a client sent can be logged, as one line of JSON."""
    stream = io.StringIO()
    logs.configure("gateway", "json", stream=stream)
    structlog.get_logger().info("odd", value=value)
    (line,) = lines(stream)
    assert line["event"] == "odd"


def test_text_from_clients_cannot_forge_lines() -> None:
    """A line break inside a value is escaped."""
    stream = io.StringIO()
    logs.configure("gateway", "json", stream=stream)
    structlog.get_logger().info("refused", name='x"}\n{"event": "forged"}')
    assert [line["event"] for line in lines(stream)] == ["refused"]


def test_people_get_columns_without_local_variables() -> None:
    """The console form has no JSON, and its tracebacks show no values."""
    stream = io.StringIO()
    logs.configure("gateway", "console", stream=stream)
    url = "amqp://u:s3cret@h"
    try:
        int(url.split(":", maxsplit=1)[0])
    except ValueError:
        structlog.get_logger().exception("failed", model="m")
    text = stream.getvalue()
    assert "failed" in text
    assert "model=m" in text
    assert "s3cret" not in text


def test_auto_is_json_away_from_a_terminal() -> None:
    """`auto` decides by what the stream is."""
    stream = io.StringIO()
    logs.configure("gateway", "auto", stream=stream)
    structlog.get_logger().info("x")
    assert lines(stream)


SECRET = "s3cr3t-of-31337"


class Tensor:
    """Whose words would tell what is in it."""

    def __repr__(self) -> str:
        return f"Tensor({SECRET})"


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize(
    "fields",
    [
        {"data": SECRET.encode()},
        {"data": memoryview(SECRET.encode())},
        {"request": Tensor()},
        {"list": [Tensor(), {"x": [SECRET.encode()]}]},
        {"deep": [[[[[SECRET]]]]]},
        {"url": f"amqp://user:{SECRET}@host/"},
        {"url": f"got amqp://user:{SECRET}/@@host/ from"},
        {"url": f"https://host/x?region=a&api_key={SECRET}&x=1"},
        {"password": SECRET},
        {"headers": {"authorization": f"Bearer {SECRET}"}},
        {"error": f"refused: Bearer {SECRET}"},
        {"error": "a key roost_0123456789ab_" + "0123456789abcdef" * 4},
        {"error": ValueError(f"amqp://user:{SECRET}@host/")},
    ],
)
def test_lines_carry_no_secrets_and_no_tensors(
    form: Literal["json", "console"], fields: dict[str, object]
) -> None:
    """Whoever logs them, and however deep they are."""
    stream = io.StringIO()
    configure("test", form, stream=stream)
    structlog.get_logger().info("happened", **fields)
    assert "happened" in stream.getvalue()
    assert SECRET not in stream.getvalue()
    assert "0123456789abcdef" * 4 not in stream.getvalue()


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_password_of_ours_is_found_wherever_it_is_quoted(
    form: Literal["json", "console"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a driver's own words, and in a traceback."""
    monkeypatch.setattr(config, "secrets", set())
    environ = {"ROOST_AMQP_URL": f"amqp://user:{SECRET}@host/"}
    config.load(config.CommonConfig, "X", environ)
    monkeypatch.setattr(logs, "secrets", config.secrets)
    stream = io.StringIO()
    configure("test", form, stream=stream)
    logging.getLogger("driver").warning("login of %r was refused", SECRET)
    try:
        int(f"user={SECRET}")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "was refused" in stream.getvalue()
    assert "ValueError" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_long_values_are_cut() -> None:
    """Each says how long it was."""
    stream = io.StringIO()
    configure("test", "json", stream=stream)
    structlog.get_logger().info("happened", text="x" * 100_000, many=list(range(10_000)))
    assert len(stream.getvalue()) < 5_000
    assert "100000 characters" in stream.getvalue()
