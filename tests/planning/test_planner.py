"""Algorithm 1 through a fake model whose scores are planted or are a known function of the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wav.config import PlannerSettings
from wav.errors import CheckpointError, ConfigError
from wav.planning import VARIANTS
from wav.planning.planner import Planner
from wav.planning.scores import SCORES, score
from wav.planning.types import Gaussian, Levels, NoiseShapes, Plan, Returns, RowKey, SeededNoise, best

V, C, FF, H, W, A, CV, CA = 2, 3, 1, 2, 2, 6, 4, 5
PATTERN = torch.tensor([1.0, -1.0]).repeat(A // 2)  # zero mean, unit standard deviation


def trajectory(scores: Tensor) -> Tensor:
    """Value trajectories (..., A, CV) whose return channel has mean ``scores`` and standard deviation 1."""
    values = torch.randn(*scores.shape, A, CV, generator=torch.Generator().manual_seed(0))
    values[..., -1] = scores[..., None] + PATTERN
    return values


class FakeModel:
    """Features are the video noise itself; ``score(z_video (B, M, ...), z_value (B, M, N, A, CV))`` plants scores."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], value_expert: bool = True) -> None:
        self.score = score
        self.shapes = NoiseShapes((V, C, FF, H, W), (A, CV) if value_expert else None, (A, CA))
        self.calls: list[tuple[str, tuple[int, ...], Any]] = []
        self.seen: list[tuple[Tensor, Tensor]] = []

    def video_features(self, context: None, noise: Tensor, levels: tuple[float, ...]) -> Tensor:
        self.calls.append(("video", tuple(noise.shape), levels))
        return noise

    def denoise_value(self, features: Tensor, noise: Tensor, steps: int) -> Tensor:
        self.calls.append(("value", tuple(noise.shape), steps))
        self.seen.append((features, noise))
        return trajectory(self.score(features, noise))

    def denoise_action(
        self, context: None, features: Tensor, value: Tensor | None, noise: Tensor, steps: int, value_level: float
    ) -> Tensor:
        self.calls.append(("action", tuple(noise.shape), (steps, value_level)))
        self.read = value
        actions = noise + features.flatten(1).mean(1)[:, None, None]
        return actions if value is None else actions + value.flatten(1).mean(1)[:, None, None]


def returns(values: Tensor) -> Tensor:
    return values[..., -1]


def noise(rows: int = 1, seed: int = 0, call: int = 0) -> SeededNoise:
    return SeededNoise([RowKey(seed, f"episode-{row}", call) for row in range(rows)])


def plan(
    model: FakeModel, context: None, settings: PlannerSettings, noise: SeededNoise, returns: Returns, **options: Any
) -> Plan:
    return Planner(model, settings, returns).plan(context, noise, **options)


def bowl(z_video: Tensor, z_value: Tensor) -> Tensor:
    """Score with its maximum at 0.8 (video) and -0.8 (value)."""
    video = (z_video - 0.8).square().mean((2, 3, 4, 5, 6))
    value = (z_value + 0.8).square().mean((3, 4))
    return -video[..., None] - value


SETTINGS = PlannerSettings(
    iterations=3, video_samples=5, value_samples=3, video_elites=2, value_elites=4, alpha=0.7, beta=0.6, sigma_decay=0.9
)


def test_every_candidate_is_credited_with_its_own_score() -> None:
    B, M, N = 2, SETTINGS.video_samples, SETTINGS.value_samples
    planted = torch.randn(B, M, N, generator=torch.Generator().manual_seed(1)) * 10
    model = FakeModel(lambda video, value: planted if video.shape[1] == M else planted[:, :1, :1])
    result = plan(model, None, SETTINGS, noise(B), returns)
    for k, step in enumerate(result.history):
        torch.testing.assert_close(step.scores, planted / (1 + SETTINGS.epsilon))
        for b in range(B):
            phi = [max(planted[b, m, n].item() for n in range(N)) for m in range(M)]
            wanted = sorted(range(M), key=lambda m: -phi[m])[:2]
            assert step.video_elites[b].tolist() == wanted
            flat = {(m, n): planted[b, m, n].item() for m in range(M) for n in range(N)}
            pairs = sorted(flat, key=lambda mn: -flat[mn])[:4]
            assert [divmod(i, N) for i in step.value_elites[b].tolist()] == pairs
            z_video, z_value = (seen[b] for seen in model.seen[k])
            before = result.history[k - 1] if k else None
            check_update(step.video, before and before.video, torch.stack([z_video[m] for m in wanted]), b)
            check_update(step.value, before and before.value, torch.stack([z_value[m, n] for m, n in pairs]), b)


def check_update(after: Gaussian, before: Gaussian | None, elites: Tensor, b: int) -> None:
    """Eq. 4/5 (1/K), decay and smoothing, written out again; per view, since elites keep their view axis."""
    old_mean = before.mean[b] if before else torch.zeros_like(elites[0])
    old_std = before.std[b] if before else torch.ones_like(elites[0])
    mean = sum(elites) / len(elites)
    std = (sum((z - mean) ** 2 for z in elites) / len(elites)).sqrt()
    torch.testing.assert_close(after.mean[b], 0.7 * mean + 0.3 * old_mean)
    torch.testing.assert_close(after.std[b], 0.6 * 0.9 * std + 0.4 * old_std)


def test_value_rows_are_denoised_on_their_own_video() -> None:
    """The score is the index of the video: attribution by any other order would not give constant rows."""
    model = FakeModel(lambda video, value: video.mean((2, 3, 4, 5, 6))[..., None] * torch.ones(value.shape[:3]))
    result = plan(model, None, SETTINGS, noise(2), returns)
    for step, (z_video, _) in zip(result.history, model.seen, strict=True):
        wanted = z_video.mean((2, 3, 4, 5, 6))[..., None].expand_as(step.scores)
        torch.testing.assert_close(step.scores, wanted / (1 + SETTINGS.epsilon))


@pytest.mark.parametrize("score", ["snr", "lower_bound"])
def test_distributions_move_to_the_maximum(score: str) -> None:
    """Mean final score over 20 seeds: five iterations beat one, one beats none; means go to the maximum."""
    finals = {}
    for iterations in (0, 1, 5):
        settings = PlannerSettings(iterations=iterations, score=score)  # type: ignore[arg-type]
        scores, shift = [], []
        for seed in range(20):
            result = plan(FakeModel(bowl), None, settings, noise(seed=seed), returns)
            assert result.z_value is not None
            scores.append(bowl(result.z_video[:, None], result.z_value[:, None, None]).item())
            if result.means:
                shift.append((result.means[0].mean().item(), result.means[1].mean().item()))
        finals[iterations] = sum(scores) / len(scores)
        if iterations == 5:
            video, value = torch.tensor(shift).mean(0).tolist()
            assert video > 0.1
            assert value < -0.1
    assert finals[5] > finals[1] + 0.1
    assert finals[1] > finals[0] + 0.1


def test_every_view_keeps_its_own_statistics() -> None:
    """Only the first view decides the score, so only its distribution moves."""

    def first_view(z_video: Tensor, z_value: Tensor) -> Tensor:
        return z_video[:, :, 0].mean((2, 3, 4, 5))[..., None] + 0 * z_value.mean((3, 4))

    settings = PlannerSettings(iterations=3, video_samples=64, video_elites=8, alpha=1.0)
    mean = plan(FakeModel(first_view), None, settings, noise(4), returns).history[-1].video.mean
    assert mean[:, 0].mean() > 0.4
    assert mean[:, 1].mean().abs() < 0.2


@pytest.mark.parametrize("elites", [1, 2, 5])
def test_standard_deviation_divides_by_the_number_of_elites(elites: int) -> None:
    """Eq. 5 with 1/K, defined for one elite too."""
    settings = SETTINGS.model_copy(update={"iterations": 1, "alpha": 1.0, "beta": 1.0, "sigma_decay": 1.0})
    settings = settings.model_copy(update={"video_elites": elites, "value_elites": elites})
    model = FakeModel(bowl)
    last = plan(model, None, settings, noise(2), returns).history[-1]
    z_video, z_value = model.seen[0]
    for b in range(2):
        video = z_video[b, last.video_elites[b]]
        value = z_value[b].flatten(0, 1)[last.value_elites[b]]
        for after, chosen in ((last.video, video), (last.value, value)):
            mean = sum(chosen) / elites
            std = (sum((z - mean) ** 2 for z in chosen) / elites).sqrt()
            torch.testing.assert_close(after.mean[b], mean)
            torch.testing.assert_close(after.std[b], std)


def test_one_elite_is_no_nan() -> None:
    settings = SETTINGS.model_copy(update={"video_elites": 1, "value_elites": 1})
    result = plan(FakeModel(bowl), None, settings, noise(2), returns)
    last = result.history[-1]
    assert torch.isfinite(last.video.std).all()
    torch.testing.assert_close(last.video.std, torch.full_like(last.video.std, 0.4**3))


def test_same_row_same_plan_in_any_batch() -> None:
    alone = plan(FakeModel(bowl), None, SETTINGS, noise(1), returns, with_value=True)
    among = plan(FakeModel(bowl), None, SETTINGS, noise(8), returns, with_value=True)
    assert torch.equal(alone.actions[0], among.actions[0])
    assert torch.equal(alone.z_video[0], among.z_video[0])
    assert not torch.equal(among.z_video[0], among.z_video[1])


def test_noise_differs_by_seed_episode_call_purpose_and_iteration() -> None:
    keys = [RowKey(0, "a", 0), RowKey(1, "a", 0), RowKey(0, "b", 0), RowKey(0, "a", 1)]
    draws = SeededNoise(keys)
    rows = [*draws("plan.video", (50,), 0), *draws("plan.video", (50,), 1), *draws("plan.value", (50,), 0)]
    assert len({tuple(row.tolist()) for row in rows}) == 12
    assert torch.equal(draws("plan.video", (50,), 1), SeededNoise(keys)("plan.video", (50,), 1))


def test_variants_share_their_final_draws() -> None:
    results = {c: plan(FakeModel(bowl), None, SETTINGS, noise(3), returns, variant=c) for c in VARIANTS}
    eps = noise(3)("act.video", (V, C, FF, H, W))
    last = results["planned"].history[-1].video
    torch.testing.assert_close(results["unplanned"].z_video, eps)
    torch.testing.assert_close(results["temperature"].z_video, last.std * eps)
    torch.testing.assert_close(results["planned"].z_video, last.mean + last.std * eps)
    assert results["unplanned"].history == ()


def test_zero_iterations_is_no_planning() -> None:
    model = FakeModel(bowl)
    result = plan(model, None, SETTINGS.model_copy(update={"iterations": 0}), noise(), returns)
    assert [name for name, _, _ in model.calls] == ["video", "action"]
    assert torch.equal(result.z_video, noise()("act.video", (V, C, FF, H, W)))
    assert result.means is None


def test_shapes_and_steps_reach_the_model() -> None:
    model = FakeModel(bowl)
    settings, levels = SETTINGS.model_copy(update={"iterations": 1, "denoise_steps": 4}), Levels((1.0, 0.5), 0.1)
    result = Planner(model, settings, returns, levels).plan(None, noise(2), with_value=True)
    assert model.calls == [
        ("video", (2, 5, V, C, FF, H, W), (1.0, 0.5)),
        ("value", (2, 5, 3, A, CV), 4),
        ("video", (2, 1, V, C, FF, H, W), (1.0, 0.5)),
        ("value", (2, 1, 1, A, CV), 4),
        ("action", (2, A, CA), (4, 0.1)),
    ]
    assert result.values is not None
    assert result.values.shape == (2, A, CV)


def test_the_value_reported_is_that_of_the_noise_acted_on() -> None:
    """Denoised on the final video noise's features from the final value noise, not left over from a search."""
    model = FakeModel(bowl)
    result = plan(model, None, SETTINGS, noise(2), returns, with_value=True)
    features, z_value = model.seen[-1]
    assert result.z_value is not None
    assert torch.equal(features[:, 0], result.z_video)
    assert torch.equal(z_value[:, 0, 0], result.z_value)
    assert len(model.seen) == SETTINGS.iterations + 1
    assert result.values is not None
    wanted = trajectory(bowl(result.z_video[:, None], result.z_value[:, None, None]))[:, 0, 0]
    torch.testing.assert_close(result.values, wanted)


def test_warm_start_moves_the_first_samples_only_when_asked() -> None:
    first = plan(FakeModel(bowl), None, SETTINGS, noise(), returns)
    for warm_start in (False, True):
        model = FakeModel(bowl)
        settings = SETTINGS.model_copy(update={"warm_start": warm_start})
        plan(model, None, settings, noise(call=1), returns, warm=first.means)
        eps = noise(call=1)("plan.video", (5, V, C, FF, H, W))
        assert first.means is not None
        torch.testing.assert_close(model.seen[0][0], eps + (first.means[0][:, None] if warm_start else 0))


def test_scores_are_on_the_given_returns() -> None:
    """SNR is not shift invariant, so planning must see de-normalised returns; the lower bound ranks either way."""
    trajectories = torch.stack([PATTERN * 0.1 - 1, PATTERN * 2 - 1])
    assert best(SCORES["snr"](trajectories, SETTINGS)[None], 1).item() == 1  # below zero, spread wins: the flaw
    assert best(SCORES["snr"](trajectories + 5, SETTINGS)[None], 1).item() == 0
    assert best(SCORES["lower_bound"](trajectories, SETTINGS)[None], 1).item() == 0
    planned = plan(FakeModel(bowl), None, SETTINGS, noise(), lambda values: values[..., -1] + 100)
    unshifted = plan(FakeModel(bowl), None, SETTINGS, noise(), returns)
    torch.testing.assert_close(planned.history[0].scores, unshifted.history[0].scores + 100, atol=1e-2, rtol=0)


def test_scores_by_hand() -> None:
    trajectory = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, variance (4 + 1 + 0 + 9) / 4
    std = 3.5**0.5
    snr = SETTINGS.model_copy(update={"epsilon": 0.5})
    assert SCORES["snr"](trajectory, snr).item() == pytest.approx(3 / (std + 0.5))
    for c in (0.0, 1.0, 2.5):
        bound = SETTINGS.model_copy(update={"score_penalty": c})
        assert SCORES["lower_bound"](trajectory, bound).item() == pytest.approx(3 - c * std, abs=1e-6)
        assert SCORES["lower_bound"](trajectory + 7, bound).item() == pytest.approx(10 - c * std, abs=1e-6)


def test_a_registered_score_plans() -> None:
    """One function adds a score, and the settings know its name."""

    def last_step(returns: Tensor, settings: PlannerSettings) -> Tensor:
        return returns[..., -1]

    score(last_step)
    history = plan(FakeModel(bowl), None, changed(score="last_step"), noise(), returns).history
    assert torch.equal(history[0].scores, history[0].values[..., -1, -1])
    del SCORES["last_step"]


def test_videos_are_ranked_by_their_best_value_or_by_the_mean() -> None:
    """Two candidates: one with the best single value, one better on average."""
    planted = torch.tensor([[[5.0, -9.0, 0.0], [2.0, 2.0, 2.0]]])
    wanted = {"max": [0], "mean": [1]}
    for phi, elites in wanted.items():
        model = FakeModel(lambda video, value: planted if video.shape[1] == 2 else planted[:, :1, :1])
        settings = changed(video_samples=2, video_elites=1, iterations=1, score="mean", phi=phi)
        step = plan(model, None, settings, noise(), returns).history[0]
        torch.testing.assert_close(step.scores, planted)
        assert step.video_elites[0].tolist() == elites


def test_planned_scores_see_all_samples_of_all_candidates() -> None:
    shapes: list[tuple[int, ...]] = []

    def watch(values: Tensor) -> Tensor:
        shapes.append(tuple(values.shape))
        return returns(values)

    plan(FakeModel(bowl), None, SETTINGS, noise(2), watch)
    assert shapes == [(2, SETTINGS.video_samples, SETTINGS.value_samples, A, CV)] * SETTINGS.iterations


def test_equal_scores_keep_their_order() -> None:
    assert best(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), 4).tolist() == [[1, 2, 0, 3]]


def test_planning_without_value_expert_is_refused() -> None:
    model = FakeModel(bowl, value_expert=False)
    with pytest.raises(ConfigError, match=r"planner.iterations = 3: the model has no value expert"):
        plan(model, None, SETTINGS, noise(), returns)
    with pytest.raises(ConfigError, match="with_value"):
        plan(model, None, SETTINGS, noise(), returns, variant="unplanned", with_value=True)
    assert plan(model, None, SETTINGS, noise(), returns, variant="unplanned").z_value is None
    assert plan(model, None, SETTINGS.model_copy(update={"iterations": 0}), noise(), returns).z_value is None


def test_bad_numbers_and_names_are_refused() -> None:
    broken = FakeModel(lambda video, value: torch.full(value.shape[:3], torch.nan))
    with pytest.raises(CheckpointError, match="scores of iteration 1 are not finite"):
        plan(broken, None, SETTINGS, noise(), returns)
    with pytest.raises(ConfigError, match="variant = 'plan': unknown"):
        plan(FakeModel(bowl), None, SETTINGS, noise(), returns, variant="plan")  # type: ignore[arg-type]


def changed(**changes: object) -> PlannerSettings:
    return PlannerSettings.model_validate(SETTINGS.model_dump() | changes)


def test_scoring_may_take_fewer_steps_than_acting() -> None:
    model = FakeModel(bowl)
    plan(model, None, changed(score_steps=2), noise(), returns, with_value=True)
    steps = [(kind, number) for kind, _, number in model.calls if kind != "video"]
    assert steps == [("value", 2)] * SETTINGS.iterations + [("value", 10), ("action", (10, 1.0))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_steps": 11}, "score_steps = 11: must be at most denoise_steps = 10"),
        ({"score": "sharpe"}, "score = 'sharpe': unknown; use one of snr, lower_bound, mean, ensemble"),
    ],
)
def test_meaningless_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**changes)


def test_coupled_actions_read_the_values_of_the_noise_acted_on_at_their_level() -> None:
    """Without coupling the value tokens are the noise itself; with it the denoised values, noised again by it."""
    for level in (1.0, 0.1):
        model = FakeModel(bowl)
        result = Planner(model, SETTINGS, returns, Levels(value=level)).plan(None, noise(2), with_value=True)
        assert result.z_value is not None
        assert result.values is not None
        wanted = result.z_value if level == 1 else 0.9 * result.values + 0.1 * result.z_value
        torch.testing.assert_close(model.read, wanted)


def test_acting_on_the_winner_takes_the_noises_of_the_best_score() -> None:
    settings = SETTINGS.model_copy(update={"act_on": "winner"})
    result = plan(FakeModel(bowl), None, settings, noise(2), returns)
    assert result.z_value is not None
    acted = Planner(FakeModel(bowl), settings, returns).scores(
        trajectory(bowl(result.z_video[:, None], result.z_value[:, None, None]))
    )
    torch.testing.assert_close(acted.flatten(), result.history[-1].scores.flatten(1).amax(1))
    sampled = plan(FakeModel(bowl), None, SETTINGS, noise(2), returns)
    assert not torch.equal(sampled.z_video, result.z_video)


def test_a_gate_acts_unplanned_where_the_scores_hardly_differ() -> None:
    free = plan(FakeModel(bowl), None, SETTINGS, noise(3), returns)
    deviation = free.history[0].scores.amax(2).std(1, correction=0)
    between = float(deviation.sort().values[:2].mean())
    gated = plan(FakeModel(bowl), None, SETTINGS.model_copy(update={"gate": between}), noise(3), returns)
    unplanned = plan(FakeModel(bowl), None, SETTINGS, noise(3), returns, variant="unplanned")
    for row in range(3):
        wanted = unplanned if deviation[row] < between else free
        assert torch.equal(gated.z_video[row], wanted.z_video[row])
    assert any(deviation < between)
    assert any(deviation >= between)


def test_phi_is_the_best_or_the_mean_of_a_candidates_samples() -> None:
    """One lucky sample decides under max, not under mean."""

    def lucky(z_video: Tensor, z_value: Tensor) -> Tensor:
        score = torch.zeros(z_value.shape[:3])
        score[:, 0, 0], score[:, 1] = 3.0, 2.0
        return score

    for phi, wanted in (("max", 0), ("mean", 1)):
        settings = SETTINGS.model_copy(update={"phi": phi, "iterations": 1, "score": "mean"})
        assert int(plan(FakeModel(lucky), None, settings, noise(), returns).history[0].video_elites[0, 0]) == wanted


def test_an_ensemble_distrusts_candidates_whose_samples_disagree() -> None:
    returns = torch.tensor([[[[2.0, 2.0], [4.0, 4.0]], [[2.9, 2.9], [2.9, 2.9]]]])  # (1, 2, 2, 2)
    found = SCORES["ensemble"](returns, SETTINGS)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 3.0], [2.9, 2.9]]]))
    torch.testing.assert_close(SCORES["mean"](returns, SETTINGS), torch.tensor([[[2.0, 4.0], [2.9, 2.9]]]))
