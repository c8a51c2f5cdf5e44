"""The one console script ``wav``: what it can do stands in :mod:`wav.commands`, one module per group.

``wav --help`` lists the groups in the order of use. Errors that are the input's fault are one line on stderr and exit
status 1; a command line that does not fit is status 2.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module

from wav.commands import app
from wav.errors import print_any_name

#: modules of wav.commands, in the order of use
GROUPS = ("begin", "data", "pipeline", "policy", "evaluation", "store")
for _name in GROUPS:
    import_module(f"wav.commands.{_name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    print_any_name()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(None if argv is None else list(argv), prog_name="wav")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
