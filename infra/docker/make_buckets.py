"""The two buckets of a store of one's own (compose): ``wav`` with versions, ``wav-dvc`` for DVC's remote."""

from __future__ import annotations

import os

from wav.io.storage.s3 import S3Store


def main() -> None:
    """Create what is missing; twice is once."""
    for bucket, versioned in (("wav", True), ("wav-dvc", False)):
        S3Store(bucket, endpoint=os.environ["WAV_S3_ENDPOINT"]).ensure_bucket(versioned)


if __name__ == "__main__":
    main()
