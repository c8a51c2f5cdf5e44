"""Planning on compiled code: the same plan, compiled once for its shapes, and results that no later call overwrites.

Blocks are traced here and run on torch's operations; the compiler itself runs in the slow check at the end. Without a
GPU the recording of a call is stood in for by running it again into the memory of its first result, as a graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.inference import test_backends
from tests.inference.test_backends import CAPTION, GRID, LATENT, MEMORY, PLANNER, VIEWS, WORDS, B, M, act, make
from wav.cuda_graphs import leaves
from wav.errors import ConfigError
from wav.inference import compiled
from wav.inference.compiled import CompiledPlannerModel
from wav.inference.fused import FusedPlannerModel
from wav.inference.torch import Features, TorchPlannerModel
from wav.planning.types import Plan

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced alone."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are recorded; a launch computes again, from the kept arguments into the kept result."""

    def capture(
        call: Callable[[], Any], device: torch.device, pool: Any, tight: bool = False
    ) -> tuple[Callable[[], None], Any]:
        result = call()

        def replay() -> None:
            for kept, new in zip(leaves(result), leaves(call()), strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)

        return replay, result

    monkeypatch.setattr(CompiledPlannerModel, "records", True)
    monkeypatch.setattr(CompiledPlannerModel, "_graphs", lambda self: None)
    monkeypatch.setattr(compiled, "capture", capture)


def assert_same(one: Plan, two: Plan, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one.actions, two.actions, atol=tolerance, rtol=0)
    torch.testing.assert_close(one.values, two.values, atol=tolerance, rtol=0)
    for a, b in zip(one.history, two.history, strict=True):
        torch.testing.assert_close(a.values, b.values, atol=tolerance, rtol=0)
        for name in ("video", "value"):
            for part in ("mean", "std"):
                wanted = getattr(getattr(b, name), part)
                torch.testing.assert_close(getattr(getattr(a, name), part), wanted, atol=tolerance, rtol=0)
        assert torch.equal(a.video_elites, b.video_elites)
        assert torch.equal(a.value_elites, b.value_elites)


def compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


def context_of(model: TorchPlannerModel, rows: int = B) -> Any:
    memory = torch.zeros(rows, VIEWS, LATENT, MEMORY, *GRID)
    return model.begin(memory, torch.zeros(rows, WORDS, CAPTION), None, None)


def features_of(model: TorchPlannerModel, seed: int, rows: int = B) -> Features:
    noise = torch.randn(rows, M, *model.shapes.video, generator=torch.Generator().manual_seed(seed))
    return model.video_features(context_of(model, rows), noise, (1.0,))


@pytest.mark.parametrize("changes", [{}, {"score_steps": 1}])
@pytest.mark.parametrize("recorded", [False, True])
def test_the_plan_is_the_uncompiled_one(
    recorded: bool, changes: dict[str, int], request: pytest.FixtureRequest
) -> None:
    if recorded:
        request.getfixturevalue("graphs")
    settings = PLANNER.model_copy(update=changes)
    assert_same(act(make(CompiledPlannerModel), settings), act(make(TorchPlannerModel), settings))


@pytest.mark.usefixtures("graphs")
def test_nothing_is_compiled_again_for_other_numbers_or_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    before, model = compilations(), make(CompiledPlannerModel)
    first, made = act(model), compilations()
    assert 0 < made - before < 16  # layers share what was compiled
    recorded = dict(model._calls)
    with torch.inference_mode():
        assert_same(act(model), first)
    monkeypatch.setattr(test_backends, "SeededNoise", lambda keys: lambda purpose, shape, k=0: torch.randn(B, *shape))
    with torch.inference_mode():
        other = act(model)
    assert not torch.equal(other.actions, first.actions)
    assert compilations() == made
    assert model._calls == recorded


def test_another_batch_is_compiled_for_too() -> None:
    model, plain = make(CompiledPlannerModel), make(FusedPlannerModel)
    torch._dynamo.reset()
    features_of(model, 0)
    made = compilations()
    for rows in (1, B):
        for (one,), (two,) in zip(features_of(model, 1, rows).keys, features_of(plain, 1, rows).keys, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert compilations() > made


def test_further_shapes_run_uncompiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled, "SHAPES", 1)
    model = make(CompiledPlannerModel)
    features_of(model, 0)
    made = compilations()
    assert_same(act(model), act(make(TorchPlannerModel)))
    assert compilations() == made
    assert caplog.text.count("compiled for 1 sets of shapes already; others run uncompiled") == 1


@pytest.mark.usefixtures("graphs")
def test_a_kept_result_is_not_overwritten() -> None:
    model = make(CompiledPlannerModel)
    first = features_of(model, 0)
    kept = [key.clone() for (key,) in first.keys]
    second = features_of(model, 1)
    for (one,), (two,), before in zip(first.keys, second.keys, kept, strict=True):
        assert torch.equal(one, before)
        assert not torch.equal(one, two)


def test_half_precision_is_compiled_too() -> None:
    settings = PLANNER.model_copy(update={"iterations": 0})
    actions, wanted = (
        act(made, settings).actions
        for made in (make(CompiledPlannerModel, torch.bfloat16), make(TorchPlannerModel, torch.bfloat16))
    )
    assert (actions - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "_compiled", lambda function, backend: fails)
    with pytest.raises(ConfigError, match=r"export.compile = on: text_keys .*\(no compiler here\); set it to off"):
        features_of(make(CompiledPlannerModel), 0)


@pytest.mark.long
def test_the_compiler_makes_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what ``torch.compile`` generates, minutes on a slow machine."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    model, plain = make(CompiledPlannerModel), make(FusedPlannerModel)
    assert_same(act(model), act(plain))
    made = compilations()
    with torch.inference_mode():
        assert_same(act(model), act(plain))
    assert compilations() == made
