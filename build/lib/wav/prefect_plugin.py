"""Prefect's plugin hook: the ``prefect`` command in the project folder finds the server that ``make up`` started.

Prefect calls :func:`setup_environment` at every ``import prefect`` where ``prefect.toml`` switches plugins on. The hook
looks at the command line and does nothing unless it is the ``prefect`` command. That gets the address and the
authentication string of the local server, unless the environment names another one. In ``prefect deployment run NAME``,
where Prefect itself wants FLOW/NAME, a bare name is completed that the folder's ``prefect.yaml`` defines (each
deployment here has the name of its flow). Whatever goes wrong, the command line stays as it was typed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from prefect.plugins import HookContext, SetupResult, register_hook

PREFECT_PLUGIN_API_REQUIRES = ">=0.1,<1"

#: options of the command line that take no value
_FLAGS = {"--watch", "--no-watch", "--help", "-h", "--prompt", "--no-prompt"}
_FLAGS |= {"--empty-param", "--empty-job-variable", "--empty-tag"}


def is_prefect(argv: Sequence[str]) -> bool:
    """Whether ``argv`` is a ``prefect`` command line, the program first."""
    return bool(argv) and (Path(argv[0]).name == "prefect" or Path(argv[0]).parts[-2:] == ("prefect", "__main__.py"))


def name_place(argv: Sequence[str]) -> int | None:
    """Place in ``argv`` of the NAME of ``prefect [options] deployment run [options] NAME``; None: another command.

    ``argv`` is ``sys.argv``, the program first.
    """
    if not is_prefect(argv):
        return None
    words: list[int] = []
    place = 1
    while place < len(argv) and len(words) < 3:
        token = argv[place]
        if token in ("--", "--id") or token.startswith("--id="):
            return None
        if token.startswith("-"):
            place += 1 if token in _FLAGS or "=" in token else 2
            continue
        words.append(place)
        place += 1
    if len(words) < 3 or argv[words[0]] not in ("deployment", "deployments") or argv[words[1]] != "run":
        return None
    return words[2]


def deployment_names(folder: Path) -> set[str]:
    """Names of the deployments of ``folder``'s ``prefect.yaml``."""
    import yaml

    raw = yaml.safe_load((folder / "prefect.yaml").read_text())
    return {str(entry["name"]) for entry in raw["deployments"]}


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:  # pluggy refuses a positional ctx
    """Complete a bare deployment name in ``sys.argv``; the local server's variables, or None for other commands."""
    try:
        argv = list(sys.argv)
        if argv[:1] == ["-m"]:  # `python -m MODULE`: its packages are imported before sys.argv names it
            argv[0] = sys.orig_argv[-len(argv)]
        if not is_prefect(argv):
            return None
        place = name_place(argv)
        if place is not None and "/" not in argv[place] and argv[place] in deployment_names(Path.cwd()):
            sys.argv[place] = f"{argv[place]}/{argv[place]}"
        from wav.local import local_prefect

        found = local_prefect()
        return SetupResult(env=found, note="local server of make up") if found else None
    except Exception:  # a convenience must never stand in the way of the command itself
        ctx.logger_factory("wav.prefect_plugin").debug("deployment name left alone", exc_info=True)
        return None
