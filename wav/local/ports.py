"""Ports of the local services: which, from where they are set, and who holds one that is taken."""

from __future__ import annotations

import os
import socket

import psutil

from wav.errors import ServiceError

HOST = "127.0.0.1"
GRPC_OFFSET = 10000  # SeaweedFS opens one gRPC port beside each of its HTTP ports

#: service -> (environment variable, default port)
PORTS = {
    "prefect": ("WAV_PREFECT_PORT", 4200),
    "s3": ("WAV_S3_PORT", 8333),
    "master": ("WAV_S3_MASTER_PORT", 9333),
    "volume": ("WAV_S3_VOLUME_PORT", 9340),
    "filer": ("WAV_S3_FILER_PORT", 8888),
    "admin": ("WAV_S3_ADMIN_PORT", 23646),
}


def from_environment() -> dict[str, int]:
    """Port of each service; ServiceError where a variable holds no usable one."""
    chosen = {}
    for name, (variable, default) in PORTS.items():
        text = os.environ.get(variable) or str(default)
        highest = 65535 if name == "prefect" else 65535 - GRPC_OFFSET
        if not text.isdigit() or not 1024 <= int(text) <= highest:
            raise ServiceError(f"{variable} = {text!r}: must be a port from 1024 to {highest}; set another or unset it")
        chosen[name] = int(text)
    return chosen


def is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of this machine now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """The process that listens on ``port``, as far as this user may see."""
    try:
        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    break
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return "another process"


def require_free(wanted: dict[str, int]) -> None:
    """Raise ServiceError for the first port that is taken: the port, its holder, the variable to change."""
    for name, port in wanted.items():
        if not is_free(port):
            variable = PORTS[name.removesuffix(" (gRPC)")][0]
            offset = f" plus {GRPC_OFFSET}" if name.endswith("(gRPC)") else ""
            raise ServiceError(
                f"port {port} ({variable}{offset}) is in use by {holder(port)}; "
                f"stop that process or set {variable} to a free port"
            )
