"""The policy on a small random model: memory, batching, units, variants and refusals; and the planner's adapter."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from wav.codec import PCACodec
from wav.config import DataSettings, ModelSettings, PlannerSettings
from wav.data.conventions import Conventions
from wav.data.statistics import Statistics, compute_statistics
from wav.errors import CheckpointError, ConfigError, DataError
from wav.flow_matching import inference_sigmas
from wav.inference import compiled
from wav.inference.cpu import kernels
from wav.inference.torch import TorchPlannerModel
from wav.io.files import write_json
from wav.model import build_model
from wav.policy.policy import VARIANTS, Observation, Policy
from wav.text import TextEncoder, build_small

DATA = DataSettings(
    image_height=32, image_width=32, memory_frames=3, future_frames=5, frame_stride=2, action_chunk=6, text_tokens=5
)
MODEL = ModelSettings(
    layers=3, heads=2, head_dim=16, value_heads=2, value_head_dim=8, action_heads=2, action_head_dim=12
)
PLANNER = PlannerSettings(
    iterations=2, video_samples=3, value_samples=2, video_elites=2, value_elites=3, denoise_steps=3, alpha=0.6, beta=0.7
)
TASKS = ("lift the red cube", "lift the green cube")
CHANNELS, WIDTH = 8, 12


def images(count: int, seed: int, frames: tuple[int, ...] = ()) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *frames, 32, 32, 3), dtype=np.uint8)


def make_model(value_expert: bool = True) -> Any:
    """A model whose zero-initialised parts, if any, are random too, so that everything has an effect."""
    model = build_model(MODEL.model_copy(update={"value_expert": value_expert}), DATA, CHANNELS, WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def codec() -> PCACodec:
    return PCACodec.fit(images(40, 0), images(20, 1, (5,)), patch=16, temporal=4, channels=CHANNELS)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    random = np.random.default_rng(2)
    return Statistics(
        {
            "action": compute_statistics(random.uniform(-1, 1, (500, 7)), "quantile"),
            "state": compute_statistics(random.normal(size=(500, 8)), "quantile"),
            "value": compute_statistics(random.normal(3, 2, (500, 10)), "zscore_symlog"),
        }
    )


@pytest.fixture
def make_policy(codec: PCACodec, statistics: Statistics) -> Any:
    random = np.random.default_rng(3)
    prompts = {task: (random.normal(size=(5, WIDTH)).astype(np.float32), np.arange(5) < 4) for task in TASKS}

    def make(value_expert: bool = True, **changes: Any) -> Policy:
        parts: dict[str, Any] = {
            "model": make_model(value_expert),
            "codec": codec,
            "text_encoder": None,
            "statistics": statistics,
            "conventions": Conventions.for_simulator(DATA, {}),
            "data": DATA,
            "planner": PLANNER,
            "batch_size": 4,
            "prompts": prompts,
        }
        return Policy(**(parts | changes))

    return make


def observe(seed: int, task: str = TASKS[0]) -> Observation:
    frames = images(2, seed)
    state = np.random.default_rng(seed).normal(size=8).astype(np.float32)
    return Observation(dict(zip(DATA.views, frames, strict=True)), state, task)


def run(policy: Policy, rows: list[int], calls: int = 2, **options: Any) -> list[Any]:
    """Outputs of ``calls`` calls; row r sees observations that depend on r alone."""
    for row in rows:
        policy.reset(row, f"episode-{row}", seed=5)
    return [
        policy.act([observe(100 * row + call, TASKS[row % 2]) for row in rows], rows, **options)
        for call in range(calls)
    ]


@pytest.mark.integration
def test_compiled_code_acts_alike(make_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any size are padded to one shape: only the first call compiles."""
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    policy, plain = make_policy(compile="on"), make_policy()
    assert (policy.compiled, plain.compiled) == (True, False)
    for rows in ([0, 1], [2]):
        for one, two in zip(run(policy, rows, with_value=True), run(plain, rows, with_value=True), strict=True):
            np.testing.assert_allclose(one.actions, two.actions, atol=1e-5)
            np.testing.assert_allclose(one.returns, two.returns, atol=1e-4)
    shapes = dict(policy.model._calls)
    run(policy, [3, 4, 5], with_value=True)
    assert policy.model._calls == shapes


def test_shapes_and_units(make_policy: Any) -> None:
    (output,) = run(make_policy(), [0, 1], 1, with_value=True, with_future=True)
    assert output.actions.shape == (2, 6, 7)
    assert output.actions.dtype == np.float32
    assert np.abs(output.actions).max() <= 1
    assert output.returns.shape == (2, 6)
    assert output.value.tolist() == output.returns[:, 0].tolist()
    assert output.future.shape == (2, 2, CHANNELS, 2, 2, 2)
    assert output.plan.score.shape == output.plan.sigma_video.shape == (2, 2)
    assert output.plan.candidates.shape == (2, 3)
    np.testing.assert_allclose(output.plan.candidates.max(1), output.plan.score[:, -1], rtol=1e-6)
    assert (output.plan.sigma_video[:, 1] < 1).all()
    (plain,) = run(make_policy(), [0], 1, variant="unplanned")
    assert plain.returns is None
    assert plain.value is None
    assert plain.future is None
    assert plain.plan.score.shape == (1, 0)


def test_a_row_is_the_same_whatever_rides_along(make_policy: Any) -> None:
    """Bit-identical alone, among others, at another place, and split over groups."""
    alone = run(make_policy(), [1], with_value=True, with_future=True)
    for rows in ([0, 1, 2], [3, 2, 0, 1], [7, 6, 5, 4, 3, 1]):
        among = run(make_policy(), rows, with_value=True, with_future=True)
        at = rows.index(1)
        for one, many in zip(alone, among, strict=True):
            for name in ("actions", "returns", "future"):
                np.testing.assert_array_equal(getattr(many, name)[at], getattr(one, name)[0])
            for f in dataclasses.fields(one.plan):
                np.testing.assert_array_equal(getattr(many.plan, f.name)[at], getattr(one.plan, f.name)[0])
    assert not np.array_equal(alone[0].actions, alone[1].actions)


def test_everything_seen_matters(make_policy: Any) -> None:
    policy = make_policy()

    def act(observation: Observation, episode: str = "e", seed: int = 0, before: Observation | None = None) -> Any:
        policy.reset("r", episode, seed)
        if before is not None:
            policy.act([before], ["r"], variant="unplanned")
            policy._rows["r"].call = 0
        return policy.act([observation], ["r"]).actions

    base = observe(1)
    plain = act(base)
    np.testing.assert_array_equal(act(base), plain)
    other = observe(2)
    changed = {
        "image": dataclasses.replace(base, images=other.images),
        "state": dataclasses.replace(base, state=other.state),
        "instruction": dataclasses.replace(base, instruction=TASKS[1]),
    }
    for name, observation in changed.items():
        assert not np.array_equal(act(observation), plain), name
    assert not np.array_equal(act(base, seed=1), plain)
    assert not np.array_equal(act(base, episode="f"), plain)
    assert not np.array_equal(act(base, before=other), plain)
    np.testing.assert_array_equal(act(base, before=base), plain)  # the first memory repeats the current frame


def test_memory_holds_the_last_calls_and_only_new_frames_are_encoded(make_policy: Any, codec: PCACodec) -> None:
    policy, encoded = make_policy(), []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(codec, name)

        def encode_frames(self, frames: np.ndarray) -> np.ndarray:
            encoded.append(len(frames))
            return codec.encode_frames(frames)

    policy.codec = Counting()
    policy.reset("r", "e", 0)
    for call in range(4):
        policy.act([observe(call)], ["r"], variant="unplanned")
    assert encoded == [2] * 4
    wanted = [codec.encode_frames(images(2, call)) for call in (1, 2, 3)]
    np.testing.assert_array_equal(np.stack(list(policy._rows["r"].memory)), np.stack(wanted))
    policy.reset("r", "e", 0)
    policy.act([observe(9)], ["r"], variant="unplanned")
    assert len({latents.tobytes() for latents in policy._rows["r"].memory}) == 1
    assert len(policy._rows["r"].memory) == 3


def test_variants_differ_and_pair(make_policy: Any) -> None:
    outputs = {variant: run(make_policy(), [0], 1, variant=variant)[0] for variant in VARIANTS}
    actions = [outputs[variant].actions for variant in VARIANTS]
    assert not np.array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0], actions[2])
    assert not np.array_equal(actions[1], actions[2])
    planned, temperature = outputs["planned"].plan, outputs["temperature"].plan
    np.testing.assert_array_equal(planned.sigma_video, temperature.sigma_video)
    none = run(make_policy(planner=PLANNER.model_copy(update={"iterations": 0})), [0], 1)[0]
    np.testing.assert_array_equal(none.actions, outputs["unplanned"].actions)


def test_warm_start_uses_the_rows_own_plan(make_policy: Any) -> None:
    warm = PLANNER.model_copy(update={"warm_start": True})
    cold_runs, warm_runs = run(make_policy(), [0, 1]), run(make_policy(), [0, 1], planner=warm)
    np.testing.assert_array_equal(cold_runs[0].actions, warm_runs[0].actions)
    assert not np.array_equal(cold_runs[1].actions, warm_runs[1].actions)
    np.testing.assert_array_equal(run(make_policy(), [1], planner=warm)[1].actions[0], warm_runs[1].actions[1])


def test_scores_are_denormalised_returns(make_policy: Any, statistics: Statistics) -> None:
    policy = make_policy()
    values = torch.randn(3, 6, 10)
    wanted = statistics.denormalize_values(values.numpy())[..., -1]
    np.testing.assert_allclose(policy.returns(values).numpy(), wanted, rtol=1e-5)


def test_generate_video_continues_from_its_own_frames(make_policy: Any) -> None:
    policy = make_policy()
    video = policy.generate_video(observe(1), 2)
    assert video.shape == (2, 1 + 2 * 5, 32, 32, 3)
    np.testing.assert_array_equal(video[:, 0], images(2, 1))
    np.testing.assert_array_equal(video, policy.generate_video(observe(1), 2))
    np.testing.assert_array_equal(video[:, :6], policy.generate_video(observe(1), 1))
    assert not np.array_equal(video, policy.generate_video(observe(1), 2, seed=1))


def test_without_value_expert(make_policy: Any) -> None:
    policy = make_policy(value_expert=False)
    assert run(policy, [0], 1, variant="unplanned")[0].actions.shape == (1, 6, 7)
    with pytest.raises(ConfigError, match="the model has no value expert to plan with"):
        run(policy, [0], 1)
    with pytest.raises(ConfigError, match="with_value"):
        run(policy, [0], 1, variant="unplanned", with_value=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"agentview": images(1, 0)[0]}}, r"views = \['agentview'\]: the policy sees"),
        (
            {"images": dict.fromkeys(DATA.views, images(1, 0)[0][:16])},
            r"image of view 'agentview': uint8 \(16, 32, 3\)",
        ),
        ({"images": dict.fromkeys(DATA.views, images(1, 0)[0] / 255)}, r"image of view 'agentview': float64"),
        ({"state": np.zeros(7, np.float32)}, r"state: shape \(7,\)"),
        ({"state": np.full(8, np.nan, np.float32)}, r"pass 8 finite numbers"),
        ({"instruction": "sing"}, r"instruction 'sing': not among this policy's prompts"),
    ],
)
def test_observations_that_do_not_fit_are_refused(make_policy: Any, change: dict[str, Any], message: str) -> None:
    policy = make_policy()
    policy.reset("r", "e", 0)
    with pytest.raises(DataError, match=message):
        policy.act([dataclasses.replace(observe(0), **change)], ["r"])
    assert not policy._rows["r"].memory


def test_rows_that_do_not_fit_are_refused(make_policy: Any) -> None:
    policy = make_policy()
    policy.reset("r", "e", 0)
    with pytest.raises(DataError, match="row 'q': no episode was begun on it"):
        policy.act([observe(0)], ["q"])
    for rows in ([], ["r", "r"], ["r", "q"]):
        with pytest.raises(DataError, match="different rows, one per observation"):
            policy.act([observe(0), observe(1)] if rows != ["r", "q"] else [observe(0)], rows)
    policy.forget("r")
    with pytest.raises(DataError, match="no episode"):
        policy.act([observe(0)], ["r"])


def test_parts_of_different_trainings_are_refused(make_policy: Any, statistics: Statistics, codec: PCACodec) -> None:
    short = Statistics({**statistics.keys, "value": compute_statistics(np.random.rand(9, 4), "zscore_symlog")})
    with pytest.raises(CheckpointError, match="value channels = 10 but the statistics have 4"):
        make_policy(statistics=short)
    with pytest.raises(CheckpointError, match="image height = 64 but the conventions have 32"):
        make_policy(data=DATA.model_copy(update={"image_height": 64}))
    with pytest.raises(DataError, match="no key 'value'"):
        make_policy(statistics=Statistics({k: v for k, v in statistics.keys.items() if k != "value"}))


def test_missing_parts_of_a_folder_are_named(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"model: missing; export the policy again"):
        Policy.load(tmp_path)


def test_candidates_share_nothing_but_cost(make_policy: Any) -> None:
    """Batched candidates and samples give what each gives alone: K/V of (m, n) belong to video m of row b."""
    adapter: TorchPlannerModel = make_policy().model
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    B, M, N = 2, 3, 2
    shapes = adapter.shapes
    assert shapes.value is not None
    memory, text, history = draw(B, 2, CHANNELS, 3, 2, 2), draw(B, 5, WIDTH), draw(B, 1, 15)
    mask = torch.ones(B, 5)
    video, value, action = draw(B, M, *shapes.video), draw(B, M, N, *shapes.value), draw(B, *shapes.action)
    for steps in ((1.0,), (1.0, 0.7, 0.4)):
        context = adapter.begin(memory, text, mask, history)
        values = adapter.denoise_value(adapter.video_features(context, video, steps), value, 3)
        first = adapter.video_features(context, video[:, :1], steps)
        actions = adapter.denoise_action(context, first, value[:, 0, 0], action, 3)
        for b in range(B):
            row = slice(b, b + 1)
            alone = adapter.begin(memory[row], text[row], mask[row], history[row])
            for m in range(M):
                features = adapter.video_features(alone, video[row, m : m + 1], steps)
                for n in range(N):
                    got = adapter.denoise_value(features, value[row, m : m + 1, n : n + 1], 3)
                    torch.testing.assert_close(got[0, 0, 0], values[b, m, n], atol=1e-5, rtol=1e-5)
            features = adapter.video_features(alone, video[row, :1], steps)
            got = adapter.denoise_action(alone, features, value[row, 0, 0], action[row], 3)
            torch.testing.assert_close(got[0], actions[b], atol=1e-5, rtol=1e-5)


def test_adapter_is_the_plain_model(make_policy: Any) -> None:
    """Features, Euler loops and conditioning written out with the transformer's own passes, without caches."""
    adapter: TorchPlannerModel = make_policy().model
    model, generator = adapter.model, torch.Generator().manual_seed(2)
    shapes = adapter.shapes
    assert shapes.value is not None
    memory, text = (
        torch.randn(1, 2, CHANNELS, 3, 2, 2, generator=generator),
        torch.randn(1, 5, WIDTH, generator=generator),
    )
    history = torch.randn(1, 1, 15, generator=generator)
    video = torch.randn(1, *shapes.video, generator=generator)
    value = torch.randn(1, *shapes.value, generator=generator)
    action = torch.randn(1, *shapes.action, generator=generator)
    context = adapter.begin(memory, text, None, history)
    features = adapter.video_features(context, video[:, None], (1.0,))
    got_value = adapter.denoise_value(features, value[:, None, None], 2)[:, 0, 0]
    got_action = adapter.denoise_action(context, features, value, action, 2)
    with torch.no_grad():
        levels = torch.tensor([[0.0, 0, 0, 1000, 1000]])
        layers = model.video(torch.cat([memory, video], 3), levels, text).features
        variants = model.value(value, torch.tensor([1000.0]), layers).features
        for now, after in itertools.pairwise(inference_sigmas(2).tolist()):
            t = torch.tensor([now * 1000])
            value = value + (after - now) * model.value(value, t, layers).velocity
            action = action + (after - now) * model.action(action, t, layers, variants, history)
    torch.testing.assert_close(got_value, value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_action, action, atol=1e-5, rtol=1e-5)


def test_a_policy_folder_acts_like_its_parts(make_policy: Any, codec: PCACodec, tmp_path: Any) -> None:
    build_small(tmp_path / "text_encoder", TASKS, dim=WIDTH)
    parts = make_policy(text_encoder=TextEncoder.from_pretrained(tmp_path / "text_encoder", tokens=5), prompts={})
    parts.model.model.save_pretrained(tmp_path / "model")
    codec.save(tmp_path / "codec")
    parts.statistics.save(tmp_path / "statistics.json")
    write_json(tmp_path / "conventions.json", parts.conventions.to_json())
    settings = {"data": DATA.model_dump(mode="json"), "planner": PLANNER.model_dump(mode="json")}
    write_json(tmp_path / "settings.json", settings)
    loaded = Policy.load(tmp_path, batch_size=4, device="cpu")
    assert len(loaded.digest) == 64
    for one, two in zip(run(parts, [0, 1]), run(loaded, [0, 1]), strict=True):
        np.testing.assert_array_equal(one.actions, two.actions)
    write_json(tmp_path / "settings.json", {"data": settings["data"] | {"view": 3}, "planner": {}})
    with pytest.raises(CheckpointError, match=r"settings.json: .*not a policy's settings"):
        Policy.load(tmp_path)


def test_a_call_that_fails_changes_nothing(make_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's memory holds a frame twice because another row of the same call could not be planned."""
    policy, plain = make_policy(), make_policy()
    for made in (policy, plain):
        for row in (0, 1):
            made.reset(row, f"episode-{row}", seed=5)
        made.act([observe(0), observe(100)], [0, 1])
    with monkeypatch.context() as patch:
        patch.setattr("wav.policy.policy.Planner.plan", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy.act([observe(1), observe(101)], [0, 1])
    made = [each.act([observe(1), observe(101)], [0, 1]) for each in (policy, plain)]
    np.testing.assert_array_equal(made[0].actions, made[1].actions)


def test_prompts_that_are_kept_are_bounded(make_policy: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wav.policy.policy.MAX_PROMPTS", 3)
    text = TextEncoder.from_pretrained(build_small(tmp_path, TASKS, dim=WIDTH), 5)
    policy = make_policy(text_encoder=text, prompts={})
    policy.reset("r", "e", 0)
    for number in range(6):
        policy.act([observe(0, f"move {number} left")], ["r"], variant="unplanned")
    assert set(policy._prompts) == {f"move {number} left" for number in (3, 4, 5)}
