"""``model.value_expert: false`` after training: evaluation, report, export and ``wav act`` of the baseline."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation import fakes
from tests.evaluation.fakes import FakePolicy, FakePool, settings
from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, Stages, make_stages
from wav import cli
from wav.data.store import EpisodeStore
from wav.errors import ConfigError
from wav.evaluation.act import act_episodes
from wav.evaluation.evaluate import applicable, evaluate
from wav.evaluation.held_out import held_out_values
from wav.evaluation.report import build_report
from wav.evaluation.tables import metrics_table
from wav.planning import VARIANTS
from wav.policy.export import Checkpoint, export_policy, load_export, policy_from_stages
from wav.policy.policy import Policy
from wav.sim.registry import select_tasks

BASELINE = SETTINGS.model_copy(
    update={
        "model": SETTINGS.model.model_copy(update={"value_expert": False}),
        "eval_libero": SETTINGS.eval_libero.model_copy(
            update={"episodes_per_task": 1, "swapped_episodes": 1, "videos": 1, "video_chunks": 2, "batch_size": 2}
        ),
    }
)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return make_stages(tmp_path_factory.mktemp("baseline"), value_expert=False)


@pytest.fixture(scope="module")
def parts(stages: Stages) -> tuple[Policy, Checkpoint]:
    return policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=2, device="cpu")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    """Counting simulators that show images of the policy's size, for at most 12 steps."""

    class Larger(fakes.FakeSim):
        def observation(self):
            seen = super().observation()
            return dataclasses.replace(seen, images={v: np.tile(i, (2, 2, 1)) for v, i in seen.images.items()})

    def short(suite, names):
        return tuple(dataclasses.replace(spec, max_steps=12) for spec in select_tasks(suite, names))

    monkeypatch.setattr(fakes, "FakeSim", Larger)
    monkeypatch.setattr("wav.evaluation.protocol.select_tasks", short)
    monkeypatch.setattr("wav.evaluation.act.select_tasks", short)
    return FakePool(2)


def test_conditions_that_plan_are_not_applicable() -> None:
    assert applicable(VARIANTS, True) == (VARIANTS, {})
    variants, left_out = applicable(VARIANTS, False)
    assert variants == ("unplanned",)
    assert set(left_out) == {"planned", "temperature"}
    assert "no value expert" in left_out["planned"]
    with pytest.raises(ConfigError, match=r"eval_libero\.variants = planned, temperature: .*ask for unplanned"):
        applicable(("planned", "temperature"), False)


def test_refusal_comes_before_the_first_episode(tmp_path: Path) -> None:
    pool, policy = FakePool(3), FakePolicy()
    policy.has_values = False
    with pytest.raises(ConfigError, match="no value expert"):
        evaluate(settings(variants=("planned",)), policy, tmp_path, pool=pool, checkpoint="w")
    assert (pool.resets, policy.calls, list(tmp_path.iterdir())) == ([], [], [])


@pytest.mark.integration
def test_evaluation_and_report(
    stages: Stages, parts: tuple[Policy, Checkpoint], pool: FakePool, tmp_path: Path
) -> None:
    policy, checkpoint = parts
    out = tmp_path / "reports" / "eval"
    metrics = evaluate(BASELINE, policy, out, pool=pool, checkpoint=checkpoint.digest)
    assert metrics["unplanned"]["episodes"] == 2
    assert not {"planned", "temperature"} & set(metrics)
    assert set(metrics["not_applicable"]) == {"planned", "temperature"}
    assert metrics["paired"] == {}
    assert set(metrics["swapped"]) == {"unplanned"}
    assert metrics == json.loads((out / "metrics.json").read_text())
    table = metrics_table(metrics)
    assert "planned: not applicable, the model has no value expert" in table

    found = held_out_values(policy, EpisodeStore.open(stages.episodes), None, BASELINE, out)
    assert found["predicted_value"] == found["real_value"] == []
    assert len(found["psnr"]) == len(found["steps"])
    assert list((out / "predictions").glob("*-held-out-*-imagined.png"))

    page = build_report(tmp_path, BASELINE).read_text()
    assert "variant planned: not applicable" in page
    assert "Predicted and real return" not in page
    assert "Predicted future frames" in page
    assert "rolled out over several chunks from the first frame" in page

    card = (
        export_policy(policy, checkpoint, tmp_path / "e", settings=BASELINE, metrics=metrics, table=table) / "README.md"
    ).read_text()
    assert "--variant unplanned" in card
    assert "without value expert" in card
    assert table in card


def test_export_and_act(
    stages: Stages, parts: tuple[Policy, Checkpoint], pool: FakePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_policy(*parts, tmp_path / "export", settings=BASELINE, metrics=None)
    loaded = load_export(folder, batch_size=2, device="cpu")
    assert loaded.model.shapes.value is None
    assert not any(name.startswith("value.") for name, _ in loaded.model.model.named_parameters())
    lines: list[str] = []
    options = {"suite": "tabletop", "episodes": 2, "device": "cpu", "report": lines.append}

    def factory(suite, data, workers, slots):
        return contextlib.nullcontext(pool)

    results = act_episodes(folder, variant="unplanned", pool_factory=factory, **options)
    assert len(results) == len(lines) == 2
    assert "value" not in "".join(lines)
    resets = len(pool.resets)
    for variant in ("planned", "temperature"):
        with pytest.raises(ConfigError, match=f"--variant = {variant}: the model has no value expert"):
            act_episodes(folder, variant=variant, pool_factory=factory, **options)
    assert len(pool.resets) == resets
    assert cli.main(["act", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ask for unplanned" in error
