"""Ports for servers that a test starts a moment later, while another worker opens connections.

A port that the kernel chooses (port 0) may go to a neighbour's client between its choice and its
use. These ports lie outside the range from which the kernel serves clients.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(number: int) -> list[int]:
    """Choose so many different ports of 127.0.0.1 at random; none of them is in use."""
    first, last = map(int, _CLIENTS.read_text().split()) if _CLIENTS.exists() else (32768, 60999)
    allowed = range(10_000, 65_536)
    candidates = [port for port in allowed if not first <= port <= last] or list(allowed)
    random.SystemRandom().shuffle(candidates)  # a test's seed must not fix them
    ports: list[int] = []
    while len(ports) < number:
        port = candidates.pop()
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    return ports
