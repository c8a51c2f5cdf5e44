"""Data: what a simulator or a store of demonstrations holds."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from wav.commands import Json, Params, Workers, answer, busy, command, counting, say, simulators, tell

GROUP = "Data"
Store = Annotated[Path, typer.Argument(help="episode store that the stage ingest wrote")]


@command(
    GROUP,
    "wav inspect my-data",
    "wav inspect my-data --set ingest.lerobot.image_rotation=camera --write presets/my-data.yaml",
    "wav inspect my-data --episodes 0 --json",
    name="inspect",
)
def inspect_folder(
    folder: Annotated[Path, typer.Argument(help="file or folder of a dataset, known by its content")],
    given: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a parameter; repeatable")] = None,
    write: Annotated[Path | None, typer.Option(help="preset to write, such as presets/my-data.yaml")] = None,
    pictures: Annotated[Path, typer.Option(help="folder for pictures of first frames")] = Path("inspect"),
    episodes: Annotated[int, typer.Option(min=0, help="read whole, spread over the dataset; 0: all")] = 20,
    params: Params = Path("params.yaml"),
    as_json: Json = False,
) -> int:
    """Say what a dataset is, and write a preset that ingests it.

    Format, episodes, cameras, rates, layout of states and actions and how it was told, what must be declared (with
    --set), what would be quarantined and why. Status 1 where something is to be declared or nothing can be read.
    """
    from wav import inspection
    from wav.inspection_text import as_json as numbers
    from wav.inspection_text import lines, overlay_text, write_pictures
    from wav.io.files import write_text
    from wav.parameter_files import read_parameters

    base = read_parameters(params) if params.is_file() else {}
    declared = inspection.parse_declared(given or [])
    with counting("inspect") as bar:
        found = inspection.inspect(
            folder, base, declared, episodes=episodes, progress=lambda count: bar.update(count - bar.n)
        )
    written = write_pictures(found, pictures)
    told = [*lines(found), *(f"picture: {path}" for path in written)]
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write_text(write, overlay_text(found))
        told.append(f"{write}: {'ingests it' if found.ready else 'complete it where it says TO BE DECLARED'}")
    return answer(as_json, numbers(found) | {"pictures": written}, told, found.ready)


@command(GROUP, "wav render tabletop", "wav render libero_spatial --index 3 --out first.png")
def render(
    suite: Annotated[str, typer.Argument(help="tabletop, libero_spatial, ...")],
    task: Annotated[str, typer.Option(help="task; default: the suite's first")] = "",
    index: Annotated[int, typer.Option(help="initial state")] = 0,
    size: Annotated[int, typer.Option(min=1, help="pixels per side")] = 256,
    quality: Annotated[Literal["fast", "full"], typer.Option("--render", help="as data.render")] = "full",
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("first-frame.png"),
) -> int:
    """Write the first frame of an initial state as a picture."""
    from wav.config import DataSettings
    from wav.data.names import suites_of
    from wav.errors import SimulationError
    from wav.evaluation.pictures import join_views, write_png
    from wav.sim.registry import select_tasks
    from wav.sim.workers import SimPool

    chosen = select_tasks(suite, (task,) if task else ())[0]
    sizes = {"image_height": size, "image_width": size, "render": quality}
    data = DataSettings.model_validate({"suites": suites_of(suite), "tasks": (chosen.name,), **sizes})
    with busy(f"{suite}: the simulator draws"), SimPool(suite, data, workers=1, slots=1) as pool:
        pool.submit_reset(0, chosen.name, index)
        reply = pool.wait()[0][1]
    if reply.observation is None:
        raise SimulationError(f"{chosen.name}, initial state {index}: {reply.error}")
    write_png(out, join_views(reply.observation.images, data.views))
    say(f"{out}: {chosen.name}, initial state {index}: {chosen.instruction}")
    return 0


@command(GROUP, "wav replay", "wav replay data/episodes --episodes 50 --json")
def replay(
    store: Store = Path("data/episodes"),
    params: Params = Path("params.yaml"),
    episodes: Annotated[int, typer.Option(min=0, help="how many, spread over the store; 0: all")] = 20,
    workers: Workers = 0,
    as_json: Json = False,
) -> int:
    """Replay stored demonstrations open loop in the simulator; status 1 where too few succeed again."""
    from wav.config import load_settings
    from wav.data.store import EpisodeStore
    from wav.evaluation.extras.replay import replay as replay_store
    from wav.evaluation.verdict import report_path
    from wav.sim.replay import ReplayOutcome

    settings = load_settings(params)
    progress, opened = tell if as_json else say, EpisodeStore.open(store)
    with counting("replay", min(episodes or len(opened), len(opened))) as bar:

        def told(outcome: ReplayOutcome) -> None:
            with bar.external_write_mode():
                how = "success" if outcome.success else "failure"
                progress(f"{outcome.episode_id}: {how} after {outcome.steps} steps")
            bar.update()

        workers = simulators(workers)
        report = replay_store(opened, settings.data, settings.ingest, episodes=episodes, workers=workers, progress=told)
    for skipped in report.not_replayed:
        progress(f"{skipped['episode']}: not replayed: {skipped['reason']}")
    return answer(as_json, dataclasses.asdict(report), [f"{report.line}; {report_path(store)}"], report.passed)


@command(GROUP, "wav export-hdf5 data/episodes libero-files", "wav export-hdf5 data/episodes libero-files --states")
def export_hdf5(
    store: Store,
    folder: Annotated[Path, typer.Argument(help="new folder for one <task>_demo.hdf5 per task")],
    alignment: Annotated[
        Literal["after_action", "before_action"],
        typer.Option(help="frame t is the one after action t as in LIBERO's files, or before it"),
    ] = "after_action",
    states: Annotated[bool, typer.Option("--states", help="scripted ones again, for the simulator's states")] = False,
    params: Params = Path("params.yaml"),
    as_json: Json = False,
) -> int:
    """Write demonstrations in LIBERO's own HDF5 layout."""
    from wav.config import Runtime, load_settings
    from wav.data.sinks.libero_hdf5 import Recover
    from wav.data.sinks.libero_hdf5 import export_hdf5 as write
    from wav.data.store import EpisodeStore

    opened = EpisodeStore.open(store)
    recover: Recover | None = None
    if states:
        from wav.data.sinks.libero_states import recover_states

        settings, workers = load_settings(params), Runtime().workers
        recover = partial(recover_states, opened, data=settings.data, ingest=settings.ingest, workers=workers)
    with counting("export-hdf5", len(opened)) as bar:
        report = write(opened, folder, alignment=alignment, recover=recover, progress=lambda _: bar.update())
    lines = [f"{report.folder / name}: {count} demonstrations" for name, count in report.files.items()]
    return answer(as_json, {"folder": report.folder, "demonstrations": report.files}, lines)
