"""Exports on a hub: one commit with the closed set of files, verified on the way back, errors in one sentence."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from tests.helpers.fake_hub import NAME, TOKEN, fake_hub
from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, make_stages
from tests.policy.test_export import METRICS
from wav import cli
from wav import hub as hub_module
from wav.errors import CheckpointError, DataError, ServiceError
from wav.evaluation.tables import metrics_table
from wav.policy import Observation, Policy
from wav.policy.export import export_policy, load_export, policy_from_stages
from wav.policy.sharing import pull, push


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    stages = make_stages(folder)
    policy = policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=2, device="cpu")
    metrics = METRICS | {"checkpoint": policy[1].digest}
    section = SETTINGS.export.model_copy(update={"datasets": ("owner/demonstrations",)})
    settings = SETTINGS.model_copy(update={"export": section})
    table = metrics_table(metrics)
    return export_policy(*policy, folder / "export", settings=settings, metrics=metrics, table=table)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """huggingface_hub asks six times, with pauses that add up to half a minute."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_module, "SILENCE_SECONDS", 1.0)
    with fake_hub(tmp_path / "huggingface") as found:
        yield found


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def actions(policy):
    policy.reset(0, episode="shared", seed=3)
    image = np.full((DATA.image_height, DATA.image_width, 3), 90, np.uint8)
    state = np.zeros(DATA.state_dim, np.float32)
    return policy.act([Observation(dict.fromkeys(DATA.views, image), state, "lift the red cube")], [0]).actions


def test_one_commit_holds_the_export_and_nothing_else(exported, hub, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / ".env").write_text("what lies about in a folder")
    address, commit = push(copy, NAME)
    assert (address, commit, hub.visibility) == (f"{hub.url}/{NAME}", hub.sha, "private")
    assert len(hub.commits) == 1
    assert set(hub.files) == names(exported) | {".gitattributes"}
    for path in names(exported) - {"README.md"}:
        assert hub.files[path] == (exported / path).read_bytes()
    assert TOKEN.encode() not in b"".join(hub.files.values())
    assert not (tmp_path / "huggingface" / "token").exists()


def test_a_new_push_takes_the_place_of_the_old_one(exported, hub):
    push(exported, NAME)
    hub.files |= {"model/old-00001-of-00002.safetensors": b"", "video.mp4": b"somebody's"}
    push(exported, NAME)
    assert set(hub.files) == names(exported) | {".gitattributes", "video.mp4"}
    assert len(hub.commits) == 2


def test_the_card_tells_what_a_visitor_needs(exported, hub, monkeypatch):
    push(exported, NAME)
    card = ModelCard(hub.files["README.md"].decode())
    told = card.data.to_dict()
    assert told["library_name"] == "wav"
    assert told["pipeline_tag"] == "robotics"
    assert told["license"] == "apache-2.0"
    assert told["datasets"] == ["owner/demonstrations"]
    assert "base_model" not in told
    card.validate()  # asks the hub
    assert "POST /api/validate-yaml" in hub.requests[-1]
    for part in (f'Policy.load("{NAME}")', f"wav serve {NAME}", "84% of 50 [71, 92]", "3 actions executed per call"):
        assert part in card.text
    assert "USER/NAME" not in card.text


def test_what_was_pushed_acts_the_same(exported, hub, tmp_path, capsys):
    assert cli.main(["push", str(exported), NAME, "--public"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/{NAME}: commit {hub.sha[:12]};")
    assert hub.visibility == "public"
    hub.files |= {"README.md": b"edited on the hub", "model/x.safetensors.index.json": b"{}"}
    loaded = Policy.load(NAME, batch_size=2, device="cpu")
    np.testing.assert_array_equal(actions(loaded), actions(load_export(exported, batch_size=2, device="cpu")))
    assert loaded.execute_steps == 3
    assert loaded.results.rates["planned"].wilson_low == 0.71
    assert cli.main(["pull", NAME, str(tmp_path / "new")]) == 0
    assert names(tmp_path / "new") == names(exported)
    with pytest.raises(DataError, match="new: exists; name a new folder"):
        pull(NAME, tmp_path / "new")
    hub.status = 503  # a hub that is down does not matter to what was fetched
    assert Policy.load(NAME, batch_size=2, device="cpu").digest == loaded.digest


def test_a_pulled_export_is_checked_like_any_other(exported, hub, tmp_path):
    push(exported, NAME)
    weights = next(name for name in hub.files if name.startswith("model/") and name.endswith(".safetensors"))
    hub.files[weights] = hub.files[weights][:-1] + b"?"
    with pytest.raises(CheckpointError, match=rf"{NAME} on the hub: .*content does not match"):
        pull(NAME, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    del hub.files["manifest.json"]
    hub.commits.append({})
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json, so is no policy of wav"):
        Policy.load(NAME)
    foreign = {"format": "wav-policy", "version": 1, "files": [{"path": "../x", "bytes": 0, "sha256": ""}]}
    hub.files["manifest.json"] = json.dumps(foreign).encode()
    hub.commits.append({})
    with pytest.raises(DataError, match=r"'\.\./x': is no path of a file below"):
        pull(NAME)


def test_a_damaged_export_is_not_pushed(exported, hub, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "statistics.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"statistics\.json: truncated"):
        push(copy, NAME)
    assert not hub.requests


@pytest.mark.integration
def test_errors_are_one_sentence(exported, hub, tmp_path, monkeypatch, capsys):
    def refused(part, *arguments):
        assert cli.main([str(argument) for argument in arguments]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"wav {arguments[0]}: {NAME}: ")
        assert part in line
        assert len(line) < 500
        assert TOKEN not in line

    def both(part):
        refused(part, "push", exported, NAME)
        refused(part, "pull", NAME)

    refused("no such repository", "pull", NAME)
    monkeypatch.setenv("HF_TOKEN", "another")
    refused("does not know you", "push", exported, NAME)
    hub.files = {}
    refused("no such repository or revision", "pull", NAME, "--revision", "v9")
    for status, part in ((401, "run `hf auth login`, or set HF_TOKEN"), (403, "write access"), (500, "try again")):
        hub.status = status
        both(part)
    hub.status, hub.silent = 0, True
    monkeypatch.setattr(hub_module, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    both("cannot be reached")


def test_nobody_listening_is_one_sentence(exported, tmp_path):
    with fake_hub(tmp_path) as hub:
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        for act in (lambda: push(exported, NAME), lambda: pull(NAME)):
            with pytest.raises(ServiceError, match=r"cannot be reached .*; check the network, HF_ENDPOINT"):
                act()


def test_what_is_no_name_is_refused(exported, tmp_path):
    for name in ("a/b/c", "name", "../x", str(tmp_path)):
        with pytest.raises(DataError, match="write USER/NAME"):
            push(exported, name)
