"""Free ports for servers of a test's own."""

from __future__ import annotations

import socket

from wav.local.ports import GRPC_OFFSET, HOST, PORTS, is_free


def find_free() -> dict[str, str]:
    """Variables that put every service on a port that is free now."""
    found: dict[str, str] = {}
    for name, (variable, _) in PORTS.items():
        while True:
            with socket.socket() as probe:
                probe.bind((HOST, 0))
                port = probe.getsockname()[1]
            port = port if name == "prefect" else 20000 + port % 12000
            if str(port) not in found.values() and is_free(port) and is_free(port + GRPC_OFFSET * (name != "prefect")):
                break
        found[variable] = str(port)
    return found
