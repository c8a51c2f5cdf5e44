"""The S3 server of compose: as ``make up`` starts it, but its ports are there for the network of the containers.

The S3 port asks for S3's keys, every other one for a certificate that lies in the volume (:mod:`wav.local.secrets`).
"""

from __future__ import annotations

import os
from pathlib import Path

from wav.local.ports import PORTS
from wav.local.secrets import weed_tls
from wav.local.services import weed_command

FOLDER = Path("/data")


def main() -> None:
    """Become the server; the keys are in the environment."""
    command = weed_command(FOLDER, {name: port for name, (_, port) in PORTS.items()}, "0.0.0.0")
    os.execve(command[0], command, os.environ | weed_tls(FOLDER))


if __name__ == "__main__":
    main()
