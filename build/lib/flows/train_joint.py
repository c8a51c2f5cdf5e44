"""Stage ``train_joint``: video, value and action together (training stage 3), into ``models/joint/``."""

from __future__ import annotations

from prefect import flow

from flows.common import main
from flows.training import run_training


@flow(name="train-joint")
def train_joint(workspace: str = ".") -> None:
    """Make ``models/joint/``."""
    run_training("train_joint", workspace)


if __name__ == "__main__":
    raise SystemExit(main(train_joint))
