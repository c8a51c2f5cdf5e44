"""Stage ``pretrain_video``: the video transformer on future frames (training stage 1), into ``models/video/``."""

from __future__ import annotations

from prefect import flow

from flows.common import main
from flows.training import run_training


@flow(name="pretrain-video")
def pretrain_video(workspace: str = ".") -> None:
    """Make ``models/video/``."""
    run_training("pretrain_video", workspace)


if __name__ == "__main__":
    raise SystemExit(main(pretrain_video))
