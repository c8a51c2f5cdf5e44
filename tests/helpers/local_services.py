"""How a test talks to services that ``make up`` started in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient

from wav.local import read_env


def variables(environment: dict[str, str]) -> dict[str, str]:
    """Addresses and generated keys of the services of an environment's WAV_LOCAL_DIR."""
    folder = Path(environment["WAV_LOCAL_DIR"])
    return read_env(folder / "env") | read_env(folder / "credentials.env")


def prefect_client(environment: dict[str, str]) -> SyncPrefectClient:
    """A client of its Prefect server."""
    found = variables(environment)
    return SyncPrefectClient(found["PREFECT_API_URL"], auth_string=found["PREFECT_API_AUTH_STRING"])
