"""When keys are asked for, and who a caller is by the key it presents."""

from __future__ import annotations

import asyncio

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.config import GatewayConfig
from services.placer.config import PlacerConfig
from services.worker.config import WorkerConfig
from shared.auth import (
    ANYBODY,
    BELIEVED_S,
    LOOK_AGAIN_S,
    Gate,
    challenge,
    gate_of,
    is_loopback,
)
from shared.config import ConfigError, load
from shared.errors import (
    InvalidRequest,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from shared.keys import Keys, new_key
from shared.storage import open_storage

SETTING = "ROOST_X_AUTH"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Away(Keys):
    """A registry that can be away, and counts looks."""

    def __init__(self, storage) -> None:
        super().__init__(storage)
        self.away = False
        self.looks = 0

    def look(self):
        self.looks += 1
        if self.away:
            raise Unavailable("the repository cannot be used")
        return super().look()


@pytest.fixture
def keys(tmp_path):
    return Away(open_storage(str(tmp_path / "repository")))


def made(keys, *arguments, **options) -> bytes:
    key, token = new_key(*arguments, **options)
    keys.add(key)
    return f"Bearer {token}".encode()


async def started(keys, mode="auto", host="127.0.0.1", clock=None, **options) -> Gate:
    clock = clock or Clock()
    gate = Gate(keys, mode, host, setting=SETTING, clock=clock, **options)
    await gate.start()
    return gate


@pytest.mark.parametrize(
    ("host", "loops"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("192.168.1.4", False),
        ("no-such-host.invalid", False),
        ("unix:/run/roost.sock", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(host, loops):
    """What cannot be told is taken for a network."""
    assert is_loopback(host) is loops


async def test_loopback_is_open_until_there_is_a_key(keys):
    """And from then on it is not, within one look, whatever is revoked."""
    gate = await started(keys)
    assert await gate.caller(None, "admin") is ANYBODY
    bearer = made(keys, "", ("admin",))
    gate.look()
    with pytest.raises(Unauthenticated):
        await gate.caller(None, "read")
    assert (await gate.caller(bearer, "admin")).admin
    keys.revoke(bearer.split(b"_")[1].decode())
    gate.look()
    for presented in (None, bearer):
        with pytest.raises(Unauthenticated):
            await gate.caller(presented, "read")


async def test_revoking_all_keys_does_not_open_a_service_that_starts_afterwards(keys):
    """What is left of them says that keys were wanted."""
    keys.revoke(made(keys).split(b"_")[1].decode())
    gate = await started(keys)
    with pytest.raises(Unauthenticated):
        await gate.caller(None, "read")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", ""])
async def test_beyond_loopback_nothing_starts_without_a_key(keys, host):
    """One line says what to do about it; a key, or `off`, or `required` is enough."""
    with pytest.raises(ConfigError, match=r"roost key create.*ROOST_X_AUTH=off") as caught:
        await started(keys, host=host)
    assert "\n" not in str(caught.value)
    assert await (await started(keys, "off", host)).caller(None, "admin") is ANYBODY
    with pytest.raises(Unauthenticated):
        await (await started(keys, "required", host)).caller(None, "read")
    made(keys)
    with pytest.raises(Unauthenticated):
        await (await started(keys, host=host)).caller(None, "read")


@pytest.mark.parametrize(
    ("cls", "service"),
    [(GatewayConfig, "GATEWAY"), (PlacerConfig, "PLACER"), (WorkerConfig, "WORKER")],
)
async def test_each_service_s_gate_follows_settings_of_its_own(keys, cls, service):
    """The one line names the variable that this service reads."""

    def of(**settings):
        environ = {f"ROOST_{service}_{name}": value for name, value in settings.items()}
        config = load(cls, service, environ)
        return gate_of(keys, config, service, "0.0.0.0"), config.metrics_need

    gate, need = of()
    assert need == "metrics"
    with pytest.raises(ConfigError, match=f"set ROOST_{service}_AUTH=off"):
        await gate.start()
    gate, need = of(AUTH="required", METRICS_OPEN="true")
    assert need == "open"
    with structlog.testing.capture_logs() as lines:
        await gate.start()
    assert [line["event"] for line in lines] == ["keys_without_tls"]
    assert gate.required
    gate, _ = of(AUTH="off")
    with structlog.testing.capture_logs() as lines:
        await gate.start()
    assert [line["setting"] for line in lines] == [f"ROOST_{service}_AUTH"]
    assert not gate.required


async def test_required_asks_on_loopback_before_there_is_a_key(keys):
    """Then nobody gets in."""
    gate = await started(keys, "required")
    with pytest.raises(Unauthenticated):
        await gate.caller(None, "read")


async def test_a_registry_that_is_away_at_the_start_lets_nobody_in(keys):
    """Not on loopback either: nobody knows whether there are keys."""
    keys.away = True
    gate = await started(keys)
    with pytest.raises(Unauthenticated):
        await gate.caller(None, "read")
    with pytest.raises(Unavailable):
        await gate.caller(made(keys), "infer")
    keys.away = False
    gate.look()
    with pytest.raises(Unauthenticated):
        await gate.caller(None, "infer")


async def test_known_keys_are_believed_for_a_while_without_the_registry(keys):
    """Unknown ones may be right: 503, not 401. After the while so are all."""
    clock = Clock()
    bearer = made(keys)
    gate = await started(keys, clock=clock)
    keys.away = True
    clock.now += BELIEVED_S - 1
    later = made(keys)
    assert (await gate.caller(bearer, "infer")).key
    with pytest.raises(Unavailable) as caught:
        await gate.caller(later, "infer")
    assert caught.value.retry_after_s == 1
    clock.now += 2
    with pytest.raises(Unavailable):
        await gate.caller(bearer, "infer")
    keys.away = False
    gate.look()
    assert (await gate.caller(bearer, "infer")).key
    assert (await gate.caller(later, "infer")).key


async def test_a_new_key_works_at_once_and_guessing_costs_few_looks(keys):
    """An unknown key is looked for, but not again and again."""
    clock = Clock()
    made(keys)
    gate = await started(keys, clock=clock)
    clock.now += LOOK_AGAIN_S
    assert (await gate.caller(made(keys), "infer")).key
    clock.now += LOOK_AGAIN_S
    before = keys.looks
    guesses = [f"Bearer {new_key()[1]}".encode() for _ in range(50)]
    results = await asyncio.gather(
        *(gate.caller(guess, "infer") for guess in guesses), return_exceptions=True
    )
    assert all(isinstance(result, Unauthenticated) for result in results)
    assert keys.looks == before + 1


async def test_only_the_whole_secret_of_the_right_key_counts(keys):
    """Neither another key's, nor a part, nor more."""
    one, other = made(keys), made(keys)
    gate = await started(keys)
    head, _, secret = one.rpartition(b"_")
    wrong = [
        head + b"_" + other.rpartition(b"_")[2],
        head + b"_" + secret[:-1],
        head + b"_" + secret + b"0",
        head + b"_",
        head,
        b"Bearer",
        b"",
        b"Basic " + one.split(b" ")[1],
        one.split(b" ")[1],
        one + b" " + one,
        b"Bearer \xff\xfe_\xff_\xff",
    ]
    for presented in wrong:
        with pytest.raises(Unauthenticated):
            await gate.caller(presented, "infer")
    assert await gate.caller(one.replace(b"Bearer", b"bearer"), "infer")


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (("infer",), {"open", "read", "infer"}),
        (("push",), {"open", "read", "push"}),
        (("metrics",), {"open", "metrics"}),
        (("infer", "push"), {"open", "read", "infer", "push"}),
        (("admin",), {"open", "read", "infer", "push", "metrics", "admin"}),
    ],
)
async def test_what_each_scope_allows(keys, scopes, allowed):
    """`admin` all; the others what they say."""
    bearer = made(keys, "", scopes)
    gate = await started(keys)
    for need in ("open", "read", "infer", "push", "metrics", "admin"):
        if need in allowed:
            assert await gate.caller(bearer, need)
        else:
            with pytest.raises(PermissionDenied, match="scope"):
                await gate.caller(bearer, need)


async def test_expired_and_revoked_keys_are_told_so(keys):
    """Only to who has the secret."""
    clock, wall = Clock(), Clock()
    bearer = made(keys, lifetime_s=10.0)
    expires = next(iter(keys.look().keys.values())).expires
    gate = await started(keys, clock=clock, wall=wall)
    wall.now = expires - 0.1
    caller = await gate.caller(bearer, "infer")
    assert (caller.tenant, caller.confined) == ("", False)
    wall.now = expires
    with pytest.raises(Unauthenticated, match="expired"):
        await gate.caller(bearer, "infer")
    with pytest.raises(Unauthenticated, match="not known"):
        await gate.caller(bearer[:-4] + b"0000", "infer")


async def test_a_tenants_key_confines_its_caller(keys):
    """To its models, and those of nobody."""
    gate_key = made(keys, "acme", ("infer", "push"))
    gate = await started(keys)
    caller = await gate.caller(gate_key, "push")
    assert (caller.tenant, caller.confined, caller.admin) == ("acme", True, False)


async def test_a_further_key_asks_for_none(keys):
    """By it `roost up` asks its own placer, whose other callers need none until there is one."""
    further, token = new_key(scopes=("admin",))
    gate = await started(keys, further=further)
    assert await gate.caller(None, "admin") is ANYBODY
    made(keys)
    gate.look()
    assert (await gate.caller(f"Bearer {token}".encode(), "admin")).key == further.id


@given(presented=st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: b"Bearer rk_" + b))
def test_whatever_is_presented_is_refused_in_the_same_words(presented, tmp_path_factory):
    """Nothing but a key gets in, and nothing breaks."""
    keys = Keys(open_storage(str(tmp_path_factory.getbasetemp() / "any")))
    gate = Gate(keys, "required", "127.0.0.1", setting=SETTING)
    gate.look()
    with pytest.raises(Unauthenticated) as caught:
        gate.check(presented, "read")
    assert caught.value.message in {
        "an API key is needed: Authorization: Bearer rk_...", "this API key is not known",
    }  # fmt: skip


def test_what_a_refused_caller_is_told():
    """As RFC 6750 has it."""
    assert challenge(Unauthenticated("x")) == 'Bearer realm="roost"'
    assert "insufficient_scope" in challenge(PermissionDenied("x"))
    assert challenge(InvalidRequest("x")) is None
