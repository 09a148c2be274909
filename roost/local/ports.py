"""Free ports on the loopback interface."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
_LOWEST = 10_240


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports that nobody listened on a moment ago.

    They lie below the range that the kernel gives to outgoing connections. A port inside that
    range can be taken by any client between this call and the server's own bind; worse, a
    client that keeps trying to reach a server that is down may be given the server's very port
    as its own, connect to itself, and so keep the server from ever coming back.
    """
    rng = random.SystemRandom()
    highest = _ephemeral_low() - 1
    ports: list[int] = []
    for _ in range(1000):
        if len(ports) == count:
            return ports
        port = rng.randint(_LOWEST, highest)
        if port not in ports and _is_free(port):
            ports.append(port)
    raise OSError(f"no {count} free ports between {_LOWEST} and {highest} on {LOOPBACK}")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of an earlier owner in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _ephemeral_low() -> int:
    """Where the kernel's range for outgoing connections begins; Linux's default elsewhere."""
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768
    # A range that begins very low leaves nothing below it: take what is above instead.
    return low if low > _LOWEST + 1000 else 32_768
