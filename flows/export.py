"""Stage ``export``: the self-contained policy folder ``export/`` that a server loads."""

from __future__ import annotations

from prefect import flow

from flows.artifacts import publish_markdown
from flows.common import StageRun, finish, main, start, step
from flows.policy import assembly
from wav.evaluation.tables import metrics_table
from wav.io.files import read_json
from wav.planning import VARIANTS
from wav.policy.export import export_policy, verify_export


@step("export policy")
def write(run: StageRun) -> None:
    """Write the folder and read it back."""
    metrics = read_json(run.path("reports/eval/metrics.json"), "run dvc repro eval_libero")
    evaluated = metrics if any(variant in metrics for variant in VARIANTS) else None
    policy, checkpoint = assembly(run)()
    table = metrics_table(evaluated) if evaluated else ""
    export_policy(policy, checkpoint, run.path("export"), settings=run.settings, metrics=evaluated, table=table)
    verify_export(run.path("export"))
    publish_markdown("model-card", run.path("export/README.md").read_text(), "the exported policy's model card")


@flow(name="export")
def export(workspace: str = ".") -> None:
    """Make ``export/``."""
    run = start("export", workspace)
    write(run)
    finish(run, [run.path("export")])


if __name__ == "__main__":
    raise SystemExit(main(export))
