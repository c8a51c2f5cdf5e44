"""Prefect's command line with a worker that outlives its server: ``python -m infra.patient worker start ...``.

Prefect's worker gives up, and ends its flow runs, once its server was away for about twenty minutes; what watches for
a cancelled run gives up after three failed looks (half a minute). Both are the same loop, which ends after so many
failures in a row. Here a look that finds no server is no failure: the loop says so once and looks again.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import flows  # noqa: F401 - before prefect: it fills in the local services' addresses, which Prefect reads when imported

# isort: split
import httpx
import prefect._internal.observers
import prefect.workers.base
from prefect.utilities.services import critical_service_loop

Look = Callable[..., Awaitable[Any]]


def patient(look: Look, say: Callable[[str], None]) -> Look:
    """``look`` without the errors of a server that is away or not well; says when it goes and when it is back."""
    name = getattr(look, "__name__", "look").strip("_").replace("_", " ")
    since: list[float] = []

    @functools.wraps(look)
    async def looked() -> Any:
        try:
            found = await look()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            if not since:
                since.append(time.monotonic())
                say(f"{name}: the Prefect server is away ({error!r}); flow runs go on, looking again until it is back")
            return None
        if since:
            say(f"{name}: the Prefect server is back after {time.monotonic() - since.pop():.0f} s")
        return found

    return looked


async def patient_loop(workload: Look, interval: float, **options: Any) -> None:
    """Prefect's loop around a patient look."""

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    await critical_service_loop(patient(workload, say), interval, **options)


def be_patient() -> None:
    """Put the patient loop where Prefect's worker and what watches its runs look for theirs."""
    for module in (prefect.workers.base, prefect._internal.observers):
        assert module.critical_service_loop is critical_service_loop, module  # another Prefect: look there again
        module.critical_service_loop = patient_loop


if __name__ == "__main__":
    from prefect.cli import app

    be_patient()
    app()
