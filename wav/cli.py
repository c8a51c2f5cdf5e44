"""The one console script ``wav``: thin commands, each of which calls its room.

``wav act EXPORT`` runs an exported policy in a simulator, ``wav serve EXPORT`` behind a port, ``wav demo EXPORT`` on a
page that shows what it imagines, ``wav doctor`` checks the machine, ``wav config check`` checks a parameter file,
``wav summary`` says what one costs, ``wav export-hdf5`` writes demonstrations as LIBERO's files, ``wav storage`` lists,
fetches, verifies and thins out checkpoints. Errors that are the input's fault are one line on stderr and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from wav.config import DataSettings, Runtime, load_settings
from wav.errors import ConfigError, ServiceError, SimulationError, exit_status, print_any_name
from wav.local import adopt_local_services
from wav.planning import VARIANTS

EXTRAS = "simulators need `pip install '.[sim]'`, stages and stores `pip install '.[train]'`"


def _say(line: str) -> None:
    """One line of output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _workers(arguments: argparse.Namespace) -> int:
    """Simulator processes: ``--workers``, else WAV_WORKERS, else the cores."""
    return int(arguments.workers or Runtime().workers or len(os.sched_getaffinity(0)))


def act(arguments: argparse.Namespace) -> int:
    """``wav act``: a few episodes of an exported policy."""
    from wav.evaluation.act import act_episodes

    runtime = Runtime()
    results = act_episodes(
        arguments.export,
        suite=arguments.suite,
        tasks=tuple(arguments.task),
        episodes=arguments.episodes,
        variant=arguments.variant,
        seed=arguments.seed,
        execute_steps=arguments.execute_steps,
        workers=_workers(arguments),
        device=runtime.device,
        videos=arguments.videos,
        report=_say,
    )
    solved = sum(results)
    _say(f"{arguments.suite}: {solved} of {len(results)} episodes solved ({arguments.variant})")
    return 0


def _act_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav act``."""
    command = commands.add_parser("act", help="run an exported policy in a simulator")
    command.add_argument("export", type=Path, help="folder that the export stage wrote")
    command.add_argument("--suite", default="tabletop", help="task suite (default: tabletop)")
    command.add_argument("--task", action="append", default=[], help="task, may be repeated (default: the export's)")
    command.add_argument("--episodes", type=_positive, default=2, help="episodes in all (default: 2)")
    command.add_argument("--variant", choices=VARIANTS, default="planned")
    command.add_argument("--seed", type=int, default=7, help="seed of the policy's noise (default: 7)")
    command.add_argument("--execute-steps", type=_positive, default=8, help="actions executed per call (default: 8)")
    command.add_argument("--workers", type=_positive, help="simulator processes (default: WAV_WORKERS or the cores)")
    command.add_argument("--videos", type=Path, help="folder for one mp4 per episode")
    command.set_defaults(run=act)


def serve(arguments: argparse.Namespace) -> int:
    """``wav serve``: an exported policy behind a port, until SIGINT or SIGTERM."""
    from wav.serving.server import Options
    from wav.serving.server import serve as run

    key = os.environ.get(arguments.api_key_env or "WAV_API_KEY", "")
    if arguments.api_key_env and not key:
        raise ConfigError(f"--api-key-env {arguments.api_key_env}: that variable is empty; put the key into it")
    options = Options(api_key=key, **{name: getattr(arguments, name) for name in SERVE_OPTIONS})
    run(arguments.export, options, batch_size=arguments.batch_size, device=Runtime().device, say=_say)
    return 0


SERVE_OPTIONS = ("host", "port", "variant", "seed", "execute_steps", "deadline", "sessions", "keep_memory")


def _serve_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav serve``."""
    command = commands.add_parser("serve", help="an exported policy behind a port (openpi's protocol)")
    command.add_argument("export", type=Path, help="folder that the export stage wrote")
    command.add_argument("--host", default="127.0.0.1", help="beyond 127.0.0.1 a key is needed")
    command.add_argument("--port", type=int, default=8000, help="0: any (default: 8000)")
    command.add_argument("--api-key-env", metavar="NAME", help="variable with the key that clients must send")
    command.add_argument("--variant", choices=VARIANTS, default="planned")
    command.add_argument("--seed", type=int, default=7, help="seed of the policy's noise (default: 7)")
    command.add_argument("--execute-steps", type=_positive, default=8, help="advised to clients (default: 8)")
    command.add_argument("--batch-size", type=_positive, default=8, help="requests planned together (default: 8)")
    command.add_argument("--deadline", type=float, default=30.0, help="seconds from a request to its reply")
    command.add_argument("--sessions", type=_positive, default=64, help="connections at a time (default: 64)")
    command.add_argument("--keep-memory", action="store_true", help="a new prompt does not begin an episode")
    command.set_defaults(run=serve)


def demo(arguments: argparse.Namespace) -> int:
    """``wav demo``: an exported policy beside a simulator on a page of this machine, until SIGINT or SIGTERM."""
    from wav.demo.server import demo as run

    run(arguments.export, port=arguments.port, device=Runtime().device, say=_say)
    return 0


def _demo_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav demo``."""
    command = commands.add_parser("demo", help="a page that shows what an exported policy imagines")
    command.add_argument("export", type=Path, help="folder that the export stage wrote")
    command.add_argument("--port", type=int, default=8080, help="of 127.0.0.1; 0: any (default: 8080)")
    command.set_defaults(run=demo)


def evaluate(arguments: argparse.Namespace) -> int:
    """``wav eval --replay``: a recorded episode run again; status 1 where it comes out otherwise."""
    from wav.evaluation.extras.rerun import rerun_episode

    found = rerun_episode(arguments.replay, arguments.export, device=Runtime().device)
    for line in found.lines:
        _say(line)
    return 0 if found.same else 1


def _eval_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav eval``."""
    command = commands.add_parser("eval", help="run a recorded episode again and compare")
    command.add_argument("--replay", required=True, type=Path, metavar="EPISODE.json", help="record of the episode")
    command.add_argument("--export", default=Path("export"), type=Path, help="the policy (default: export)")
    command.set_defaults(run=evaluate)


def libero_table(arguments: argparse.Namespace) -> int:
    """``wav libero-table``: an export over LIBERO's suites, beside the published figures."""
    from wav.evaluation.extras.table import EvaluationProtocol, markdown
    from wav.evaluation.extras.table import libero_table as make

    runtime, default = Runtime(), EvaluationProtocol()
    protocol = EvaluationProtocol(
        suites=tuple(dict.fromkeys(arguments.suite)) or default.suites,
        tasks=tuple(dict.fromkeys(arguments.task)),
        episodes=arguments.episodes,
        variants=tuple(dict.fromkeys(arguments.variant)) or default.variants,
        execute_steps=arguments.execute_steps,
        batch_size=arguments.batch_size,
        budget=arguments.budget,
        seed=arguments.seed,
    )
    table = make(
        arguments.export,
        arguments.out,
        protocol,
        workers=_workers(arguments),
        device=runtime.device,
        demonstrations=arguments.demonstrations,
        report=_say,
    )
    _say("\n" + markdown(table) + f"\n{arguments.out / 'table.md'}, {arguments.out / 'table.json'}")
    return 0


def _libero_table_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav libero-table``."""
    command = commands.add_parser("libero-table", help="LIBERO's four suites beside the published figures")
    command.add_argument("export", nargs="?", type=Path, default=Path("export"), help="the policy (default: export)")
    command.add_argument("--suite", action="append", default=[], help="may be repeated (default: all four)")
    command.add_argument("--task", action="append", default=[], help="a trial on one task (default: all ten)")
    command.add_argument("--episodes", type=_positive, default=50, help="initial states per task (default: 50)")
    command.add_argument("--variant", action="append", default=[], choices=VARIANTS, help="default: all three")
    command.add_argument("--execute-steps", type=_positive, default=8, help="actions executed per call (default: 8)")
    command.add_argument("--batch-size", type=_positive, default=8, help="episodes planned together (default: 8)")
    command.add_argument(
        "--budget", choices=("protocol", "reference"), default="protocol", help="reference: +1000 steps"
    )
    command.add_argument("--seed", type=int, default=7, help="seed of the policy's noise (default: 7)")
    command.add_argument("--workers", type=_positive, help="simulator processes (default: WAV_WORKERS or the cores)")
    command.add_argument(
        "--demonstrations",
        type=Path,
        default=Path("data/episodes"),
        help="compared with, where the policy was trained on them (default: data/episodes)",
    )
    command.add_argument("--out", type=Path, default=Path("reports/libero-table"), help="records and tables")
    command.set_defaults(run=libero_table)


def doctor(arguments: argparse.Namespace) -> int:
    """``wav doctor``: findings, one line each; status 1 if something needed is missing."""
    from wav.doctor import Check, as_json, run_checks

    found: list[Check] = []

    def report(check: Check) -> None:
        found.append(check)
        if not arguments.json:
            _say(check.line)

    good = run_checks(Runtime(), report)
    if arguments.json:
        _say(as_json(found))
    return 0 if good else 1


def _doctor_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav doctor``."""
    command = commands.add_parser("doctor", help="check renderer, versions, services and disk")
    command.add_argument("--json", action="store_true", help="findings as JSON")
    command.set_defaults(run=doctor)


def config_check(arguments: argparse.Namespace) -> int:
    """``wav config check``: one line, status 1 if the file is not valid."""
    load_settings(arguments.path)
    _say(f"{arguments.path}: valid")
    return 0


def _config_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav config``."""
    command = commands.add_parser("config", help="parameter files")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="check a parameter file")
    check.add_argument("path", nargs="?", default="params.yaml")
    check.set_defaults(run=config_check)


def summary(arguments: argparse.Namespace) -> int:
    """``wav summary``: sizes, parameters, operations and memory of a parameter file."""
    from wav.summary import lines, summarise

    settings = load_settings(arguments.path)
    if arguments.json:
        _say(json.dumps(summarise(settings, arguments.gpus), indent=1))
        return 0
    for line in (str(arguments.path), *lines(settings, arguments.gpus)):
        _say(line)
    return 0


def _summary_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav summary``."""
    command = commands.add_parser("summary", help="layers, parameters, operations and memory of a parameter file")
    command.add_argument("path", nargs="?", default="params.yaml", help="parameter file (default: params.yaml)")
    command.add_argument("--gpus", type=_positive, default=8, help="GPUs that ZeRO shards over (default: 8)")
    command.add_argument("--json", action="store_true", help="the numbers as JSON (operations, bytes)")
    command.set_defaults(run=summary)


def storage(arguments: argparse.Namespace) -> int:
    """``wav storage ls|get|verify|gc``; status 1 where a verified object is bad."""
    from wav.io.storage import commands, open_store
    from wav.io.storage.commit import Retention

    runtime = Runtime()
    store = open_store(arguments.store or runtime.store, runtime.s3_endpoint, runtime.s3_region)
    store.reach()
    bad = False
    if arguments.action == "get":
        _say(commands.get(store, arguments.prefix, arguments.folder))
        return 0
    if arguments.action == "ls":
        lines = commands.ls(store, arguments.prefix)
    elif arguments.action == "verify":
        lines = commands.verify(store, arguments.prefix)
    else:
        keep = Retention(arguments.keep_last, arguments.keep_best, arguments.keep_every)
        lines = commands.gc(store, keep, arguments.prefix, arguments.older_hours * 3600, arguments.delete)
    for line in lines:
        bad = bad or line.startswith("BAD ")
        _say(line)
    return 1 if bad else 0


def _storage_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav storage``."""
    command = commands.add_parser("storage", help="checkpoints in the object store")
    command.add_argument("--store", default="", help="s3://bucket[/prefix] or file:///folder (default: WAV_STORE)")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    action = actions.add_parser("ls", help="complete commits, and uploads that are not complete")
    action.add_argument("prefix", nargs="?", default="")
    action = actions.add_parser("get", help="download a commit, verified; repeat it to go on after a broken connection")
    action.add_argument("prefix")
    action.add_argument("folder", type=Path)
    action = actions.add_parser("verify", help="read a commit back and compare every digest")
    action.add_argument("prefix")
    action = actions.add_parser("gc", help="thin out checkpoints; says what it would remove unless --delete")
    action.add_argument("prefix", nargs="?", default="training")
    action.add_argument("--keep-last", type=_positive, default=2, help="newest checkpoints of each run (default: 2)")
    action.add_argument("--keep-best", type=int, default=0, help="best ones by validation loss (default: 0)")
    action.add_argument("--keep-every", type=int, default=0, help="those at multiples of this step (default: none)")
    action.add_argument("--older-hours", type=float, default=24.0, help="age of unfinished uploads (default: 24)")
    action.add_argument("--delete", action="store_true", help="remove them")
    command.set_defaults(run=storage)


def render(arguments: argparse.Namespace) -> int:
    """``wav render``: the first frame of one initial state as a picture."""
    from wav.evaluation.pictures import join_views, write_png
    from wav.sim.registry import select_tasks
    from wav.sim.workers import SimPool

    task = select_tasks(arguments.suite, tuple(arguments.task[:1]))[0]
    size = {"image_height": arguments.size, "image_width": arguments.size, "render": arguments.render}
    data = DataSettings.model_validate({"suite": arguments.suite, "tasks": (task.name,), **size})
    with SimPool(arguments.suite, data, workers=1, slots=1) as pool:
        pool.submit_reset(0, task.name, arguments.index)
        reply = pool.wait()[0][1]
    if reply.observation is None:
        raise SimulationError(f"{task.name}, initial state {arguments.index}: {reply.error}")
    write_png(arguments.out, join_views(reply.observation.images, data.views))
    _say(f"{arguments.out}: {task.name}, initial state {arguments.index}: {task.instruction}")
    return 0


def _render_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav render``."""
    command = commands.add_parser("render", help="the first frame of an initial state as a picture")
    command.add_argument("suite", help="tabletop, libero_spatial, ...")
    command.add_argument("--task", action="append", default=[], help="task (default: the suite's first)")
    command.add_argument("--index", type=int, default=0, help="initial state (default: 0)")
    command.add_argument("--size", type=_positive, default=256, help="pixels per side (default: 256)")
    command.add_argument("--render", choices=("fast", "full"), default="full")
    command.add_argument("--out", type=Path, default=Path("first-frame.png"), help="PNG (default: first-frame.png)")
    command.set_defaults(run=render)


def replay(arguments: argparse.Namespace) -> int:
    """``wav replay``: stored demonstrations open loop; status 1 if too few succeed again."""
    from wav.data.store import EpisodeStore
    from wav.evaluation.extras.replay import replay as replay_store
    from wav.evaluation.verdict import report_path

    settings = load_settings(arguments.params)
    report = replay_store(
        EpisodeStore.open(arguments.store),
        settings.data,
        settings.ingest,
        episodes=arguments.episodes,
        workers=_workers(arguments),
        progress=lambda o: _say(f"{o.episode_id}: {'success' if o.success else 'failure'} after {o.steps} steps"),
    )
    for skipped in report.not_replayed:
        _say(f"{skipped['episode']}: not replayed: {skipped['reason']}")
    _say(f"{report.line}; {report_path(arguments.store)}")
    return 0 if report.passed else 1


def _replay_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav replay``."""
    command = commands.add_parser("replay", help="replay stored demonstrations open loop in the simulator")
    command.add_argument("store", nargs="?", type=Path, default=Path("data/episodes"), help="default: data/episodes")
    command.add_argument("--params", default="params.yaml", help="parameters the store was made with")
    command.add_argument("--episodes", type=int, default=20, help="how many, spread over the store (0: all)")
    command.add_argument("--workers", type=_positive, help="simulator processes (default: WAV_WORKERS or the cores)")
    command.set_defaults(run=replay)


def export_hdf5(arguments: argparse.Namespace) -> int:
    """``wav export-hdf5``: an episode store as LIBERO's HDF5 files, one line per file."""
    from wav.data.sinks.libero_hdf5 import Recover
    from wav.data.sinks.libero_hdf5 import export_hdf5 as write
    from wav.data.store import EpisodeStore

    store = EpisodeStore.open(arguments.store)
    recover: Recover | None = None
    if arguments.states:
        from wav.data.sinks.libero_states import recover_states

        settings, workers = load_settings(arguments.params), Runtime().workers
        recover = partial(recover_states, store, data=settings.data, ingest=settings.ingest, workers=workers)
    report = write(store, arguments.folder, alignment=arguments.alignment, recover=recover)
    for name, demonstrations in report.files.items():
        _say(f"{report.folder / name}: {demonstrations} demonstrations")
    return 0


def _export_hdf5_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``wav export-hdf5``."""
    command = commands.add_parser("export-hdf5", help="demonstrations in LIBERO's own HDF5 layout")
    command.add_argument("store", type=Path, help="episode store, such as data/episodes")
    command.add_argument("folder", type=Path, help="new folder for one <task>_demo.hdf5 per task")
    command.add_argument(
        "--alignment",
        choices=("after_action", "before_action"),
        default="after_action",
        help="frame t is the one after action t as in LIBERO's files (default), or before it",
    )
    command.add_argument("--states", action="store_true", help="run scripted ones again for the simulator's states")
    command.add_argument("--params", default="params.yaml", help="--states: parameters the store was made with")
    command.set_defaults(run=export_hdf5)


def parser() -> argparse.ArgumentParser:
    """All commands; each sets ``run``."""
    top = argparse.ArgumentParser(prog="wav", description="World-Value-Action policies: run, check, inspect")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _act_parser(commands)
    _serve_parser(commands)
    _demo_parser(commands)
    _eval_parser(commands)
    _libero_table_parser(commands)
    _doctor_parser(commands)
    _summary_parser(commands)
    _render_parser(commands)
    _replay_parser(commands)
    _export_hdf5_parser(commands)
    _config_parser(commands)
    _storage_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    print_any_name()
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    def run() -> int:
        adopt_local_services()
        try:
            return int(arguments.run(arguments))
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] in ("wav", "flows"):
                raise
            raise ServiceError(f"{error.name}: this package is missing; {EXTRAS}") from None

    return exit_status(run, f"wav {arguments.command}: ", "stopped")


if __name__ == "__main__":
    raise SystemExit(main())
