"""Keys of accounts come from the environment and stay there: no log, artefact or export holds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, make_stages
from tests.policy.test_export import METRICS
from wav.io.storage import open_store
from wav.policy.export import export_policy, policy_from_stages
from wav.training.spec import TrainPaths, make_spec

SECRETS = ("WAVTESTKEYOFACCOUNT", "wav-test-secret-of-account")


def assert_clean(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS), path


def test_export_and_spec_hold_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[1])
    stages = make_stages(tmp_path / "stages")
    policy = policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=2, device="cpu")
    metrics = METRICS | {"checkpoint": policy[1].digest}
    export_policy(*policy, tmp_path / "export", settings=SETTINGS.for_stage("export"), metrics=metrics)
    assert_clean(tmp_path / "export")
    paths = TrainPaths(stages.episodes, stages.latents, tmp_path / "out", tmp_path / "cache")
    spec = make_spec("pretrain_video", SETTINGS, paths, store="s3://wav", endpoint="http://127.0.0.1:9")
    assert not any(secret in spec.to_json() for secret in SECRETS)


def test_errors_of_a_server_that_refuses_hold_no_keys(s3_server, monkeypatch: pytest.MonkeyPatch) -> None:
    from wav.errors import StorageError

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[1])
    with pytest.raises(StorageError) as caught:
        open_store(f"s3://{s3_server.bucket}", s3_server.endpoint).check()
    assert SECRETS[1] not in str(caught.value)
