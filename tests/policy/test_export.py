"""Stage folders to a policy to an export and back: the same actions, and every mix-up refused."""

import json
import logging
import shutil

import numpy as np
import pytest

from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, make_stages
from wav.data.store import EpisodeStore
from wav.errors import CheckpointError, DataError, StorageError, WavError
from wav.evaluation.tables import metrics_table
from wav.inference.cpu import kernels
from wav.planning.types import Levels
from wav.policy.export import base_model, export_policy, load_export, policy_from_stages, verify_export
from wav.policy.policy import Observation, Policy

METRICS = {
    "suite": "tabletop",
    "seed": 7,
    "render": "fast",
    "budget": "protocol",
    "execute_steps": 3,
    "planned": {
        "success_rate": 0.84,
        "episodes": 50,
        "wilson_low": 0.71,
        "wilson_high": 0.92,
        "tasks": {"lift_red_cube": {"success_rate": 0.84, "episodes": 50, "wilson_low": 0.71, "wilson_high": 0.92}},
    },
    "swapped": {},
    "versions": {"torch": "2", "mujoco": "3"},
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return make_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def policy(stages):
    return policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def exported(policy, tmp_path_factory):
    metrics = METRICS | {"checkpoint": policy[1].digest}
    out = tmp_path_factory.mktemp("export") / "export"
    return export_policy(
        *policy, out, settings=SETTINGS.for_stage("export"), metrics=metrics, table=metrics_table(metrics)
    )


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture
def joint(stages, tmp_path):
    return shutil.copytree(stages.joint, tmp_path / "joint")


def chunk(policy, stages, variant="planned"):
    episode = EpisodeStore.open(stages.episodes)[1]
    policy.reset("row", "episode", 3)
    actions = []
    for step in (0, 4):
        images = {view: np.asarray(frames[step]) for view, frames in episode.images.items()}
        seen = Observation(images, np.asarray(episode.state[step]), "lift the green cube")
        actions.append(policy.act([seen], ["row"], variant=variant).actions[0])
    return np.stack(actions)


@pytest.mark.parametrize("variant", ["planned", "unplanned", "temperature"])
def test_export_acts_as_the_stages_do(policy, exported, stages, variant):
    loaded = load_export(exported, batch_size=2, device="cpu")
    np.testing.assert_array_equal(chunk(loaded, stages, variant), chunk(policy[0], stages, variant))


def test_planning_reads_what_the_checkpoint_says_training_showed(stages, joint, tmp_path):
    """Whatever a parameter file says by then: stage folders and exports carry section coupling with the weights."""
    meta = json.loads((joint / "checkpoint.json").read_text())
    meta["coupling"] = {"mode": "both", "video_schedule": [1.0, 0.6], "value_level": 0.2}
    (joint / "checkpoint.json").write_text(json.dumps(meta))
    found = policy_from_stages(joint, stages.latents, DATA, PLANNER, batch_size=2, device="cpu")
    assert found[0].levels == Levels((1.0, 0.6), 0.2)
    assert SETTINGS.coupling.mode == "none"
    out = export_policy(*found, tmp_path / "export", settings=SETTINGS.for_stage("export"), metrics=None)
    assert load_export(out, batch_size=2, device="cpu").levels == found[0].levels
    meta["coupling"]["video_schedule"] = [1.0, 0.9]
    (joint / "checkpoint.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"features are read at 0\.9"):
        policy_from_stages(joint, stages.latents, DATA, PLANNER, batch_size=2, device="cpu")


def test_export_needs_nothing_else(exported, stages, policy, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "elsewhere")
    loaded = load_export(moved, batch_size=2, device="cpu")
    assert loaded.text_encoder.encode(["put the can in the bin"])[1].any()
    assert str(stages.latents) not in "".join(p.read_text() for p in moved.rglob("*.json"))
    assert loaded.conventions == policy[0].conventions
    assert loaded.statistics.digest == policy[1].statistics


def test_card_and_manifest_tell_the_results(exported, policy):
    card = (exported / "README.md").read_text()
    assert "84% of 50 [71, 92]" in card
    assert "wav act USER/NAME --suite tabletop" in card
    assert "3 actions executed per call" in card
    assert "| gripper | -1 open, +1 close |" in card
    assert policy[1].digest[:16] in card
    manifest = verify_export(exported)
    assert manifest["checkpoint"]["digest"] == policy[1].digest
    assert {"metrics.json", "settings.json", "statistics.json"} <= {f["path"] for f in manifest["files"]}
    assert set(json.loads((exported / "settings.json").read_text())) == {
        "data",
        "model",
        "planner",
        "export",
        "coupling",
    }


def test_an_unevaluated_export_says_so(policy, tmp_path):
    out = export_policy(*policy, tmp_path / "export", settings=SETTINGS, metrics=None)
    assert "Not evaluated" in (out / "README.md").read_text()
    assert not (out / "metrics.json").exists()


def test_metrics_of_another_checkpoint_are_refused(policy, tmp_path):
    with pytest.raises(CheckpointError, match=r"metrics\.checkpoint = other: .*evaluate them first"):
        export_policy(*policy, tmp_path / "export", settings=SETTINGS, metrics=METRICS | {"checkpoint": "other"})
    assert not list(tmp_path.iterdir())


def test_bfloat16_halves_the_weights(policy, exported, tmp_path):
    half = SETTINGS.model_copy(update={"export": SETTINGS.export.model_copy(update={"dtype": "bfloat16"})})
    out = export_policy(*policy, tmp_path / "export", settings=half, metrics=None)

    def size(folder):
        return sum(p.stat().st_size for p in (folder / "model").glob("*.safetensors"))

    assert size(out) < 0.6 * size(exported)
    assert all(p.dtype.is_floating_point and p.element_size() == 4 for p in policy[0].model.model.parameters())


def test_compiled_code_is_a_setting_of_the_export(policy, exported, tmp_path, monkeypatch, caplog):
    """It travels with the folder and can be overridden; where the CPU kernels run the log says that it does nothing."""
    setting = SETTINGS.model_copy(update={"export": SETTINGS.export.model_copy(update={"compile": "on"})})
    out = export_policy(*policy, tmp_path / "export", settings=setting, metrics=None)
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert load_export(out, device="cpu").compiled
    assert not load_export(out, device="cpu", compile="off").compiled
    assert not load_export(exported, device="cpu").compiled
    assert load_export(exported, device="cpu", compile="on").compiled
    monkeypatch.setattr(kernels, "available", lambda: True)
    with caplog.at_level(logging.INFO):
        assert not load_export(out, device="cpu").compiled
    assert "export.compile = on: no effect here" in caplog.text


def test_an_export_knows_how_it_was_evaluated(exported, copy):
    loaded = load_export(exported, device="cpu")
    assert loaded.execute_steps == 3
    assert loaded.results.to_json()["rates"]["planned"] == {
        "episodes": 50,
        "success_rate": 0.84,
        "wilson_low": 0.71,
        "wilson_high": 0.92,
    }
    (copy / "metrics.json").write_text('{"planned": {}}')
    with pytest.raises(CheckpointError, match=r"metrics\.json: lacks 'episodes'"):
        Policy.load(copy, device="cpu")


def test_the_card_may_be_edited(copy):
    (copy / "README.md").write_text("better words")
    verify_export(copy)
    (copy / "README.md").unlink()
    verify_export(copy)


@pytest.mark.parametrize(
    ("init_from", "found"),
    [
        ("Lightricks/LTX-Video", "Lightricks/LTX-Video"),
        ("agibot-world/Genie-Envisioner/GE_base_fast_v0.1.safetensors", "agibot-world/Genie-Envisioner"),
        ("", ""),
        ("weights", ""),
        ("/weights/ltx", ""),
    ],
)
def test_a_base_model_is_one_on_the_hub(init_from, found):
    assert base_model(init_from) == found


def test_encoders_of_the_hub_are_named_in_the_card(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(policy[0].text_encoder, "source", "google/t5-v1_1-xxl")
    sizes = {}
    for encoders in ("named", "copied"):
        section = SETTINGS.export.model_copy(update={"encoders": encoders})
        settings = SETTINGS.model_copy(update={"export": section})
        out = export_policy(*policy, tmp_path / encoders, settings=settings, metrics=None)
        assert ("[google/t5-v1_1-xxl]" in (out / "README.md").read_text()) == (encoders == "named")
        sizes[encoders] = len(list((out / "text_encoder").iterdir()))
    assert sizes["named"] == 1 < sizes["copied"]


@pytest.mark.parametrize("name", ["model/config.json", "statistics.json", "codec"])
def test_a_missing_part_is_named(copy, name):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.*missing.*export the policy again"):
        load_export(copy, device="cpu")


def test_an_altered_part_is_named(copy):
    weights = next((copy / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{weights.name}: content does not match"):
        load_export(copy, device="cpu")
    weights.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=rf"{weights.name}: truncated"):
        load_export(copy, device="cpu")


@pytest.mark.parametrize(
    "name", ["model/x.safetensors.index.json", "text_encoder/reference.json", "text_encoder/text_encoder/config.json"]
)
def test_a_file_that_the_manifest_does_not_list_is_refused(copy, name):
    (copy / ".gitattributes").write_text("what a hub puts there")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "x").write_text("")
    verify_export(copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name}: is not in the manifest.*remove it"):
        load_export(copy, device="cpu")


def test_a_link_to_a_folder_is_no_part_of_an_export(copy, tmp_path):
    (copy / "model").rename(tmp_path / "elsewhere")
    (copy / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="model: is not in the manifest"):
        verify_export(copy)
    (tmp_path / "link").symlink_to(copy)  # the export itself may lie behind one
    (copy / "model").unlink()
    (tmp_path / "elsewhere").rename(copy / "model")
    verify_export(tmp_path / "link")


def test_what_is_no_export_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_export(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_export(tmp_path)


def test_a_failed_export_leaves_the_old_one(policy, exported, tmp_path, monkeypatch):
    out = shutil.copytree(exported, tmp_path / "export")
    before = (out / "manifest.json").read_text()

    def full(*_, **__):
        raise StorageError("the disk is full")

    monkeypatch.setattr("wav.policy.export.write_manifest", full)
    with pytest.raises(StorageError):
        export_policy(*policy, out, settings=SETTINGS, metrics=None)
    assert (out / "manifest.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def refuse(stages, joint, match, error=CheckpointError):
    with pytest.raises(error, match=match):
        policy_from_stages(joint, stages.latents, DATA, PLANNER, device="cpu")


def test_other_statistics_are_refused(stages, joint):
    path = joint / "episodes_statistics.json"
    raw = json.loads(path.read_text())
    other = json.dumps(raw).replace('"count": 72', '"count": 73')
    assert other != json.dumps(raw)
    path.write_text(other)
    refuse(stages, joint, r"statistics\.json: statistics digest \w+ does not match the checkpoint")


def test_other_latents_and_weights_are_refused(stages, joint):
    meta = json.loads((joint / "checkpoint.json").read_text())
    (joint / "checkpoint.json").write_text(json.dumps(meta | {"latents": "0" * 64}))
    refuse(stages, joint, r"latents: digest .* is not the 000000000000")
    (joint / "checkpoint.json").write_text(json.dumps(meta))
    config = joint / "model" / "config.json"
    whole = config.read_text()
    config.write_text(whole + " ")
    refuse(stages, joint, r"model: digest .* of its checkpoint\.json")
    config.write_text(whole)
    del meta["steps"]
    (joint / "checkpoint.json").write_text(json.dumps(meta))
    refuse(stages, joint, r"lacks 'steps', or is not of this version")
    (joint / "checkpoint.json").unlink()
    refuse(stages, joint, r"checkpoint\.json: missing; run `dvc repro train_joint`", error=DataError)
    assert issubclass(DataError, WavError)
