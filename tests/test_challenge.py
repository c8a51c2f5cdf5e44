"""A candidate against the champion: equal terms, who wins, what is kept, what no accident undoes; a year of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prefect.logging import disable_run_logger

from flows import artifacts, challenge
from flows.challenge import Retrain, compare, meet, promote
from flows.checkout import Finished
from tests.helpers.retrain import SETTINGS, Elsewhere, policy, record, retrain_of
from wav import promotion
from wav.errors import DataError, TrainingError
from wav.evaluation.records import write_record
from wav.promotion import Champion, Outcomes, Rules, Verdict

TASKS = SETTINGS.data.tasks


def outcomes(solved: int, of: int = 20) -> Outcomes:
    return {f"lift_red_cube/{i:03d}": i < solved for i in range(of)}


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No server: nothing is published, loggers need no run."""
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda *_, **__: None)
    monkeypatch.setattr(challenge, "champion_outcomes", challenge.champion_outcomes.fn)
    with disable_run_logger():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Retrain:
    """A retrain that meets champion p1 with 16 of 20 under evaluation ``e1``."""
    return retrain_of(tmp_path, Rules(margin=0.4, total=0.25), policy("p1", outcomes(16)))


def checkout(run: Retrain) -> Elsewhere:
    assert isinstance(run.checkout, Elsewhere)
    return run.checkout


def champion(run: Retrain) -> Champion:
    found = promotion.read_champion(run.store, "tabletop")
    assert found is not None
    return found[0]


def evaluates(run: Retrain, found: Outcomes, of: str = "weights of p1") -> None:
    """The checkout's evaluation of the champion gives this, from the champion's own files in the store."""

    def answer(arguments: tuple[str, ...]) -> Finished:
        given = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        assert (Path(given["--checkpoint"]) / "weights").read_bytes() == b"champion's weights"
        for name, success in found.items():
            task, index = name.split("/")
            path = Path(given["--out"]) / "reports/eval/episodes/planned" / f"{task}-{index}.json"
            limits = {"steps": 5, "protocol_steps": 5, "checkpoint": of}
            write_record(path, record(task=task, init_index=int(index), success=success, **limits))
        return Finished(0, ("done",))

    checkout(run).answer = answer


def face(run: Retrain, candidate: Champion) -> Verdict:
    """One retrain from the meeting to the verdict."""
    meet(run)
    verdict = promote.fn(run, candidate, compare(run, candidate))
    assert isinstance(verdict, Verdict)
    return verdict


def verdicts(run: Retrain) -> list[tuple[str, str]]:
    """Policy and verdict of everything that was kept, by time."""
    found = [json.loads(run.store.get_bytes(info.key)) for info in run.store.list("verdicts/tabletop/")]
    return [(entry["policy"], entry["verdict"]) for entry in found]


LATER = "2026-01-11T00:00:00+00:00"


def test_an_unchanged_evaluation_needs_no_new_episodes(run: Retrain) -> None:
    assert face(run, policy("p2", outcomes(18), promoted=LATER)).promote
    assert checkout(run).asked == []
    assert (champion(run).policy, champion(run).previous) == ("p2", "p1")
    assert verdicts(run) == [("p1", "promoted"), ("p2", "promoted")]


def test_the_champion_is_evaluated_again_when_the_evaluation_changed(run: Retrain) -> None:
    """By the checkout's code, on its own files from the store, on the suite's tasks; what it reached is kept."""
    evaluates(run, outcomes(14))
    assert face(run, policy("p2", outcomes(2), "e2", LATER)).kind == "refused"
    (arguments,) = checkout(run).asked
    assert arguments[:2] == ("-m", "flows.eval_run")
    assert [b for a, b in itertools.pairwise(arguments) if a == "--task"] == list(TASKS)
    assert arguments[arguments.index("--variant") + 1] == "planned"
    kept = champion(run)
    assert (kept.policy, kept.evaluation, kept.outcomes, kept.reached) == ("p1", "e2", outcomes(14), 0.8)
    assert face(run, policy("p3", outcomes(15), "e2", LATER)).promote
    assert len(checkout(run).asked) == 1


def test_outcomes_of_other_weights_are_refused(run: Retrain) -> None:
    evaluates(run, outcomes(14), of="another policy's")
    with pytest.raises(DataError, match=r"lift_red_cube-000.json: of checkpoint another poli, not weights of p"):
        face(run, policy("p2", outcomes(20), "e2", LATER))


def test_code_that_makes_the_champion_worse_is_refused(run: Retrain) -> None:
    """Whether the pipeline still makes the champion or a candidate that shares the broken code; the bar stays up."""
    before = champion(run)
    evaluates(run, outcomes(0))
    for name in ("p1", "p2"):
        candidate = replace(policy(name, outcomes(0), "e2", LATER), checkpoint=f"weights of {name}")
        with pytest.raises(TrainingError, match=r"made the champion worse.*reach 0.000 where they reached 0.800"):
            face(run, candidate)
        assert champion(run) == before


def test_small_losses_by_code_do_not_add_up(run: Retrain) -> None:
    """The champion's weights lose a tenth with every change of the code: the third is refused."""
    for number, solved in enumerate((14, 12)):
        assert face(run, policy("p1", outcomes(solved), f"e{number + 2}", LATER)).kind == "unchanged"
    with pytest.raises(TrainingError, match="made the champion worse"):
        face(run, policy("p1", outcomes(10), "e4", LATER))
    assert champion(run).outcomes == outcomes(12)


def test_an_evaluation_that_was_made_harder_on_purpose_is_taken(run: Retrain) -> None:
    run.harder = True
    assert face(run, policy("p1", outcomes(4), "e2", LATER)).reason.startswith("only the evaluation changed")
    kept = champion(run)
    assert (kept.reached, kept.best, kept.best_policy, kept.evaluation) == (0.2, 0.2, "p1", "e2")


def test_a_champion_that_changed_while_the_old_one_was_evaluated_stays(run: Retrain) -> None:
    evaluates(run, outcomes(16))
    answer, other = checkout(run).answer, replace(champion(run), policy="p9")

    def overtaken(arguments: tuple[str, ...]) -> Finished:
        assert run.current is not None
        assert promotion.promote(run.store, "tabletop", other, run.current[1])
        return answer(arguments)

    checkout(run).answer = overtaken
    verdict = face(run, policy("p2", outcomes(18), "e2", LATER))
    assert "another retrain changed the champion meanwhile" in verdict.reason
    assert champion(run) == other


def test_a_champion_that_cannot_be_evaluated_stays_and_the_way_out_is_named(run: Retrain) -> None:
    before = champion(run)
    checkout(run).answer = lambda arguments: Finished(1, ("export: format 0 is too old",))
    told = r"format 0 is too old; it stays; .*delete .*champions/tabletop.json and everything below .*verdicts/tabletop"
    with pytest.raises(TrainingError, match=told):
        face(run, policy("p2", outcomes(18), "e2", LATER))
    assert champion(run) == before


def test_of_two_retrains_that_met_the_same_champion_one_wins(run: Retrain) -> None:
    (run.checkout.folder / "dvc.lock").write_text("stages: {}")
    first, second = (policy(name, outcomes(18), promoted=LATER) for name in ("p2", "p3"))
    judged = [compare(run, one) for one in (first, second)]
    told = [promote.fn(run, one, verdict) for one, verdict in zip((first, second), judged, strict=True)]
    assert [one.kind for one in told] == ["promoted", "refused"]
    assert "another retrain changed the champion meanwhile" in told[1].reason
    assert (champion(run).policy, champion(run).lock) == ("p2", "policies/p2/dvc.lock")
    assert {entry.path for entry in champion(run).files} == {"weights", "manifest.json"}


def test_a_refusal_is_kept_and_changes_nothing(run: Retrain) -> None:
    before = champion(run)
    assert "may be worse" in face(run, policy("p2", outcomes(4), promoted=LATER)).reason
    assert champion(run) == before
    assert verdicts(run) == [("p1", "promoted"), ("p2", "refused")]


def test_a_policy_without_skill_never_becomes_the_first_champion(tmp_path: Path) -> None:
    run = retrain_of(tmp_path)
    assert "too little skill: 0 of 50" in face(run, policy("p1", outcomes(0, 50))).reason
    assert promotion.read_champion(run.store, "tabletop") is None
    assert face(run, policy("p2", outcomes(20, 50), promoted=LATER)).promote


def test_what_was_taken_back_by_hand_is_not_promoted_again(run: Retrain) -> None:
    """The pointer of p1 is copied over that of p2, as docs/operations.md says; p3 is new and may win."""
    old = run.store.get_bytes("champions/tabletop.json")
    assert face(run, policy("p2", outcomes(18), promoted=LATER)).promote
    run.store.put_bytes("champions/tabletop.json", old)
    again = replace(policy("p2", outcomes(18)), promoted="2026-01-18T00:00:00+00:00")
    assert "was taken back by hand" in face(run, again).reason
    assert face(run, policy("p3", outcomes(18), promoted="2026-01-25T00:00:00+00:00")).promote
    late = replace(again, promoted="2026-02-01T00:00:00+00:00")
    assert "was taken back by hand" in face(run, late).reason
    assert champion(run).policy == "p3"


def test_a_pointer_that_is_gone_is_not_a_new_beginning(run: Retrain) -> None:
    run.store.delete("champions/tabletop.json")
    told = r"no champion tabletop, though p1 was promoted .*restore an older version of .*champions/tabletop.json"
    with pytest.raises(TrainingError, match=told):
        meet(run)


class Year:
    """52 Sundays; the scenario says what a candidate's true success rate is.

    An episode is as hard for all policies, but for one in ten, which luck decides anew every time.
    """

    def __init__(self, rules: Rules, truth: float, seed: int, episodes: int = 200) -> None:
        self.random, self.episodes, self.rules = np.random.default_rng(seed), episodes, rules
        self.hard = self.random.permutation(episodes) / episodes
        self.truth, self.promoted = truth, 0
        self.champion = promotion.champion_after(policy("first", self.draw(truth)), None)

    def draw(self, truth: float) -> Outcomes:
        drawn, luck = self.random.random((2, self.episodes))
        solved = np.where(luck < 0.1, drawn, self.hard) < truth
        return {f"lift/{i:03d}": bool(value) for i, value in enumerate(solved)}

    def go(self, quality: Callable[[float], float]) -> Year:
        for week in range(52):
            truth = quality(self.truth)
            candidate = policy(f"p{week:02d}", self.draw(truth))
            if promotion.judge(candidate.outcomes, self.champion, self.rules).promote:
                self.champion = promotion.champion_after(candidate, self.champion)
                self.truth, self.promoted = truth, self.promoted + 1
        return self


@pytest.mark.parametrize("seed", range(8))
def test_a_year_of_small_losses_is_bounded(seed: int) -> None:
    """Each candidate is a point worse than the champion. Compared with that one alone, half of the skill goes."""
    unbounded = Year(Rules(margin=0.1, total=1.0), 0.95, seed).go(lambda truth: truth - 0.01)
    assert unbounded.truth < 0.7
    bounded = Year(Rules(margin=0.1, total=0.1), 0.95, seed).go(lambda truth: truth - 0.01)
    assert bounded.truth >= 0.95 - 0.1 - 0.06, "the bound, and what luck in 200 episodes adds"


@pytest.mark.parametrize("seed", range(8))
def test_a_year_of_equal_or_better_policies_is_not_held_up(seed: int) -> None:
    """The luckiest champion so far is no bar that its equals cannot pass."""
    equal = Year(Rules(), 0.9, seed).go(lambda truth: truth)
    assert equal.promoted >= 26
    better = Year(Rules(), 0.6, seed).go(lambda truth: min(0.95, truth + 0.01))
    assert better.truth >= 0.9
