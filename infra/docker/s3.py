"""The S3 server of compose: as ``make up`` starts it, but its ports are there for the network of the containers.

The S3 port asks for S3's keys, every other one for a certificate that lies in the volume (:mod:`wav.local.secrets`).
``python -m infra.docker.s3 ask`` asks it with the keys, beside a proxy: what compose and Kubernetes call its health.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from wav.local import bypass_proxies
from wav.local.ports import PORTS
from wav.local.secrets import weed_tls
from wav.local.services import HOST, s3_client, weed_command

FOLDER = Path("/data")


def ask() -> None:
    """An error of botocore where the server does not answer its keys; there may be no bucket yet."""
    bypass_proxies()
    s3_client(f"http://{HOST}:{PORTS['s3'][1]}", dict(os.environ)).list_buckets()


def main() -> None:
    """Become the server; the keys are in the environment."""
    command = weed_command(FOLDER, {name: port for name, (_, port) in PORTS.items()}, "0.0.0.0")
    os.execve(command[0], command, os.environ | weed_tls(FOLDER))


if __name__ == "__main__":
    ask() if sys.argv[1:] == ["ask"] else main()
