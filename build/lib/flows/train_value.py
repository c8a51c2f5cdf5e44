"""Stage ``train_value``: the value expert on frozen video features (training stage 2), into ``models/value/``."""

from __future__ import annotations

from prefect import flow

from flows.common import main
from flows.training import run_training


@flow(name="train-value")
def train_value(workspace: str = ".") -> None:
    """Make ``models/value/``."""
    run_training("train_value", workspace)


if __name__ == "__main__":
    raise SystemExit(main(train_value))
