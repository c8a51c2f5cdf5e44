"""Planning and acting against the reference's recorded runs (``plan_*``), with its departures switched on.

The folder comes from ``WAV_GOLDEN_DIR``; every size is read from its ``meta.json`` and tensors.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wav.config import PlannerSettings
from wav.flow_matching import inference_sigmas
from wav.model import WAVTransformer
from wav.model.inference import Context
from wav.model.reference import ReferencePlannerModel
from wav.planner import REFERENCE, NoiseShapes, Plan, plan

GOLDEN = Path(os.environ.get("WAV_GOLDEN_DIR", Path(__file__).parents[2] / ".." / "shared" / "golden"))
META: dict[str, Any] = json.loads((GOLDEN / "meta.json").read_text()) if (GOLDEN / "meta.json").is_file() else {}
PLANS: dict[str, Any] = META.get("plans", {})
pytestmark = pytest.mark.skipif(not PLANS, reason=f"no recorded plans in {GOLDEN}; set WAV_GOLDEN_DIR")
ATOL = 1e-4


@cache
def transformer() -> WAVTransformer:
    model = WAVTransformer(**META["config"])
    model.load_state_dict(load_file(GOLDEN / "transformer_weights.safetensors"))
    return model.eval()


class Run:
    """One recorded run: its tensors, its draws in call order, and the model that conditions on its observation."""

    def __init__(self, name: str) -> None:
        self.info, self.tensors = PLANS[name], load_file(GOLDEN / f"plan_{name}.safetensors")
        self.draws = [self.tensors[key] for key in sorted(k for k in self.tensors if k.startswith("rand."))]
        self.memory_frames = META["cases"][0]["n_previous"]
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
        self.model = ReferencePlannerModel(transformer(), NoiseShapes(self.future(self.video).shape, *tokens))
        self.context: Context = self.model.begin(
            memory[None],
            self.tensors["in.prompt_embeds"],
            self.tensors["in.prompt_attention_mask"],
            self.tensors.get("in.history_action_state"),
        )

    def future(self, video: Tensor) -> Tensor:
        """Future frames of noise over all frames."""
        return video[..., self.memory_frames :, :, :]

    def __call__(self, purpose: str, shape: tuple[int, ...], iteration: int = 0) -> Tensor:
        """The recorded draw (:class:`wav.planner.Noise`): action, value, video, iterations, final video and value."""
        last = self.info["exploration"]
        recorded = {
            "act.action": lambda: self.draws[0],
            "act.value": lambda: self.draws[-1] if last else self.draws[1],
            "act.video": lambda: self.future(self.draws[-2] if last else self.draws[-1]),
            "plan.video": lambda: self.future(self.draws[3 + 2 * iteration]),
            "plan.value": lambda: self.draws[4 + 2 * iteration],
        }
        return recorded[purpose]().reshape(1, *shape)

    def plan(self) -> Plan:
        """Our planner with the reference's settings; its alpha is the share of the OLD statistics."""
        explored, first = self.info["explore_config"], self.tensors
        new = 1 - explored["alpha_smooth"]
        settings = PlannerSettings(
            iterations=explored["explore_steps"] if self.info["exploration"] else 0,
            video_samples=self.M,
            value_samples=self.N,
            video_elites=len(first["it0.video_elite_idx"]) if self.info["exploration"] else 1,
            value_elites=len(first["it0.value_elite_idx"]) if self.info["exploration"] else 1,
            alpha=new,
            beta=new,
            sigma_decay=explored["sigma_decay"],
            denoise_steps=self.steps,
        )
        return plan(self.model, self.context, settings, self, lambda v: v[..., -1], with_value=True, compat=REFERENCE)


def close(ours: Tensor, recorded: Tensor) -> None:
    torch.testing.assert_close(ours.reshape(recorded.shape), recorded, atol=ATOL, rtol=0)


def runs(**wanted: bool) -> list[str]:
    """Names of the recorded runs with these flags."""
    return [name for name, info in PLANS.items() if all(info[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("name", runs(exploration=True))
def test_planned(name: str) -> None:
    run = Run(name)
    result, recorded = run.plan(), run.tensors
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
    assert result.values is not None
    close(result.values, recorded["out.value"])


@pytest.mark.parametrize("name", runs(exploration=False, return_action=True, return_value=True, return_video=False))
def test_unplanned(name: str) -> None:
    run = Run(name)
    result = run.plan()
    close(result.actions, run.tensors["out.action"])
    assert result.values is not None
    close(result.values, run.tensors["out.value"])


@pytest.mark.parametrize("name", runs(return_action=True, return_value=False, return_video=False))
def test_action_without_value(name: str) -> None:
    run = Run(name)
    features = run.model.video_features(run.context, run.future(run.draws[1])[None, None], 1)
    action = run.model.denoise_action(run.context, features, None, run.draws[0], run.steps)
    close(action, run.tensors["out.action"])


@pytest.mark.parametrize("name", runs(return_action=False, return_value=True, return_video=False))
def test_value_alone(name: str) -> None:
    run = Run(name)
    features = run.model.video_features(run.context, run.future(run.draws[1])[None, None], 1)
    close(run.model.denoise_value(features, run.draws[0][None, None], run.steps), run.tensors["out.value"])


@pytest.mark.parametrize("name", runs(return_action=True, return_value=True, return_video=True))
def test_video_value_and_action_together(name: str) -> None:
    run = Run(name)
    action, value = run.draws[0], run.draws[1]
    video = run.future(run.draws[2])[None]
    actions, future = run.model.denoise_jointly(run.context, video, value, action, run.steps)
    close(actions, run.tensors["out.action"])
    features = run.model.video_features(run.context, video[:, None], 1)
    close(run.model.stale_value(features, value, run.steps), run.tensors["out.value"])
    close_video(run, future)


@pytest.mark.parametrize("name", runs(return_action=False, return_value=False, return_video=True))
def test_video_alone(name: str) -> None:
    run = Run(name)
    close_video(run, run.model.denoise_video(run.context, run.future(run.draws[0])[None], run.steps))


def close_video(run: Run, future: Tensor) -> None:
    """Decode with the recorded VAE; the recorded video may start with the input images."""
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(**META["vae_config"])
    vae.load_state_dict(load_file(GOLDEN / "vae_weights.safetensors"))
    mean, std = (x.view(1, -1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
    with torch.no_grad():
        frames = vae.eval().decode(future[0] * std / vae.config.scaling_factor + mean, None).sample.clamp(-1, 1)
    recorded = run.tensors["out.video"]
    close(frames, recorded[:, :, -frames.shape[2] :])


def test_the_default_planner_differs() -> None:
    """Guard against a compat switch that does nothing: our planner must not reproduce the reference's mistakes."""
    names = runs(exploration=True)
    if not names:
        pytest.skip("no recorded run with exploration")
    run = Run(names[0])
    settings = PlannerSettings(
        iterations=1, video_samples=run.M, value_samples=run.N, video_elites=2, value_elites=2, denoise_steps=run.steps
    )
    result = plan(run.model, run.context, settings, run, lambda v: v[..., -1])
    assert not torch.allclose(result.history[0].values.flatten(0, 2), run.tensors["it0.values_denoised"], atol=1e-2)
    assert len(inference_sigmas(run.steps)) == run.steps + 1
