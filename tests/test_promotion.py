"""Promotion: the rule, same episodes only, identities that see what matters, and one winner of two retrains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.retrain import record
from tests.helpers.stage_folders import SETTINGS
from wav import promotion
from wav.errors import CheckpointError, ConfigError, DataError, StorageError
from wav.evaluation.records import write_record
from wav.io.storage import ObjectInfo, open_store
from wav.io.storage.file import FileStore
from wav.promotion import Champion, Outcomes, Rules


def outcomes(*values: int) -> Outcomes:
    return {f"lift/{i:03d}": bool(value) for i, value in enumerate(values)}


CHAMPION = Champion("p1", "c1", "e1", outcomes(1, 0), (), "abc", "run", "2026-01-01T00:00:00+00:00")


def test_the_first_policy_becomes_champion_if_it_has_skill() -> None:
    assert promotion.judge(outcomes(*[1] * 6, *[0] * 44), None, Rules()).promote
    assert not promotion.judge(outcomes(*[1] * 5, *[0] * 45), None, Rules()).promote
    assert promotion.judge(outcomes(0, 0), None, Rules(floor=0)).promote, "a floor of 0 lets everything pass"


@pytest.mark.parametrize(
    ("candidate", "champion", "margin", "promote"),
    [
        ([1] * 20, [1] * 20, 0.0, True),  # the same outcomes are not worse by any margin
        ([1] * 20, [0] * 20, 0.0, True),
        ([0] * 20, [1] * 20, 0.5, False),
        ([1] * 18 + [0] * 2, [1] * 20, 0.1, False),  # 10 points down: the interval reaches further
        ([1] * 18 + [0] * 2, [1] * 20, 0.3, True),
    ],
)
def test_the_interval_decides(candidate: list[int], champion: list[int], margin: float, promote: bool) -> None:
    current = promotion.champion_after(replace(CHAMPION, outcomes=outcomes(*champion)), None)
    verdict = promotion.judge(outcomes(*candidate), current, Rules(margin, total=1, floor=0))
    assert verdict.promote is promote, verdict.reason
    assert verdict.difference is not None
    assert verdict.difference.episodes == 20


def test_a_loss_against_the_best_so_far_is_bounded() -> None:
    """Not worse than the champion, which is itself below the best: no further."""
    current = replace(CHAMPION, outcomes=outcomes(*[1] * 17, *[0] * 3), best=0.95, best_policy="p0")
    rules = Rules(margin=0.3, total=0.1, floor=0)
    assert promotion.judge(outcomes(*[1] * 17, *[0] * 3), current, rules).promote
    verdict = promotion.judge(outcomes(*[1] * 16, *[0] * 4), current, rules)
    assert verdict.reason == "too far below the best champion so far: 0.800 where p0 reached 0.950, total 0.1"
    after = promotion.champion_after(replace(CHAMPION, policy="p2"), replace(current, refused=("p7",)), {"p9"})
    assert (after.best, after.best_policy, after.previous) == (0.95, "p0", "p1")
    assert after.refused == ("p7", "p9")


def test_a_gain_on_other_suites_does_not_pay_for_a_certain_loss_on_one() -> None:
    def of(suite: str, solved: int) -> Outcomes:
        return {f"{suite}/lift/{i:03d}": i < solved for i in range(50)}

    current = replace(CHAMPION, outcomes=of("libero_goal", 30) | of("libero_10", 40))
    verdict = promotion.judge(of("libero_goal", 50) | of("libero_10", 25), current, Rules(margin=0.1, total=1, floor=0))
    assert verdict.difference is not None
    assert verdict.difference.difference == pytest.approx(0.05)
    assert verdict.reason.startswith("worse than the champion on libero_10: difference -0.300 [")
    assert {suite: own.difference for suite, own in verdict.suites.items()} == pytest.approx(
        {"libero_goal": 0.4, "libero_10": -0.3}
    )
    assert promotion.judge(of("libero_goal", 50) | of("libero_10", 39), current, Rules(total=1, floor=0)).promote
    assert promotion.suite_outcomes(CHAMPION.outcomes) == {}


@pytest.mark.parametrize("name", ["margin", "total", "floor"])
def test_rules_are_rates(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} = 1.5: must lie in \[0, 1\]"):
        Rules(**{name: 1.5})


def test_an_old_pointer_is_read_and_evaluated_again() -> None:
    """Its outcomes were taken from records without asking whose they were."""
    raw = json.loads(CHAMPION.to_json())
    for name in ("reached", "best", "best_policy", "refused"):
        del raw[name]
    read = Champion.from_json(json.dumps({**raw, "format": 1}).encode(), "x")
    assert (read.evaluation, read.reached, read.best, read.best_policy) == ("", 0.5, 0.5, "p1")
    with pytest.raises(StorageError, match="x: not a champion pointer"):
        Champion.from_json(json.dumps({**raw, "format": 1, "promoted": "yesterday"}).encode(), "x")


ODD_POINTERS = [{"outcomes": [1]}, {"outcomes": {"a/1": "x"}}, {"best": "x"}, {"reached": None}, {"best": float("nan")}]
ODD_POINTERS += [{"policy": 1}, {"lock": None}, {"refused": [[1]]}]
ODD_POINTERS += [{"files": [{"path": "a", "key": 1, "version": "", "size": 1, "sha256": ""}]}]


@pytest.mark.parametrize("data", [b"[" * 5000, b"null", b'"a"', b"1", b"[]", b"\xff", *ODD_POINTERS])
def test_a_damaged_or_edited_pointer_is_one_sentence(data: bytes | dict[str, object]) -> None:
    raw = data if isinstance(data, bytes) else json.dumps(json.loads(CHAMPION.to_json()) | data).encode()
    with pytest.raises(StorageError, match=r"x: not a champion pointer.*restore an older version of it"):
        Champion.from_json(raw, "x")


def test_success_after_the_protocol_s_limit_is_none(tmp_path: Path) -> None:
    for index, steps in enumerate((5, 6)):
        path = tmp_path / "episodes" / "planned" / f"lift-{index:03d}.json"
        write_record(
            path, record(task="lift", init_index=index, success=True, steps=steps, protocol_steps=5, checkpoint="c")
        )
    assert promotion.read_outcomes(tmp_path, "planned", "c") == outcomes(1, 0)
    with pytest.raises(DataError, match=r"lift-000.json: of checkpoint c, not d; remove the file and evaluate again"):
        promotion.read_outcomes(tmp_path, "planned", "d")
    with pytest.raises(DataError, match="no unplanned episodes"):
        promotion.read_outcomes(tmp_path, "unplanned", "c")


def test_other_episodes_are_not_compared() -> None:
    with pytest.raises(DataError, match=r"lift/002.*evaluate the champion again"):
        promotion.compare(outcomes(1, 1, 1), outcomes(1, 1))


def test_the_evaluation_identity_sees_code_simulator_and_protocol_but_not_the_planner() -> None:
    versions = {"mujoco": "3.3.2"}
    same = promotion.evaluation_identity(SETTINGS, "code", versions)
    planner = SETTINGS.model_copy(update={"planner": SETTINGS.planner.model_copy(update={"iterations": 2})})
    assert promotion.evaluation_identity(planner, "code", versions) == same
    protocol = SETTINGS.eval_libero.model_copy(update={"episodes_per_task": 3})
    unplanned = SETTINGS.eval_libero.model_copy(update={"variants": ("unplanned",)})
    others = [
        promotion.evaluation_identity(SETTINGS, "other code", versions),
        promotion.evaluation_identity(SETTINGS, "code", {"mujoco": "3.3.3"}),
        promotion.evaluation_identity(SETTINGS.model_copy(update={"eval_libero": protocol}), "code", versions),
        promotion.evaluation_identity(SETTINGS.model_copy(update={"eval_libero": unplanned}), "code", versions),
    ]
    assert same not in others


def test_a_policy_is_its_weights_and_settings_not_its_scores(tmp_path: Path) -> None:
    def export(name: str, digest: str, iterations: int, score: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings = {"data": {}, "model": {}, "planner": {"iterations": iterations}, "export": {}}
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "manifest.json").write_text(json.dumps({"checkpoint": {"digest": digest}, "dtype": "float32"}))
        (folder / "metrics.json").write_text(json.dumps(score))
        return folder

    first = promotion.policy_identity(export("a", "1", 1, 0.5))
    assert promotion.policy_identity(export("b", "1", 1, 0.9)) == first
    assert promotion.policy_identity(export("c", "2", 1, 0.5)) != first
    assert promotion.policy_identity(export("d", "1", 2, 0.5)) != first
    same = json.loads((export("e", "1", 1, 0.5) / "settings.json").read_text())
    for compile in (False, True, "auto", "off", "on"):
        (tmp_path / "e" / "settings.json").write_text(json.dumps(same | {"export": {"compile": compile}}))
        assert (promotion.policy_identity(tmp_path / "e") == first) is not (compile in (True, "on"))
    (tmp_path / "a" / "settings.json").write_text("{}")
    with pytest.raises(CheckpointError, match="incomplete"):
        promotion.policy_identity(tmp_path / "a")


def test_two_retrains_cannot_both_win(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    assert promotion.read_champion(store, "x") is None
    assert promotion.promote(store, "x", CHAMPION, None) is not None
    assert promotion.promote(store, "x", replace(CHAMPION, policy="p2"), None) is None, "both found no champion"
    read = promotion.read_champion(store, "x")
    assert read is not None
    assert read[0] == CHAMPION
    assert promotion.promote(store, "x", replace(CHAMPION, policy="p2"), read[1]) is not None
    assert promotion.promote(store, "x", replace(CHAMPION, policy="p3"), read[1]) is None, "both read the same champion"
    last = promotion.read_champion(store, "x")
    assert last is not None
    assert last[0].policy == "p2"


class Deaf(FileStore):
    """A store whose answer to a write got lost: the client tried again and met its own object."""

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo | None:
        assert super().put_if_match(key, data, etag)
        return super().put_if_match(key, data, etag)

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo | None:
        assert super().put_if_absent(key, data)
        return super().put_if_absent(key, data)


def test_a_retrain_whose_answer_was_lost_knows_that_it_won(tmp_path: Path) -> None:
    store = Deaf(tmp_path)
    first = promotion.promote(store, "x", CHAMPION, None)
    assert first is not None
    assert promotion.promote(store, "x", replace(CHAMPION, policy="p2"), first) is not None
    read = promotion.read_champion(store, "x")
    assert read is not None
    assert read[0].policy == "p2"


def test_a_promoted_policy_comes_back_whole_and_a_damaged_pointer_is_named(tmp_path: Path) -> None:
    store, export = open_store((tmp_path / "store").as_uri()), tmp_path / "export"
    (export / "model").mkdir(parents=True)
    (export / "model" / "weights").write_bytes(b"w" * 100)
    (export / "manifest.json").write_text("{}")
    files = promotion.upload_policy(store, export, "policies/p1/export")
    promotion.promote(store, "x", replace(CHAMPION, files=files), None)
    read = promotion.read_champion(store, "x")
    assert read is not None
    back = promotion.download_policy(store, read[0], tmp_path / "back")
    assert (back / "model" / "weights").read_bytes() == b"w" * 100
    assert (back / "manifest.json").read_text() == "{}"
    (back / "model" / "weights").write_bytes(b"v" * 100)
    promotion.download_policy(store, read[0], tmp_path / "back")
    assert (back / "model" / "weights").read_bytes() == b"w" * 100
    store.put_bytes(promotion.pointer_key("x"), b"{")
    with pytest.raises(StorageError, match=r"champions/x.json.*restore an older version"):
        promotion.read_champion(store, "x")
