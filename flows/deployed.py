"""The stages as deployments: each run has ``runs/<flow-run-id>/`` as its workspace and reads the project's results.

``changes`` replaces parameters, section by section: ``{"train_joint": {"steps": 2000}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import Flow, flow

from flows import encode as encode_stage
from flows import export as export_stage
from flows import ingest as ingest_stage
from flows import label_rewards as label_rewards_stage
from flows import pretrain_video as pretrain_video_stage
from flows import train_joint as train_joint_stage
from flows import train_value as train_value_stage
from flows.common import begin_deployed
from flows.isolation import isolate

Changes = dict[str, dict[str, Any]]


def run_stage(stage: str, stage_flow: Flow[..., Any], changes: Mapping[str, Mapping[str, Any]] | None) -> str:
    """Run a stage's flow, within the calling flow run, in the run's own workspace; returns that folder."""
    _, workspace, own = begin_deployed()
    folder = isolate(stage, workspace, own, changes)
    stage_flow.fn(workspace=str(folder))
    return str(folder)


@flow(name="ingest")
def ingest(changes: Changes | None = None) -> str:
    """Collect demonstrations into the run's folder."""
    return run_stage("ingest", ingest_stage.ingest, changes)


@flow(name="label-rewards")
def label_rewards(changes: Changes | None = None) -> str:
    """Label the project's episodes."""
    return run_stage("label_rewards", label_rewards_stage.label_rewards, changes)


@flow(name="encode")
def encode(changes: Changes | None = None) -> str:
    """Encode the project's episodes."""
    return run_stage("encode", encode_stage.encode, changes)


@flow(name="pretrain-video")
def pretrain_video(changes: Changes | None = None) -> str:
    """Train the video model."""
    return run_stage("pretrain_video", pretrain_video_stage.pretrain_video, changes)


@flow(name="train-value")
def train_value(changes: Changes | None = None) -> str:
    """Train the value expert from the project's video model."""
    return run_stage("train_value", train_value_stage.train_value, changes)


@flow(name="train-joint")
def train_joint(changes: Changes | None = None) -> str:
    """Train all experts from the project's value model."""
    return run_stage("train_joint", train_joint_stage.train_joint, changes)


@flow(name="export")
def export(changes: Changes | None = None) -> str:
    """Export the project's joint model."""
    return run_stage("export", export_stage.export, changes)
