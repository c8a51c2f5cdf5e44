"""What flow runs show: links with version ids and no credentials, small numbers as they are, progress that moves."""

from __future__ import annotations

import logging
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.exceptions import ObjectNotFound

from flows import artifacts, training
from flows.provenance import object_url
from wav.config import Runtime


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Everything that would go to Prefect, in order."""
    calls: list[dict[str, Any]] = []

    def record(data: Any = None, key: str = "", description: str | None = None, **more: Any) -> Any:
        calls.append({"data": data, "key": key, "description": description, **more})
        return uuid4()

    for name in ("create_markdown_artifact", "create_table_artifact", "create_progress_artifact"):
        monkeypatch.setattr(artifacts, name, record)
    monkeypatch.setattr(
        artifacts, "update_progress_artifact", lambda artifact, percent, description: record(percent, "", description)
    )
    return calls


def test_an_object_is_linked_with_its_version_where_a_browser_finds_it() -> None:
    uri = "s3://wav/runs/1/a b.png"
    assert object_url(uri, "v/1", "http://h:8333/", "x") == "http://h:8333/wav/runs/1/a%20b.png?versionId=v/1"
    aws = "https://eu-1.console.aws.amazon.com/s3/object/wav?region=eu-1&prefix=runs/1/a%20b.png"
    assert object_url(uri, "", "", "eu-1") == aws
    assert object_url(uri, "7", "", "eu-1") == f"{aws}&versionId=7"
    assert object_url("file:///store/x", "", "http://h", "x") == "file:///store/x"


def test_objects_are_one_table_below_their_common_folder(published: list[dict[str, Any]]) -> None:
    runtime = Runtime(s3_endpoint="http://h:1")
    objects = [("s3://wav/runs/7/a/metrics.json", "v1", 1234), ("s3://wav/runs/7/b.mp4", "", 5)]
    artifacts.publish_objects("objects", objects, runtime, "made")
    text = str(published[0]["data"])
    assert "below `s3://wav/runs/7/`" in text
    assert "| [7/a/metrics.json](http://h:1/wav/runs/7/a/metrics.json?versionId=v1) | `v1` | 1,234 |" in text
    assert "| [runs/7/b.mp4](http://h:1/wav/runs/7/b.mp4) | `-` | 5 |" in text


def test_small_numbers_are_not_rounded_away(published: list[dict[str, Any]]) -> None:
    artifacts.publish_numbers("parameters", {"planner": {"epsilon": 1e-6, "beta": 1 / 3, "samples": 4}})
    assert [(row["name"], row["value"]) for row in published[0]["data"]] == [
        ("planner.epsilon", 1e-6),
        ("planner.beta", 0.33333),
        ("planner.samples", "4"),
    ]


def test_the_progress_of_training_moves_and_tells_loss_and_throughput(
    published: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "UPDATE_SECONDS", 0.0)
    line = "train_joint step 30/120  loss 0.4312  51.7 samples/s  data wait 2%  ETA 1:02"
    found = training.STEP.search(line)
    assert found is not None
    with artifacts.Progress("train_joint steps", logging.getLogger("test")) as progress:
        training.tell(found, progress)
    assert [call["data"] for call in published] == [0.0, 25.0, 100.0]
    assert "30/120" in published[1]["description"]
    assert published[1]["description"].endswith("loss 0.4312, 51.7 samples/s")
    plain = training.STEP.search("resumed at step 4/9")
    assert plain is not None
    assert plain.groups() == ("4", "9", None, None)


def test_a_resumed_run_knows_its_time_left_better(
    published: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "UPDATE_SECONDS", 0.0)
    with artifacts.Progress("episodes", logging.getLogger("test")) as progress:
        progress(1901, 2000, "3/1901 solved", left=5400.0)
    assert published[1]["description"].endswith("5400 s left, 3/1901 solved")


def test_what_cannot_be_shown_does_not_fail_a_stage(
    published: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server is away, refuses, or answers nonsense: one line each, and a bar leaves it alone for a while."""
    calls: list[int] = []

    def fails(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise [httpx.ConnectError("All attempts failed"), ObjectNotFound(OSError()), ValueError("no JSON")][
            len(calls) % 3
        ]

    for name in ("create_markdown_artifact", "create_table_artifact", "create_progress_artifact"):
        monkeypatch.setattr(artifacts, name, fails)
    monkeypatch.setattr(artifacts, "UPDATE_SECONDS", 0.0)
    artifacts.publish_markdown("a", "b")
    artifacts.publish_numbers("c", {"d": 1})
    with artifacts.Progress("steps", logging.getLogger("test")) as progress:
        for done in range(10):
            progress(done, 10)
    assert len(calls) == 3
    assert caplog.text.count("the work goes on") == 3
    monkeypatch.setattr(artifacts, "PAUSE_SECONDS", 0.0)
    with artifacts.Progress("steps", logging.getLogger("test")) as progress:
        progress(1, 10)
        monkeypatch.setattr(artifacts, "create_progress_artifact", lambda *_, **__: uuid4())
        progress(2, 10)
    assert published[-1]["data"] == 100.0
