"""Rows planned in lanes: the same to the bit on any number of threads, padding left out, each lane a thread's own."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation import tiny
from tests.policy.test_policy import PLANNER, observe
from wav.errors import CheckpointError
from wav.inference import lanes, native
from wav.inference.adapter import WAVPlannerModel
from wav.planning.planner import Planner
from wav.policy.policy import Policy

pytestmark = pytest.mark.simulator

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler, or WAV_NATIVE=0")


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads; afterwards they are as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny.policy("tabletop")  # batches of three


def act(policy: Policy, rows: int, **options: Any) -> Any:
    """The second call of ``rows`` rows, under two instructions."""
    texts = sorted(policy._prompts)
    for row in range(rows):
        policy.reset(row, f"episode-{row}", 5)
    for call in range(2):
        seen = [observe(10 * row + call, texts[row % 2]) for row in range(rows)]
        output = policy.act(seen, list(range(rows)), with_value=True, with_future=True, **options)
    return output


def same(one: Any, two: Any) -> None:
    """Outputs are equal to the bit."""
    for name in ("actions", "returns", "future"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    for field in dataclasses.fields(one.plan):
        np.testing.assert_array_equal(getattr(one.plan, field.name), getattr(two.plan, field.name))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """(thread, rows, threads of torch, threads of kernels) of every plan."""
    plans: list[tuple[str, int, int, int]] = []

    plan = Planner.plan

    def watch(planner: Planner, context: Any, noise: Any, **options: Any) -> Any:
        name = threading.current_thread().name.split("_")[0]
        plans.append((name, len(noise.keys), torch.get_num_threads(), native.threads()))
        return plan(planner, context, noise, **options)

    monkeypatch.setattr(Planner, "plan", watch)
    return plans


@needs_kernels
@pytest.mark.parametrize("variant", ["planned", "temperature", "unplanned"])
def test_threads_change_no_bit(
    policy: Policy, torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    monkeypatch.setattr(lanes, "WORTH", 1)  # threads without a row take candidates
    torch_threads(1)
    wanted = act(policy, 3, variant=variant)
    for threads in (2, 3, 7):
        torch_threads(threads)
        same(act(policy, 3, variant=variant), wanted)
        assert torch.get_num_threads() == threads


@needs_kernels
def test_lanes_have_their_rows_and_their_share_of_the_threads(
    policy: Policy, torch_threads: Callable[[int], None], watched: list[tuple[str, int, int, int]]
) -> None:
    """Torch's operations stay on one thread, a call has no more threads than torch had, and padding is not planned."""
    expected = {
        (1, 3): [("MainThread", 3, 1, 1)],
        (2, 3): [("wav-lane", 1, 1, 1), ("wav-lane", 2, 1, 1)],
        (7, 3): [("wav-lane", 1, 1, 2)] * 3,
        (2, 1): [("MainThread", 1, 1, 2)],
    }
    for (threads, rows), plans in expected.items():
        torch_threads(threads)
        watched.clear()
        act(policy, rows)
        assert sorted(watched) == sorted(plans * 2)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("wav-lane")]


@needs_kernels
def test_threads_without_a_row_of_their_own_take_candidates(
    policy: Policy, torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row on two threads: candidates in two shares, which change no bit; the plan that is acted on has one.

    A small model's are left together.
    """
    seen: list[tuple[str, int]] = []
    features = WAVPlannerModel.video_features

    def watch(model: Any, context: Any, noise: torch.Tensor, steps: int) -> Any:
        seen.append((threading.current_thread().name.split("_")[0], noise.shape[1]))
        return features(model, context, noise, steps)

    candidates = PLANNER.video_samples
    split = [("wav-lane", candidates // 2), ("wav-lane", candidates - candidates // 2)]
    together = [("MainThread", candidates)]
    expected = {
        (1, 1): together,
        (2, 1): split,
        (2, lanes.WORTH): together,
    }
    monkeypatch.setattr(WAVPlannerModel, "video_features", watch)
    outputs = []
    for (threads, worth), calls in expected.items():
        torch_threads(threads)
        monkeypatch.setattr(lanes, "WORTH", worth)
        seen.clear()
        outputs.append(act(policy, 1))
        assert sorted(seen) == sorted([*calls * PLANNER.iterations, ("MainThread", 1)] * 2)
    same(outputs[1], outputs[0])


@needs_kernels
def test_a_share_of_one_candidate_keeps_no_video_features(
    policy: Policy, torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of every layer are kept of the candidate that is acted on, not of those that are only scored."""
    kept: list[bool] = []
    scored = lanes.CandidateLanes.denoise_value

    def watch(self: Any, features: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(features, lanes.SplitFeatures):
            kept.extend(part.layers is not None for part in features.parts)
        return scored(self, features, *rest, **options)

    monkeypatch.setattr(lanes.CandidateLanes, "denoise_value", watch)
    monkeypatch.setattr(lanes, "WORTH", 1)
    torch_threads(PLANNER.video_samples)
    act(policy, 1)
    assert kept == [False] * (2 * PLANNER.iterations * PLANNER.video_samples)


@needs_kernels
@pytest.mark.parametrize("change", [{"video_denoise_steps": 2}])
def test_rows_that_wait_for_each_other_stay_together(
    policy: Policy,
    torch_threads: Callable[[int], None],
    watched: list[tuple[str, int, int, int]],
    change: dict[str, Any],
) -> None:
    torch_threads(2)
    act(policy, 3, planner=PLANNER.model_copy(update=change))
    assert [(name, rows) for name, rows, *_ in watched] == [("MainThread", 3)] * 2


def test_without_the_kernels_the_whole_batch_is_planned_on_torchs_threads(
    monkeypatch: pytest.MonkeyPatch,
    torch_threads: Callable[[int], None],
    watched: list[tuple[str, int, int, int]],
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    torch_threads(2)
    act(tiny.policy("tabletop"), 1)
    assert watched == [("MainThread", 3, 2, 2)] * 2


@needs_kernels
def test_a_lane_that_fails_fails_the_call(
    policy: Policy, torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise CheckpointError("planner: the actions are not finite")

    monkeypatch.setattr(Planner, "plan", fail)
    torch_threads(2)
    with pytest.raises(CheckpointError, match="not finite"):
        act(policy, 3)
    assert torch.get_num_threads() == 2
    assert native.threads() == 2


@pytest.mark.parametrize(("rows", "count", "sizes"), [(8, 2, [4, 4]), (5, 3, [1, 2, 2]), (1, 4, [1]), (3, 1, [3])])
def test_shares_are_even_and_complete(rows: int, count: int, sizes: list[int]) -> None:
    parts = lanes.shares(rows, count)
    assert [part.stop - part.start for part in parts] == sizes
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
