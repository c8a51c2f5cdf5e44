"""Planning and acting against the reference's recorded runs (``plan_*``).

Its departures from the paper are made in :mod:`tests.golden.reference_planner`. Each run is checked as
its flags in ``meta.json`` say; the seven that a full set holds are skipped by name when absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.conftest import META, Golden, known
from tests.golden.reference_planner import ReferenceModel, ReferencePlanner
from wav.config import PlannerSettings
from wav.inference.backends import planner_model
from wav.inference.fused import FusedPlannerModel
from wav.inference.torch import TorchPlannerModel
from wav.model import WAVTransformer
from wav.planning.planner import Planner
from wav.planning.types import NoiseShapes, Plan

ATOL = 1e-4
RUNS = known(
    META.get("plans", {}),
    "v2_explore",
    "v3_explore",
    "v2_noexplore",
    "v2_video_value_action",
    "v2_value_only",
    "v2_action_novalue",
    "v2_video_only_1img",
)


class Run:
    """One recorded run: its tensors, its draws in call order, and the model that variants on its observation."""

    def __init__(
        self,
        golden: Golden,
        transformer: WAVTransformer,
        name: str,
        kind: Any = TorchPlannerModel,
    ) -> None:
        self.golden = golden
        self.info, self.tensors = golden.recorded("plans", name)
        self.draws = [self.tensors[key] for key in sorted(k for k in self.tensors if k.startswith("rand."))]
        self.memory_frames = golden.meta["cases"][0]["n_previous"]
        memory = self.tensors["mid.init_latents"]
        if memory.shape[2] == 1:  # one image is every memory
            memory = memory.expand(-1, -1, self.memory_frames, -1, -1)
        self.video = next(d for d in self.draws if d.ndim == 5)
        explored = self.info["explore_config"]
        self.M, self.N = explored["dynamic_groups"], explored["value_groups"]
        self.steps = self.info["num_inference_steps"]
        tokens = [
            tuple(self.tensors[f"out.{k}"].shape[1:]) if f"out.{k}" in self.tensors else () for k in ("value", "action")
        ]
        self.model = kind(transformer, NoiseShapes(self.future(self.video).shape, *tokens))
        text, mask = self.tensors["in.prompt_embeds"], self.tensors["in.prompt_attention_mask"]
        observation = (memory[None], text, mask, self.tensors.get("in.history_action_state"))
        self.context: Any = self.model.begin(*observation)
        self.reference = ReferenceModel(transformer, *observation)

    def future(self, video: Tensor) -> Tensor:
        """Future frames of noise over all frames."""
        return video[..., self.memory_frames :, :, :]

    def __call__(self, purpose: str, shape: tuple[int, ...], iteration: int = 0) -> Tensor:
        """The recorded draw (:class:`wav.planning.types.Noise`): action, value, video, iterations, final video and value."""  # noqa: E501
        last = self.info["exploration"]
        recorded = {
            "act.action": lambda: self.draws[0],
            "act.value": lambda: self.draws[-1] if last else self.draws[1],
            "act.video": lambda: self.future(self.draws[-2] if last else self.draws[-1]),
            "plan.video": lambda: self.future(self.draws[3 + 2 * iteration]),
            "plan.value": lambda: self.draws[4 + 2 * iteration],
        }
        return recorded[purpose]().reshape(1, *shape)

    @property
    def settings(self) -> PlannerSettings:
        """The reference's settings as ours; its alpha is the share of the OLD statistics."""
        explored, planned, first = self.info["explore_config"], self.info["exploration"], self.tensors
        new = 1 - explored["alpha_smooth"]
        return PlannerSettings(
            iterations=explored["explore_steps"] if planned else 0,
            video_samples=self.M,
            value_samples=self.N,
            video_elites=len(first["it0.video_elite_idx"]) if planned else 1,
            value_elites=len(first["it0.value_elite_idx"]) if planned else 1,
            alpha=new,
            beta=new,
            sigma_decay=explored["sigma_decay"],
            denoise_steps=self.steps,
        )

    def plan(self) -> Plan:
        """Our planner, as the reference."""
        return ReferencePlanner(self.model, self.settings).plan(self.context, self)

    def stale_value(self, plan: Plan) -> Tensor:
        """The value that the reference reports beside the plan's actions."""
        assert plan.z_value is not None
        return self.reference.stale_value(plan.z_video, plan.z_value, self.steps)


def close(ours: Tensor, recorded: Tensor) -> None:
    torch.testing.assert_close(ours.reshape(recorded.shape), recorded, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", [TorchPlannerModel, FusedPlannerModel, planner_model])
@pytest.mark.parametrize("name", RUNS)
def test_recorded_run(name: str, kind: Any, golden: Golden, transformer: WAVTransformer) -> None:
    """The readable backend, fused blocks on torch, and what this machine picks."""
    check(Run(golden, transformer, name, kind))


def check(run: Run) -> None:
    """All that was recorded of a run, by its flags."""
    if run.info["exploration"]:
        planned(run)
    else:
        CHECKS[tuple(run.info[f"return_{kind}"] for kind in ("video", "value", "action"))](run)


def planned(run: Run) -> None:
    assert (run.info["return_value"], run.info["return_action"], run.info["return_video"]) == (True, True, False)
    result, recorded = run.plan(), run.tensors
    assert len(result.history) == run.info["explore_config"]["explore_steps"]
    for k, step in enumerate(result.history):
        close(step.values, recorded[f"it{k}.values_denoised"])
        close(step.scores, recorded[f"it{k}.value_snr"])
        close(step.scores.amax(2), recorded[f"it{k}.video_snr"])
        assert step.value_elites[0].tolist() == recorded[f"it{k}.value_elite_idx"].tolist()
        assert step.video_elites[0].tolist() == recorded[f"it{k}.video_elite_idx"].tolist()
    last = result.history[-1]
    for view in range(run.info["n_view"]):  # the reference keeps one distribution for all views
        close(last.video.mean[0, view], run.future(recorded["explore.video_noise_mean"]))
        close(last.video.std[0, view], run.future(recorded["explore.video_noise_std"]))
    close(last.value.mean, recorded["explore.value_noise_mean"])
    close(last.value.std, recorded["explore.value_noise_std"])
    close(result.actions, recorded["out.action"])
    close(run.stale_value(result), recorded["out.value"])
    differs_from_ours(run)


def differs_from_ours(run: Run) -> None:
    """Our planner must not reproduce the reference's mistakes."""
    settings = run.settings.model_copy(update={"iterations": 1})
    result = Planner(run.model, settings, lambda values: values[..., -1]).plan(run.context, run)
    assert not torch.allclose(result.history[0].values.flatten(0, 2), run.tensors["it0.values_denoised"], atol=1e-2)


def unplanned(run: Run) -> None:
    result = run.plan()
    close(result.actions, run.tensors["out.action"])
    close(run.stale_value(result), run.tensors["out.value"])


def action_without_value(run: Run) -> None:
    features = run.model.video_features(run.context, run.future(run.draws[1])[None, None], (1.0,))
    action = run.model.denoise_action(run.context, features, None, run.draws[0], run.steps)
    close(action, run.tensors["out.action"])


def value_alone(run: Run) -> None:
    features = run.model.video_features(run.context, run.future(run.draws[1])[None, None], (1.0,))
    close(run.model.denoise_value(features, run.draws[0][None, None], run.steps), run.tensors["out.value"])


def video_value_and_action_together(run: Run) -> None:
    action, value = run.draws[0], run.draws[1]
    video = run.future(run.draws[2])[None]
    actions, future = run.reference.denoise_jointly(video, value, action, run.steps)
    close(actions, run.tensors["out.action"])
    close(run.reference.stale_value(video, value, run.steps), run.tensors["out.value"])
    close_video(run, future)


def video_alone(run: Run) -> None:
    close_video(run, run.model.denoise_video(run.context, run.future(run.draws[0])[None], run.steps))


def close_video(run: Run, future: Tensor) -> None:
    """Decode with the recorded VAE; the recorded video may start with the input images."""
    frames = run.golden.vae.decode(future[0])
    close(frames, run.tensors["out.video"][:, :, -frames.shape[2] :])


#: By what a run without exploration returned: (video, value, action).
CHECKS: dict[tuple[bool, bool, bool], Callable[[Run], None]] = {
    (False, True, True): unplanned,
    (False, False, True): action_without_value,
    (False, True, False): value_alone,
    (True, True, True): video_value_and_action_together,
    (True, False, False): video_alone,
}
