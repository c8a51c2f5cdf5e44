"""Rows planned on worker threads: the same to the bit on any number of them, and padding left out."""

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
from wav.inference import threads
from wav.inference.cpu import kernels
from wav.inference.torch import TorchPlannerModel
from wav.planning.types import Levels
from wav.policy.policy import Policy

pytestmark = pytest.mark.simulator
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler, or WAV_NATIVE=0")


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
    """(thread, rows, candidates, threads of torch) of every pass for video features."""
    passes: list[tuple[str, int, int, int]] = []
    features = TorchPlannerModel.video_features

    def watch(model: TorchPlannerModel, context: Any, noise: torch.Tensor, levels: tuple[float, ...]) -> Any:
        name = threading.current_thread().name.split("_")[0]
        passes.append((name, *noise.shape[:2], torch.get_num_threads()))
        return features(model, context, noise, levels)

    monkeypatch.setattr(TorchPlannerModel, "video_features", watch)
    return passes


@needs_kernels
@pytest.mark.parametrize("levels", [Levels(), Levels((1.0, 0.5), 0.1)])
@pytest.mark.parametrize("variant", ["planned", "temperature", "unplanned"])
def test_threads_change_no_bit(
    policy: Policy,
    torch_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    levels: Levels,
) -> None:
    monkeypatch.setattr(threads, "WORTH", 1)  # threads without a row take candidates
    monkeypatch.setattr(policy, "levels", levels)
    torch_threads(1)
    wanted = act(policy, 3, variant=variant, planner=PLANNER)
    for count in (2, 3, 7):
        torch_threads(count)
        same(act(policy, 3, variant=variant, planner=PLANNER), wanted)
        assert torch.get_num_threads() == count


@needs_kernels
def test_workers_have_their_rows_or_candidates(
    policy: Policy,
    torch_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    watched: list[tuple[str, int, int, int]],
) -> None:
    """Torch's operations stay on one thread, padding is not planned, and a small model's candidates stay together."""
    M, calls = PLANNER.video_samples, PLANNER.iterations
    main, worker = "MainThread", "wav-worker"
    expected: dict[tuple[int, int, int], list[tuple[str, int, int]]] = {
        (1, 3, 1): [(main, 3, M)] * calls + [(main, 3, 1)],
        (2, 3, 1): [(worker, 1, M), (worker, 2, M)] * calls + [(worker, 1, 1), (worker, 2, 1)],
        (2, 1, 1): [(worker, 1, M // 2), (worker, 1, M - M // 2)] * calls + [(main, 1, 1)],
        (2, 1, threads.WORTH): [(main, 1, M)] * calls + [(main, 1, 1)],
    }
    for (count, rows, worth), passes in expected.items():
        torch_threads(count)
        monkeypatch.setattr(threads, "WORTH", worth)
        watched.clear()
        act(policy, rows)
        assert sorted(watched) == sorted([(*part, 1) for part in passes] * 2)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("wav-worker")]


@needs_kernels
def test_a_share_of_one_candidate_keeps_no_video_features(policy: Policy) -> None:
    """Features of every block are kept of the candidate that is acted on, not of those that are only scored."""
    shapes = policy.model.shapes
    memory = torch.zeros(1, *shapes.video[:2], policy.data.memory_frames, *shapes.video[3:])
    text, _ = next(iter(policy._prompts.values()))
    context = policy.model.begin(memory, torch.from_numpy(text)[None], None, None)
    model = threads.ThreadedPlannerModel(policy.model, 2)
    for candidates, kept in ((2, False), (1, True)):
        found = model.video_features(context, torch.zeros(1, candidates, *shapes.video), (1.0,))
        assert [part.layers is not None for part in found.features] == [kept] * len(found.parts)


def test_without_the_kernels_the_whole_batch_is_planned_on_torchs_threads(
    monkeypatch: pytest.MonkeyPatch,
    torch_threads: Callable[[int], None],
    watched: list[tuple[str, int, int, int]],
) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    torch_threads(2)
    act(tiny.policy("tabletop"), 1)
    assert {(name, rows, count) for name, rows, _, count in watched} == {("MainThread", 3, 2)}


@needs_kernels
def test_a_worker_that_fails_fails_the_call(
    policy: Policy, torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise CheckpointError("planner: the actions are not finite")

    monkeypatch.setattr(TorchPlannerModel, "video_features", fail)
    torch_threads(2)
    with pytest.raises(CheckpointError, match="not finite"):
        act(policy, 3)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("rows", "count", "sizes"), [(8, 2, [4, 4]), (5, 3, [1, 2, 2]), (1, 4, [1]), (3, 1, [3])])
def test_shares_are_even_and_complete(rows: int, count: int, sizes: list[int]) -> None:
    parts = threads.shares(rows, count)
    assert [part.stop - part.start for part in parts] == sizes
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))


@pytest.mark.parametrize(("width", "shares"), [(256, 2), (64, 1)])
def test_candidates_of_a_row_are_dealt_out_where_its_tokens_are_many(width, shares):
    class Model:
        independent_rows, shapes = True, None

        def __init__(self) -> None:
            self.width = width

        def video_features(self, context, noise, levels):
            return Features((), ())

    @dataclasses.dataclass
    class Context:
        memory: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1, 2, 32, 4, 4, 4))

        def rows(self, rows):
            return self

    Features = dataclasses.make_dataclass("Features", ["layers", "other"])
    model: Any = Model()
    found = threads.ThreadedPlannerModel(model, 2).video_features(Context(), torch.zeros(1, 8, 1), (1.0,))
    assert [part[1] for part in found.parts] == ([slice(0, 4), slice(4, 8)] if shares == 2 else [slice(0, 8)])
