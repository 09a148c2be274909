"""A private Redis that keeps nothing: what Roost holds there can be rebuilt."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

from roost.local import find_binaries
from roost.local.ports import LOOPBACK, free_ports
from roost.local.process import OwnedProcess, ServiceFailed, tail
from shared.tls import ServerTls


class RedisNode:
    """One Redis server. After `stop()` or `kill()` it can be started again, empty, on the same
    port."""

    def __init__(
        self, data_dir: str | os.PathLike[str], port: int = 0, *, tls: ServerTls | None = None
    ) -> None:
        """`port` 0: a free one, chosen at the first start and kept. `tls`: on `tls_port`, beside
        the plain one."""
        self.data_dir = Path(data_dir).absolute()
        self.port = port
        self.tls = tls
        self.tls_port = 0
        self._process: OwnedProcess | None = None

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def start(self, timeout_s: float = 20.0) -> None:
        """Starts it and waits until it answers. Raises `ServiceFailed`, `MissingService`."""
        if self.running:
            return
        binary = find_binaries().redis_server
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_ports(1)[0]
        command = [
            binary, "--port", str(self.port), "--bind", LOOPBACK, "--dir", str(self.data_dir),
            "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction",
            "--daemonize", "no",
        ]  # fmt: skip
        if self.tls is not None:
            self.tls_port = self.tls_port or free_ports(1)[0]
            command += _tls(self.tls_port, self.tls)
        output = self.data_dir / "redis.log"
        self._process = OwnedProcess(
            "redis-server", command, env=os.environ, cwd=self.data_dir, output=output
        )
        try:
            self._process.wait_ready(self._answers, timeout_s)
        except BaseException as error:
            self.kill()
            if isinstance(error, ServiceFailed):
                raise ServiceFailed(f"{error}\n{tail(output)}") from None
            raise

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends it. Idempotent."""
        if self._process is not None:
            self._process.stop(timeout_s)
            self._process = None

    def kill(self) -> None:
        """As a crash would. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def pause(self) -> None:
        """Suspends it: connections stay, nobody answers."""
        if self._process is not None:
            self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._process is not None:
            self._process.signal(signal.SIGCONT)

    def flush(self) -> None:
        """Removes all content, as a restart would."""
        if not self._ask(b"FLUSHALL\r\n").startswith(b"+OK"):
            raise ServiceFailed("redis-server did not flush")

    def _answers(self) -> bool:
        try:
            return self._ask(b"PING\r\n").startswith(b"+PONG")
        except OSError:
            return False

    def _ask(self, command: bytes) -> bytes:
        with socket.create_connection((LOOPBACK, self.port), timeout=2.0) as connection:
            connection.sendall(command)
            return connection.recv(64)


def _tls(port: int, tls: ServerTls) -> list[str]:
    options = [
        "--tls-port", str(port),
        "--tls-cert-file", tls.cert_file,
        "--tls-key-file", tls.key_file or tls.cert_file,
        "--tls-auth-clients", "yes" if tls.client_ca_file else "no",
    ]  # fmt: skip
    return [*options, "--tls-ca-cert-file", tls.client_ca_file] if tls.client_ca_file else options
