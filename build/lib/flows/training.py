"""What the three training flows share: launch the process group, follow its lines, publish the curves.

The loop itself is :mod:`wav.training`; it runs in its own process group and uploads its checkpoints while it trains.
"""

from __future__ import annotations

import re
from typing import Any

from flows.artifacts import Progress, publish_images, publish_numbers, publish_objects
from flows.common import StageRun, finish, start, step
from wav import plots
from wav.io.files import read_json
from wav.stages import STAGES, TRAINING
from wav.training.launch import launch
from wav.training.spec import TrainPaths, make_spec

STEP = re.compile(r"\bstep (\d+)/(\d+)(?:\s+(loss \S+)\s+(\S+ samples/s))?")


def training_paths(run: StageRun) -> TrainPaths:
    """Inputs and outputs of the stage in its workspace."""
    training = TRAINING[run.stage]
    return TrainPaths(
        episodes=run.path("data/episodes"),
        latents=run.path("data/latents"),
        rewards=run.path("data/rewards") if "data/rewards" in STAGES[run.stage].inputs else None,
        init=run.path(training.start) if training.start else None,
        output=run.path(training.folder),
        cache=run.scratch("training"),
    )


def tell(line: re.Match[str], progress: Progress) -> None:
    """Move the progress artefact to where a line of :data:`STEP` says, with its loss and samples per second."""
    done, total, *rest = line.groups()
    progress(int(done), int(total), ", ".join(part for part in rest if part), log=False)


@step("train")
def train(run: StageRun) -> dict[str, Any]:
    """Run the DeepSpeed job to its end; every line goes to the flow run's log, steps move the progress artefact."""
    runtime = run.runtime
    spec = make_spec(
        run.stage,
        run.settings,
        training_paths(run),
        store=runtime.store,
        endpoint=runtime.s3_endpoint,
        region=runtime.s3_region,
        device=runtime.device,
        threads=runtime.threads,
    )
    run.logger.info("run key %s, checkpoints at %s/%s", spec.key, runtime.store, spec.prefix)
    with Progress(f"{run.stage} steps", run.logger) as progress:

        def on_line(line: str) -> None:
            run.logger.info(line)
            if found := STEP.search(line):
                tell(found, progress)

        return dict(launch(spec, on_line))


@step("publish curves")
def publish(run: StageRun, metrics: dict[str, Any]) -> None:
    """Metrics, curves and the checkpoint's objects on the flow run."""
    output = run.path(TRAINING[run.stage].folder)
    publish_numbers("metrics", metrics, f"{run.stage}: final metrics")
    pictures = {}
    for path in sorted((output / "plots").rglob("*.tsv")):
        steps, values = plots.read_curve(path)
        if len(steps) > 1:
            name = path.relative_to(output / "plots" / "metrics").with_suffix("").as_posix()
            pictures[name] = plots.curves({name: values}, steps, title=f"{run.stage}: {name}", xlabel="step")
    if pictures:
        publish_images("curves", pictures, "training curves")
    checkpoint = read_json(output / "checkpoint.json", f"run dvc repro {run.stage} again")
    prefix = f"{checkpoint['store'].rstrip('/')}/{checkpoint['prefix']}"
    objects = [
        (f"{checkpoint['store'].rstrip('/')}/{item['key']}", item["version"], int(item["size"]))
        for item in checkpoint["objects"]
    ]
    publish_objects("checkpoint", objects, run.runtime, f"final weights; wav storage get {prefix}/model FOLDER")


def run_training(stage: str, workspace: str) -> None:
    """The body of a training flow."""
    run = start(stage, workspace)
    metrics = train(run)
    publish(run, metrics)
    output = run.path(TRAINING[stage].folder)
    finish(run, [output / "metrics.json", output / "checkpoint.json"])
