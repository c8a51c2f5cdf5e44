"""The commands of the console script ``wav``, one module for each group of ``wav --help``, in the order of use.

A command is a function with type hints: its docstring is its help, what it returns its exit status. Heavy modules are
imported inside it, so that help and completion are quick::

    @command(GROUP, "wav doctor", "wav doctor --json")
    def doctor(as_json: Json = False) -> int:
        '''Check renderer, versions, services and disk.'''
        from wav.doctor import run_checks
        ...
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wav.errors import ServiceError, exit_status
from wav.local import adopt_local_services

if TYPE_CHECKING:
    from tqdm import tqdm

#: what every parser of options has in common; errors of ours are one line, so no decorated tracebacks
_COMMON: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    name="wav",
    help="World-Value-Action policies: data, training, evaluation, serving.",
    epilog="wav COMMAND --help has examples. In a shell with completion: wav --install-completion.",
    **_COMMON,
)

EXTRAS = "simulators need `pip install '.[sim]'`, stages and stores `pip install '.[train]'`"
Json = Annotated[bool, typer.Option("--json", help="for a program: JSON on stdout, everything else on stderr")]
Params = Annotated[Path, typer.Option(help="parameter file")]
Workers = Annotated[int, typer.Option(min=0, help="simulator processes; 0: WAV_WORKERS, else the cores")]
Seed = Annotated[int, typer.Option(help="seed of the policy's noise")]
ExecuteSteps = Annotated[int, typer.Option(min=1, help="actions executed per policy call")]


def command(
    group: str, *examples: str, name: str = "", parent: typer.Typer = app
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make a function a command.

    ``group`` is the heading under which ``wav --help`` lists it, ``examples`` end its help, ``parent`` is a group of
    commands with a first word of its own (:func:`family`).
    """

    def register(function: Callable[..., int]) -> Callable[..., int]:
        title = name or function.__name__.strip("_").replace("_", "-")
        spoken = f"wav {title}" if parent is app else f"wav {parent.info.name} {title}"

        @functools.wraps(function)
        def run(**values: Any) -> None:
            def call() -> int:
                adopt_local_services()
                try:
                    if "export" in values:  # its folder, or its name on the hub
                        from wav.policy.sharing import local_export

                        values["export"] = local_export(values["export"])
                    return function(**values)
                except ModuleNotFoundError as error:
                    if not error.name or error.name.partition(".")[0] in ("wav", "flows"):
                        raise
                    raise ServiceError(f"{error.name}: this package is missing; {EXTRAS}") from None

            raise typer.Exit(exit_status(call, f"{spoken}: ", "stopped"))

        # one example a line; square brackets would be read as colours, as in every text of typer's
        epilog = "\n\n".join(["Examples:", *(f"  {line}" for line in examples)]).replace("[", r"\[")
        parent.command(title, rich_help_panel=group, epilog=epilog)(run)
        return function

    return register


def family(group: str, name: str, text: str) -> typer.Typer:
    """A first word that several commands share, such as ``storage``."""
    made = typer.Typer(name=name, help=text, **_COMMON)
    app.add_typer(made, rich_help_panel=group)
    return made


def say(line: str) -> None:
    """One line of output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tell(line: str) -> None:
    """One line of progress, beside the output."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def answer(as_json: bool, numbers: Any, lines: Iterable[str], good: bool = True) -> int:
    """The end of a command: its numbers as JSON (paths as text) or its lines; the exit status."""
    for line in [json.dumps(numbers, indent=1, default=str)] if as_json else lines:
        say(line)
    return 0 if good else 1


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Something that moves on a terminal while nothing is printed; the block must print nothing itself."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def counting(title: str, total: int | None = None) -> Iterator[tqdm]:
    """A bar of episodes on a terminal that moves before the first has ended; print in its ``external_write_mode``."""
    from tqdm import tqdm

    from wav.ingest import ticking

    with tqdm(total=total, desc=title, unit="episode", disable=None) as bar, ticking(bar, 1.0):
        yield bar


def simulators(workers: int) -> int:
    """Simulator processes: ``--workers``, else WAV_WORKERS, else the cores."""
    from wav.config import Runtime

    return workers or Runtime().workers or len(os.sched_getaffinity(0))
