"""A private RabbitMQ node (3.10 to 4.3), isolated from any other on the machine.

Isolation is by environment: its own HOME (the Erlang cookie), its own epmd on its own port (so
node names cannot clash), its own data, logs, plugins and configuration. Only options that
every version from 3.10 to 4.3 knows are set.
"""

from __future__ import annotations

import base64
import http.client
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Final
from urllib.parse import quote

from roost.local import Binaries, find_binaries
from roost.local.ports import LOOPBACK, free_ports
from roost.local.process import OwnedProcess, ServiceFailed, tail
from shared.tls import ServerTls

START_TIMEOUT_S: Final = 90.0
_ATTEMPTS: Final = 3
_AMQP_HEADER: Final = b"AMQP\x00\x00\x09\x01"
_METHOD_FRAME: Final = 1
_USER: Final = "guest"

# An idle Erlang VM spins on every core to answer faster; on a small machine that is taken from
# the services under test. The distribution port must not listen beyond the loopback either.
_ERLANG_FLAGS: Final = (
    "+S {cores}:{cores} +sbwt none +sbwtdcpu none +sbwtdio none "
    "-kernel inet_dist_use_interface {{127,0,0,1}}"
)


class RabbitNode:
    """One broker. After `stop()` or `kill()` it can be started again on the same data and
    ports; confirmed persistent messages are then still there."""

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        port: int = 0,
        *,
        management: bool = True,
        tls: ServerTls | None = None,
    ) -> None:
        """`port` 0: a free one, chosen at the first start and kept. `management`: with the
        HTTP API and the Prometheus endpoint (some 50 MB and two seconds more). `tls`: on
        `tls_port`, and on `management_tls_port`, beside the plain ones."""
        self.data_dir = Path(data_dir).absolute()
        self.port = port
        self.management = management
        self.management_port = 0
        self.prometheus_port = 0
        self.tls = tls
        self.tls_port = 0
        self.management_tls_port = 0
        self._port_is_known = port != 0
        self._dist_port = 0
        self._epmd_port = 0
        self._epmd: OwnedProcess | None = None
        self._broker: OwnedProcess | None = None

    @property
    def amqp_url(self) -> str:
        return self.vhost_url("/")

    @property
    def management_url(self) -> str:
        """With the user's name and password in it; empty without management."""
        if not self.management:
            return ""
        return f"http://{_USER}:{_USER}@{LOOPBACK}:{self.management_port}"

    @property
    def prometheus_url(self) -> str:
        return f"http://{LOOPBACK}:{self.prometheus_port}"

    @property
    def running(self) -> bool:
        return self._broker is not None and self._broker.returncode is None

    @property
    def pid(self) -> int | None:
        return self._broker.pid if self._broker is not None else None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Starts it and waits until it speaks AMQP (and HTTP, with management). Raises
        `MissingService`, or `ServiceFailed` with the end of its log."""
        if self.running:
            return
        binaries = find_binaries()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._start_once(binaries, timeout_s)
                self._port_is_known = True
                return
            except ServiceFailed as error:
                self.kill()
                # Somebody else may have taken a port between its choice and its use.
                taken = "eaddrinuse" in str(error).lower()
                # The caller's own port, or one that clients know by now, must stay.
                if not taken or self._port_is_known or attempt == _ATTEMPTS:
                    raise
                self.port = self._epmd_port = 0
            except BaseException:
                self.kill()
                raise

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ends it in order, then its epmd. Idempotent."""
        if self._broker is not None:
            self._broker.stop(timeout_s)
            self._broker = None
        self._stop_epmd()

    def kill(self) -> None:
        """As a crash would (SIGKILL). Idempotent."""
        if self._broker is not None:
            self._broker.kill()
            self._broker = None
        self._stop_epmd()

    def pause(self) -> None:
        """Suspends it: connections stay, nobody answers."""
        if self._broker is not None:
            self._broker.signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._broker is not None:
            self._broker.signal(signal.SIGCONT)

    def ctl(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Runs `rabbitmqctl` on this node and returns what it printed. Raises `ServiceFailed`."""
        binaries = find_binaries()
        done = subprocess.run(
            [binaries.rabbitmqctl, *arguments],
            env=self._env(binaries),
            cwd=self.data_dir,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0:
            raise ServiceFailed(f"rabbitmqctl {' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout

    # --- the management API ---------------------------------------------------------------

    def vhost_url(self, vhost: str) -> str:
        """The AMQP URL of a virtual host."""
        return f"amqp://{_USER}:{_USER}@{LOOPBACK}:{self.port}/{quote(vhost, safe='')}"

    def create_vhost(self, vhost: str) -> str:
        """Makes a virtual host and returns its AMQP URL."""
        name = quote(vhost, safe="")
        self.api("PUT", f"/api/vhosts/{name}")
        everything = b'{"configure":".*","write":".*","read":".*"}'
        self.api("PUT", f"/api/permissions/{name}/{_USER}", everything)
        return self.vhost_url(vhost)

    def delete_vhost(self, vhost: str) -> None:
        """Removes it with all its queues; connections to it are closed by the broker."""
        self.api("DELETE", f"/api/vhosts/{quote(vhost, safe='')}")

    def api(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One call of the management API; raises `ServiceFailed` unless it answers 2xx."""
        connection = http.client.HTTPConnection(LOOPBACK, self.management_port, timeout=30)
        token = base64.b64encode(f"{_USER}:{_USER}".encode()).decode()
        headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if not 200 <= response.status < 300:
            raise ServiceFailed(f"{method} {path}: {response.status} {answer[:300]!r}")
        return answer

    # --- how it is started ----------------------------------------------------------------

    def _start_once(self, binaries: Binaries, timeout_s: float) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._choose_ports()
        self._write_configuration()
        env = self._env(binaries)
        # The node would start an epmd of its own and leave it behind as a daemon; it uses one
        # that already listens, and this one is ours to end.
        self._epmd = OwnedProcess(
            "epmd",
            [binaries.epmd, "-port", str(self._epmd_port), "-address", LOOPBACK],
            env=env,
            cwd=self.data_dir,
            output=self.data_dir / "epmd.log",
        )
        output = self.data_dir / "output.log"
        logs = (output, self.data_dir / "log" / "rabbit.log")
        for log in logs:  # an error must show what this start wrote, not an earlier one
            log.unlink(missing_ok=True)
        try:
            self._epmd.wait_ready(lambda: _listens(self._epmd_port), timeout_s)
            self._broker = OwnedProcess(
                "rabbitmq-server",
                [binaries.rabbitmq_server],
                env=env,
                cwd=self.data_dir,
                output=output,
            )
            self._broker.wait_ready(self._answers, timeout_s)
        except ServiceFailed as error:
            raise ServiceFailed(f"{error}\n{tail(self.data_dir / 'epmd.log', *logs)}") from None

    def _choose_ports(self) -> None:
        if self._epmd_port:
            return
        ports = free_ports(7)
        amqp, self.management_port, self.prometheus_port, self._dist_port, self._epmd_port = ports[
            :5
        ]
        self.tls_port, self.management_tls_port = ports[5:]
        self.port = self.port or amqp

    def _write_configuration(self) -> None:
        (self.data_dir / "log").mkdir(exist_ok=True)
        lines = [
            f"listeners.tcp.1 = {LOOPBACK}:{self.port}",
            "disk_free_limit.absolute = 50MB",
            "vm_memory_high_watermark.absolute = 1GB",
            "log.file = rabbit.log",
            "log.file.level = info",
            "log.console = false",
        ]
        plugins = ""
        if self.management:
            plugins = "rabbitmq_management,rabbitmq_prometheus"
            lines += [
                f"management.tcp.ip = {LOOPBACK}",
                f"management.tcp.port = {self.management_port}",
                f"prometheus.tcp.ip = {LOOPBACK}",
                f"prometheus.tcp.port = {self.prometheus_port}",
            ]
        if self.tls is not None:
            lines += [f"listeners.ssl.1 = {LOOPBACK}:{self.tls_port}", *_tls("", self.tls)]
        if self.tls is not None and self.management:
            lines += [
                f"management.ssl.ip = {LOOPBACK}",
                f"management.ssl.port = {self.management_tls_port}",
                *_tls("management.", self.tls),
            ]
        (self.data_dir / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (self.data_dir / "enabled_plugins").write_text(f"[{plugins}].\n")

    def _env(self, binaries: Binaries) -> dict[str, str]:
        """The environment of everything that is to do with this node."""
        home = str(self.data_dir)
        folders = [str(Path(binaries.epmd).parent), "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RABBITMQ_", "ERL_", "ELIXIR_", "NOTIFY_SOCKET"))
        }
        return {
            **inherited,
            "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")]),
            "HOME": home,
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "RABBITMQ_NODENAME": "roost@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": f"{home}/data",
            "RABBITMQ_LOG_BASE": f"{home}/log",
            # 3.10 wants the name without its ending; later versions take both.
            "RABBITMQ_CONFIG_FILE": f"{home}/rabbitmq",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{home}/advanced",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{home}/enabled_plugins",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_PID_FILE": f"{home}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _ERLANG_FLAGS.format(
                cores=min(4, os.cpu_count() or 1)
            ),
            # Makes the script exec the Erlang VM instead of waiting for it in a shell: our
            # child is then the broker itself, and gets our signals at first hand.
            "RUNNING_UNDER_SYSTEMD": "1",
        }

    def _answers(self) -> bool:
        """Whether it speaks AMQP: the port opens earlier than that."""
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=2.0) as connection:
                connection.sendall(_AMQP_HEADER)
                first = connection.recv(1)
            if first != bytes([_METHOD_FRAME]):
                return False
            if self.management:
                self.api("GET", "/api/vhosts")
        except (OSError, http.client.HTTPException, ServiceFailed):
            return False
        return True

    def _stop_epmd(self) -> None:
        if self._epmd is not None:
            self._epmd.stop(5.0)
            self._epmd = None


def _tls(section: str, tls: ServerTls) -> list[str]:
    """Lines of rabbitmq.conf."""
    name = f"{section}ssl" if section else "ssl_options"
    lines = [
        f"{name}.certfile = {tls.cert_file}",
        f"{name}.keyfile = {tls.key_file or tls.cert_file}",
    ]
    if tls.client_ca_file:
        lines += [
            f"{name}.cacertfile = {tls.client_ca_file}",
            f"{name}.verify = verify_peer",
            f"{name}.fail_if_no_peer_cert = true",
        ]
    return lines


def _listens(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=2.0).close()
    except OSError:
        return False
    return True
