"""Policies: an export in a simulator, behind a port, or on a page that shows what it imagines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from wav.commands import ExecuteSteps, Json, Seed, Workers, command, say, say_json, simulators, tell
from wav.planning import Variant

GROUP = "Policies"
Export = Annotated[Path, typer.Argument(help="folder that the export stage wrote")]
Chosen = Annotated[Variant, typer.Option("--variant", help="with the search, without it, or its temperature alone")]


@command(
    GROUP, "wav act export", "wav act export --episodes 4 --videos films", "wav act export --variant unplanned --json"
)
def act(
    export: Export,
    suite: Annotated[str, typer.Option(help="task suite")] = "tabletop",
    task: Annotated[list[str] | None, typer.Option(help="may be repeated; default: the export's tasks")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="episodes in all")] = 2,
    variant: Chosen = "planned",
    seed: Seed = 7,
    execute_steps: ExecuteSteps = 8,
    workers: Workers = 0,
    videos: Annotated[Path | None, typer.Option(help="folder for one mp4 per episode")] = None,
    as_json: Json = False,
) -> int:
    """Run a few episodes of an exported policy in its simulator."""
    from wav.config import Runtime
    from wav.evaluation.act import act_episodes

    results = act_episodes(
        export,
        suite=suite,
        tasks=tuple(task or ()),
        episodes=episodes,
        variant=variant,
        seed=seed,
        execute_steps=execute_steps,
        workers=simulators(workers),
        device=Runtime().device,
        videos=videos,
        report=tell if as_json else say,
    )
    if as_json:
        say_json({"suite": suite, "variant": variant, "solved": sum(results), "success": results})
    else:
        say(f"{suite}: {sum(results)} of {len(results)} episodes solved ({variant})")
    return 0


@command(GROUP, "wav serve export", "wav serve export --host 0.0.0.0 --api-key-env ROBOT_KEY")
def serve(
    export: Export,
    host: Annotated[str, typer.Option(help="beyond 127.0.0.1 a key is needed")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any")] = 8000,
    api_key_env: Annotated[str, typer.Option(metavar="NAME", help="variable with the key that clients must send")] = "",
    variant: Chosen = "planned",
    seed: Seed = 7,
    execute_steps: Annotated[int, typer.Option(min=1, help="actions of a chunk that clients are advised to do")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="requests planned together")] = 8,
    deadline: Annotated[float, typer.Option(help="seconds from a request to its reply")] = 30.0,
    sessions: Annotated[int, typer.Option(min=1, help="connections at a time")] = 64,
    keep_memory: Annotated[bool, typer.Option("--keep-memory", help="a new prompt does not begin an episode")] = False,
) -> int:
    """Serve an exported policy behind a port (openpi's protocol) until SIGINT or SIGTERM."""
    from wav.config import Runtime
    from wav.errors import ConfigError
    from wav.serving.server import Options
    from wav.serving.server import serve as run

    key = os.environ.get(api_key_env or "WAV_API_KEY", "")
    if api_key_env and not key:
        raise ConfigError(f"--api-key-env {api_key_env}: that variable is empty; put the key into it")
    options = Options(
        host=host,
        port=port,
        api_key=key,
        variant=variant,
        seed=seed,
        execute_steps=execute_steps,
        deadline=deadline,
        sessions=sessions,
        keep_memory=keep_memory,
    )
    run(export, options, batch_size=batch_size, device=Runtime().device, say=say)
    return 0


@command(GROUP, "wav demo export", "wav demo export --port 0")
def demo(export: Export, port: Annotated[int, typer.Option(help="of 127.0.0.1; 0: any")] = 8080) -> int:
    """Show what an exported policy imagines, and does, on a page of this machine until SIGINT or SIGTERM."""
    from wav.config import Runtime
    from wav.demo.server import demo as run

    run(export, port=port, device=Runtime().device, say=say)
    return 0
