"""Policies: an export in a simulator, behind a port, on a page that shows what it imagines, on the hub, in LeRobot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from wav.commands import Json, Seed, Workers, answer, command, counting, say, simulators, tell
from wav.planning import Variant

GROUP = "Policies"
Export = Annotated[Path, typer.Argument(help="folder that the export stage wrote, or USER/NAME on the hub")]
Repository = Annotated[str, typer.Argument(metavar="USER/NAME", help="on the Hugging Face hub")]
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
    execute_steps: Annotated[
        int | None, typer.Option(min=1, help="actions executed per policy call; default: as evaluated")
    ] = None,
    workers: Workers = 0,
    videos: Annotated[Path | None, typer.Option(help="folder for one mp4 per episode")] = None,
    as_json: Json = False,
) -> int:
    """Run a few episodes of an exported policy in its simulator."""
    from wav.config import Runtime
    from wav.evaluation.act import act_episodes

    with counting("act", episodes) as bar:

        def report(line: str) -> None:
            with bar.external_write_mode():
                (tell if as_json else say)(line)
            bar.update()

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
            report=report,
        )
    told = {"suite": suite, "variant": variant, "solved": sum(results), "success": results}
    return answer(as_json, told, [f"{suite}: {sum(results)} of {len(results)} episodes solved ({variant})"])


@command(GROUP, "wav serve export", "wav serve export --host 0.0.0.0 --api-key-env ROBOT_KEY")
def serve(
    export: Export,
    host: Annotated[str, typer.Option(help="beyond 127.0.0.1 a key is needed")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any")] = 8000,
    api_key_env: Annotated[str, typer.Option(metavar="NAME", help="variable with the key that clients must send")] = "",
    variant: Chosen = "planned",
    seed: Seed = 7,
    execute_steps: Annotated[
        int | None, typer.Option(min=1, help="actions of a chunk that clients are advised to do; default: as evaluated")
    ] = None,
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


@command(GROUP, "wav push export USER/NAME", "wav push export USER/NAME --public")
def push(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="folder that the export stage wrote")],
    repository: Repository,
    public: Annotated[bool, typer.Option("--public", help="make a new repository public; default: private")] = False,
) -> int:
    """Upload an export with its model card to the Hugging Face hub, in one commit."""
    from wav.policy.sharing import push as upload

    address, commit = upload(folder, repository, private=not public)
    say(f"{address}: commit {commit[:12]}; Policy.load({repository!r}) loads it")
    return 0


@command(GROUP, "wav pull USER/NAME", "wav pull USER/NAME export --revision v1")
def pull(
    repository: Repository,
    folder: Annotated[Path | None, typer.Argument(help="new folder; default: it stays in the hub cache")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit; default: main")] = None,
) -> int:
    """Download an export from the Hugging Face hub and verify it; prints the folder."""
    from wav.policy.sharing import pull as download

    say(str(download(repository, folder, revision)))
    return 0


@command(GROUP, "wav export export --lerobot lerobot-export", name="export")
def convert(
    export: Export,
    lerobot: Annotated[Path, typer.Option(metavar="FOLDER", help="new folder: the export, for LeRobot as well")],
) -> int:
    """Write an export with the files of another library beside its own."""
    from wav.policy.lerobot import export_lerobot

    say(str(export_lerobot(export, lerobot)))
    return 0
