"""Closed-loop evaluation: which episodes, rollouts, records and metrics, pictures, the report.

The suite evaluated is ``data.suite`` (tabletop by default, not LIBERO); it stands in every table, title and file name.
"""

from wav.evaluation.evaluate import EvaluationSettings, Progress, check_start, evaluate
from wav.evaluation.held_out import held_out_index, held_out_values
from wav.evaluation.records import EpisodeRecord, metrics_table, read_record
from wav.evaluation.report import build_report

__all__ = [
    "EpisodeRecord",
    "EvaluationSettings",
    "Progress",
    "build_report",
    "check_start",
    "evaluate",
    "held_out_index",
    "held_out_values",
    "metrics_table",
    "read_record",
]
