from typing import Annotated, Literal

import msgspec
import pytest

from shared.config import CommonConfig, ConfigError, describe, load, load_or_exit, redact


class GatewayLike(CommonConfig, frozen=True, kw_only=True):
    port: int = 8000
    linger_s: float = 0.0
    strict: bool = False
    mode: Literal["slow", "fast"] = "slow"
    budget_bytes: int | None = None
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    models: tuple[str, ...] = ()
    limits: dict[str, int] = msgspec.field(default_factory=dict)


class Needy(CommonConfig, frozen=True, kw_only=True):
    token: str


def read(**environ: str) -> GatewayLike:
    return load(GatewayLike, "GATEWAY", environ)


def test_defaults_stand_when_nothing_is_set() -> None:
    """An empty environment gives every default."""
    assert read() == GatewayLike()


def test_own_and_common_variables_are_read() -> None:
    """A field of the service has the service's prefix, a common one has not."""
    config = read(ROOST_GATEWAY_LINGER_S="0.25", ROOST_AMQP_URL="amqps://broker/")
    assert (config.linger_s, config.amqp_url) == (0.25, "amqps://broker/")


def test_values_get_the_type_of_their_field() -> None:
    """Numbers, booleans, choices, lists and JSON are told from text by the field's type."""
    config = read(
        ROOST_GATEWAY_PORT="0",
        ROOST_GATEWAY_STRICT="true",
        ROOST_GATEWAY_MODE="fast",
        ROOST_GATEWAY_BUDGET_BYTES="1024",
        ROOST_GATEWAY_MODELS="a, b,",
        ROOST_GATEWAY_LIMITS='{"a": 3}',
    )
    assert config == GatewayLike(
        port=0, strict=True, mode="fast", budget_bytes=1024, models=("a", "b"), limits={"a": 3}
    )


def test_empty_variable_is_not_set() -> None:
    """`ROOST_GATEWAY_PORT=` in an env file means the default."""
    assert read(ROOST_GATEWAY_PORT="").port == 8000


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ROOST_GATEWAY_PORT", "eighty"),
        ("ROOST_GATEWAY_MODE", "faster"),
        ("ROOST_GATEWAY_SHARE", "1.5"),
        ("ROOST_GATEWAY_LINGER_S", "nan"),
        ("ROOST_GATEWAY_LINGER_S", "inf"),
        ("ROOST_GATEWAY_LIMITS", "{'a': 3}"),
        ("ROOST_LOG_FORMAT", "xml"),
    ],
)
def test_wrong_value_names_its_variable(variable: str, value: str) -> None:
    """The error says which variable has which wrong value."""
    with pytest.raises(ConfigError, match=variable):
        load(GatewayLike, "GATEWAY", {variable: value})


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("ROOST_GATEWAY_LINGERS", "ROOST_GATEWAY_LINGER_S"),
        ("ROOST_AMPQ_URL", "ROOST_AMQP_URL"),
        ("ROOST_LINGER_S", "ROOST_GATEWAY_LINGER_S"),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest(variable: str, near: str) -> None:
    """A typing mistake is not ignored, and the error says what was probably meant."""
    with pytest.raises(ConfigError, match=f"{variable} is not a setting.* {near}"):
        load(GatewayLike, "GATEWAY", {variable: "1"})


def test_variables_of_others_are_left_alone() -> None:
    """One environment may serve several services and the command."""
    read(ROOST_WORKER_NONSENSE="1", ROOST_URL="http://x", ROOST_PLACER_URL="http://y", PATH="/bin")
    load(GatewayLike, "PLACER", {"ROOST_PLACER_URL": "http://y", "ROOST_GATEWAY_PORT": "x"})


def test_kubernetes_service_links_are_recognised() -> None:
    """What Kubernetes injects beside a Service `roost-gateway` is told from a mistake."""
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        read(ROOST_GATEWAY_PORT="tcp://10.0.0.7:8000")
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        read(ROOST_GATEWAY_SERVICE_HOST="10.0.0.7")


def test_overrides_win_and_must_exist() -> None:
    """Values given in code win over the environment; unknown ones are refused."""
    config = load(GatewayLike, "GATEWAY", {"ROOST_GATEWAY_PORT": "x"}, port=1)
    assert config.port == 1
    with pytest.raises(ConfigError, match="prot"):
        load(GatewayLike, "GATEWAY", {}, prot=1)


def test_required_field_must_be_set() -> None:
    """A field without a default is asked for by its variable's name."""
    with pytest.raises(ConfigError, match="ROOST_NEEDY_TOKEN is not set"):
        load(Needy, "NEEDY", {})


def test_a_program_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`load_or_exit` reads the process's environment, and a mistake costs no traceback."""
    monkeypatch.setenv("ROOST_GATEWAY_PROT", "1")
    with pytest.raises(SystemExit, match="2"):
        load_or_exit(GatewayLike, "GATEWAY")
    assert capsys.readouterr().err.count("\n") == 1


def test_passwords_are_not_shown() -> None:
    """Neither the description nor an error shows a URL's password."""
    config = GatewayLike(amqp_url="amqp://user:s3cret@broker:5672/x", redis_url="redis://:s3cret@h")
    assert "s3cret" not in str(describe(config))
    assert describe(config)["amqp_url"] == "amqp://user:***@broker:5672/x"
    assert redact("redis://127.0.0.1:6379/0") == "redis://127.0.0.1:6379/0"
    with pytest.raises(ConfigError) as caught:
        read(ROOST_GATEWAY_PORT="amqp://user:s3cret@broker/")
    assert "s3cret" not in str(caught.value)
