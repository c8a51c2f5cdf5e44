"""Deployment ``eval-libero``: evaluate any checkpoint, with other tasks, episodes or planner settings if wanted.

The stage of that name (``flows/eval_libero.py``) belongs to DVC; this run writes to ``runs/<flow-run-id>/`` and to the
object store. ``python -m flows.eval_run`` is the same without a worker.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows import eval_libero as stage
from flows.artifacts import publish_table
from flows.common import StageRun, begin_deployed, by_hand, finish, start, step
from flows.isolation import isolate, prepare, source_workspace
from flows.provenance import dvc_hash
from wav.config import DataSettings, load_settings, parse_settings
from wav.errors import CheckpointError, ConfigError
from wav.evaluation.start import own_store
from wav.io.files import atomic_folder, inside
from wav.io.readers import read_json, understood
from wav.io.storage import ObjectStore, open_store
from wav.policy.export import load_export, verify_export
from wav.policy.policy import Policy
from wav.promotion import download_policy, read_champion

Changes = dict[str, dict[str, Any]]


def find_checkpoint(text: str, workspace: Path, store: ObjectStore) -> Path:
    """The folder that parameter ``checkpoint`` means, downloaded where it lies in the object store.

    ``text`` is a folder (an export, or a ``train_joint`` output), relative to the workspace; ``champion`` or
    ``champion:NAME``; or the address of an export in the store, such as ``s3://wav/runs/<flow-run-id>/export``.
    Downloads are kept below the workspace's ``.wav/policies``. CheckpointError: there is no such checkpoint.
    """
    kept = workspace / ".wav" / "policies"
    if text == "champion" or text.startswith("champion:"):
        name = text.partition(":")[2] or load_settings(workspace / "params.yaml").data.suite
        found = read_champion(store, name)
        if found is None:
            raise CheckpointError(f"checkpoint = {text!r}: {store.url} has no champion {name!r}; run retrain first")
        return download_policy(store, found[0], inside(kept, found[0].policy))
    if "://" in text:
        prefix = text.rstrip("/").removeprefix(store.url.rstrip("/") + "/")
        objects = [] if "://" in prefix else store.list(prefix + "/")
        if not objects:
            raise CheckpointError(f"checkpoint = {text!r}: no such export in {store.url}; give one of its addresses")
        folder = kept / hashlib.sha256(text.encode()).hexdigest()[:32]
        with atomic_folder(folder) as fresh:
            for info in objects:
                store.get_file(info.key, inside(fresh, info.key[len(prefix) + 1 :]))
        return folder
    folder = (workspace / text).resolve()
    if not (folder / "settings.json").is_file() and not (folder / "checkpoint.json").is_file():
        raise CheckpointError(f"checkpoint = {text!r}: {folder} is neither an export nor a train_joint output")
    return folder


def default_checkpoint(workspace: Path, store: ObjectStore) -> str:
    """What an empty ``checkpoint`` means: the joint model, else the champion; CheckpointError: there is neither."""
    if (workspace / "models/joint/checkpoint.json").is_file():
        return ""
    if read_champion(store, load_settings(workspace / "params.yaml").data.suite) is None:
        raise CheckpointError(
            f"{workspace / 'models/joint'}: no joint model here, and {store.url} has no champion; run dvc repro, "
            "dvc pull or retrain first, or name a checkpoint"
        )
    get_run_logger().info("%s has no joint model yet: evaluating the champion", workspace)
    return "champion"


def wanted_changes(
    suite: str,
    tasks: list[str] | None,
    episodes: int,
    variants: list[str] | None,
    planner: dict[str, Any] | None,
    seed: int | None,
) -> Changes:
    """The flow's parameters as changes of ``params.yaml``; what was not given is left out."""
    data = {"suites": suite.split("+") if suite else None, "tasks": tasks}
    protocol = {"episodes_per_task": episodes or None, "variants": variants, "seed": seed}
    sections = {"data": data, "eval_libero": protocol, "planner": planner or {}}
    return {name: {key: v for key, v in values.items() if v is not None} for name, values in sections.items()}


def prepare_export(export: Path, workspace: Path, folder: Path, changes: Changes) -> None:
    """The run's folder for an export: its settings, the workspace's protocol, then the changes, or ConfigError."""
    path, remedy = export / "settings.json", "export the policy again (`dvc repro export`)"
    own, asked = read_json(path, remedy), changes.get("data", {}).get("suites")
    with understood(path, remedy, CheckpointError):
        data = DataSettings.model_validate(own["data"])
        raw = {"data": data.model_dump(mode="json"), **{name: dict(own[name]) for name in ("model", "planner")}}
    if asked and tuple(asked) != data.suites:
        raise ConfigError(f"suite = {'+'.join(asked)!r}: {export} was trained on {data.suite!r}; leave suite out")
    here = load_settings(workspace / "params.yaml")
    raw |= {name: getattr(here, name).model_dump(mode="json") for name in ("eval_libero", "label_rewards")}
    for section, values in changes.items():
        raw[section] |= values
    prepare("eval_libero", workspace, folder, parse_settings(raw, f"settings of {export} with the run's parameters"))


@step("roll out")
def roll_out(run: StageRun, policy: Policy, digest: str, load: Callable[[], Policy]) -> dict[str, Any]:
    """An exported policy in closed loop, beside the workspace's demonstrations where it was trained on them."""
    store = own_store(policy, source_workspace(run.workspace) / "data" / "episodes")
    metrics = stage.closed_loop(run, policy, digest, store, load)
    stage.instruments(run, policy, metrics, store)
    return metrics


def evaluate_export(export: Path, folder: Path) -> None:
    """Evaluate an exported policy in the run's folder."""
    run = start("eval_libero", str(folder))
    digest = str(verify_export(export)["checkpoint"]["digest"])
    load = functools.partial(
        load_export,
        export.resolve(),
        batch_size=run.settings.eval_libero.batch_size,
        device=run.runtime.device,
        planner=run.settings.planner,
    )
    policy = load()
    metrics = roll_out(run, policy, digest, load)
    stage.report(run, metrics)
    row = {"export": str(export), "dvc": dvc_hash(export), "weights": digest}
    publish_table("checkpoint", [row], "evaluated policy")
    results = [run.path("reports/eval") / name for name in ("metrics.json", "episodes", "videos")]
    finish(run, [*results, run.path("reports/index.html")])


@flow(name="eval-libero")
def eval_libero(
    checkpoint: str = "",
    suite: str = "",
    tasks: list[str] | None = None,
    episodes: int = 0,
    variants: list[str] | None = None,
    planner: dict[str, Any] | None = None,
    seed: int | None = None,
    out: str = "",
) -> str:
    """Evaluate a policy in closed loop; returns the folder of the results.

    Args:
        checkpoint: see :func:`find_checkpoint`; empty: the project's joint model, or the champion.
        suite: must be the one the policy was trained on; empty: that one.
        tasks: names of the suite's tasks; none: those of the policy's settings.
        episodes: per task; 0: as ``params.yaml`` says.
        variants: of planned, unplanned, temperature; none: as ``params.yaml`` says.
        planner: values of section ``planner`` that differ, such as ``{"iterations": 0}``.
        seed: of the policy's noise; none: as ``params.yaml`` says.
        out: folder of the results; empty: ``runs/<flow-run-id>/``.
    """
    runtime, workspace, folder = begin_deployed(out)
    changes = wanted_changes(suite, tasks, episodes, variants, planner, seed)
    instead: dict[str, Path] = {}
    store = open_store(runtime.store, runtime.s3_endpoint, runtime.s3_region)
    checkpoint = checkpoint or default_checkpoint(workspace, store)
    if checkpoint:
        found = find_checkpoint(checkpoint, workspace, store)
        if (found / "settings.json").is_file():
            prepare_export(found, workspace, folder, changes)
            evaluate_export(found, folder)
            return str(folder)
        instead = {"models/joint": found}
    isolate("eval_libero", workspace, folder, changes, instead)
    stage.eval_libero.fn(workspace=str(folder))
    return str(folder)


def main() -> int:
    """Evaluate in the current folder; what retrain uses for the champion."""
    parser = argparse.ArgumentParser(prog="flows.eval_run", description="evaluate a checkpoint")
    parser.add_argument("--checkpoint", default="", help="folder, champion, or s3:// address of an export")
    parser.add_argument("--task", action="append", dest="tasks", help="a task; may be given several times")
    parser.add_argument("--episodes", type=int, default=0, help="episodes per task")
    parser.add_argument("--variant", action="append", dest="variants")
    parser.add_argument("--out", default="", help="folder of the results")
    return by_hand(eval_libero, **vars(parser.parse_args()))


if __name__ == "__main__":
    raise SystemExit(main())
