"""The stages as deployments: each run has ``runs/<flow-run-id>/`` as its workspace and reads the project's results.

One flow for every row of :data:`wav.stages.STAGES`, under the stage's name; ``prefect.yaml`` names them. ``changes``
replaces parameters, section by section: ``{"train_joint": {"steps": 2000}}``. The evaluation has a flow of its own
(:mod:`flows.eval_run`), because it may evaluate any checkpoint.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from prefect import Flow, flow

from flows.common import begin_deployed
from flows.isolation import isolate
from wav.stages import STAGES, Stage

Changes = dict[str, dict[str, Any]]


def deployed(row: Stage) -> Flow[..., str]:
    """The flow that runs a stage's flow in the run's own workspace, and returns that folder."""

    def run(changes: Changes | None = None) -> str:
        _, workspace, own = begin_deployed()
        folder = isolate(row.name, workspace, own, changes)
        getattr(import_module(row.flow), row.name).fn(workspace=str(folder))
        return str(folder)

    run.__name__, run.__doc__ = row.name, f"Make {row.makes}, into the run's folder."
    return flow(name=row.deployment)(run)


globals().update({row.name: deployed(row) for row in STAGES.values() if row.name != "eval_libero"})
