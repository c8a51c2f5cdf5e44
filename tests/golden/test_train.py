"""One training iteration of each stage against the reference's trainer (:mod:`tests.golden.reference_trainer`).

The batch is encoded by the recorded VAE and corrupted by our own code from the recorded random numbers, so that what
the model is given, the loss and every parameter's gradient norm are all ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.conftest import Golden
from tests.golden.reference_trainer import ReferenceJoint, ReferenceValue, ReferenceVideo
from tests.training.micro import record_calls
from wav.config import CouplingSettings, PretrainVideoSettings, TrainJointSettings, TrainSettings, TrainValueSettings
from wav.data.statistics import symlog
from wav.data.windows import WindowBatch
from wav.flow_matching import training_sigmas
from wav.model import WAVTransformer
from wav.model.loading import published_name
from wav.model.video import pack
from wav.training.objectives.base import Objective
from wav.training.objectives.joint import JointObjective
from wav.training.objectives.value import ValueObjective
from wav.training.objectives.video import VideoObjective

RTOL = 1e-4
STAGES = {"video_only": PretrainVideoSettings, "value_only": TrainValueSettings, "action_full": TrainJointSettings}
#: The reference's objective and ours.
KINDS: dict[str, tuple[type[Objective], type[Objective]]] = {
    "video_only": (ReferenceVideo, VideoObjective),
    "value_only": (ReferenceValue, ValueObjective),
    "action_full": (ReferenceJoint, JointObjective),
}
#: What the reference's level draws are for, in call order.
LEVELS = {
    "video_only": ["video_level"],
    "value_only": ["video_label", "value_level"],
    "action_full": ["action_level", "condition_label"],
}
#: What its expert noises are for, in call order.
NOISES = {"video_only": [], "value_only": ["value_noise"], "action_full": ["action_noise", "value_noise"]}
#: The loss is the action's alone; one draw per sample.
CHANGES = {
    "action_full": {"action_probability": 1.0, "weight_action": 1.0, "action_draws": 1, "value_draws": 1},
    "value_only": {"value_draws": 1},
}


class Stage:
    """One recorded iteration: settings, encoded batch and random numbers."""

    def __init__(self, golden: Golden, name: str) -> None:
        self.name = name
        self.info, self.tensors = golden.recorded("train", name)
        self.memory_frames: int = self.info["n_previous"]
        self.batch = self._batch(golden)
        self.text_length = self.batch.text.shape[1]
        self.draws = {key: self._draws(key) for key in ("caption_dropout_u", "u_density", "random_random", "trainer")}
        (self.video_noise,) = (self._frames(noise) for noise in self._draws("gen_noise"))

    def _draws(self, kind: str) -> list[Tensor]:
        """Draws of one kind, in call order."""
        return [self.tensors[key] for key in sorted(self.tensors) if key.startswith("rand.") and key.endswith(kind)]

    def _frames(self, rows: Tensor) -> Tensor:
        """(B, V, ...) of the reference's rows (b v)."""
        return rows.unflatten(0, (self.info["B"], self.info["n_view"]))

    def _batch(self, golden: Golden) -> WindowBatch:
        data, memory_frames, chunk = self.tensors, self.memory_frames, self.info["action_chunk"]
        video = data["in.video"].transpose(1, 2).flatten(0, 1)  # (B V, 3, frames, H, W)
        clip, images = self._draws("vae_sample")
        memory = video[:, :, :memory_frames].transpose(1, 2).flatten(0, 1).unsqueeze(2)
        encoded = golden.vae.encode(memory, images).squeeze(2).unflatten(0, (-1, memory_frames)).transpose(1, 2)
        steps = slice(memory_frames, memory_frames + chunk)  # the reference's labels start at its memory
        size = self.info["B"]
        return WindowBatch(
            memory=self._frames(encoded),
            future=self._frames(golden.vae.encode(video[:, :, memory_frames:], clip)),
            text=data["in.prompt_embeds"],
            text_mask=data["in.prompt_attention_mask"].bool(),
            state=data["in.state"][:, 0],
            actions=data["in.actions"][:, steps],
            values=symlog(data["in.value_targets"][:, steps]),
            episode=torch.zeros(size, dtype=torch.int64),
            step=torch.zeros(size, dtype=torch.int64),
        )

    @property
    def settings(self) -> TrainSettings:
        return STAGES[self.name](
            caption_dropout=self.info["caption_dropout_p"],
            memory_noise=self.info["noise_to_first_frame"],
            **CHANGES.get(self.name, {}),
        )

    @property
    def empty_text(self) -> Tensor:
        return self.tensors["in.uncond_prompt_embeds"][0]

    @property
    def empty_text_mask(self) -> Tensor:
        """Not recorded, because the reference never uses it: as good as any."""
        return torch.arange(self.text_length) == 0

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        if purpose == "caption_dropout":
            return self.draws["caption_dropout_u"][0].view(shape)
        (rate,) = self.draws["random_random"]  # one for the batch: the others must not be looked at
        return torch.cat([rate.float(), torch.full((shape[0] - 1,), torch.nan)])

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        frames = self.memory_frames
        if purpose == "memory_noise":
            return self.video_noise[:, :, :, :frames]
        if purpose == "video_noise":
            return self.video_noise[:, :, :, frames:]
        if 0 in shape:
            return torch.zeros(shape)
        return self.draws["trainer"][NOISES[self.name].index(purpose)].view(shape)

    def levels(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        if 0 in shape:
            return torch.zeros(shape)
        sigmas = training_sigmas()
        u = self.draws["u_density"][LEVELS[self.name].index(purpose)]
        return sigmas[(u * len(sigmas)).long()].view(shape)

    def objective(self, model: WAVTransformer, kind: type[Objective]) -> Objective:
        """The recorded state is the whole history token: no zeros in front."""
        return kind(model, self.settings, self.memory_frames, 0, CouplingSettings())

    def check_given(self, calls: dict[str, list[tuple[tuple[Tensor, ...], dict[str, Any]]]]) -> None:
        """What the parts of the model were called with, against what the reference's were."""
        ((latents, timestep, text, mask), _), *_ = calls["video"]
        per_token = timestep[:, None, :, None].expand(-1, latents.shape[1], -1, latents.shape[4] * latents.shape[5])
        given = {"noisy_latents": pack(latents), "timesteps": per_token, "prompt_embeds": text}
        given["prompt_attention_mask"] = mask.float()
        for expert in ("value", "action"):
            for (tokens, level, *read), _ in calls[expert]:
                given[f"{expert}_states"] = tokens
                given[f"{expert}_timestep"] = level.view(-1, 1).expand(-1, self.info["action_chunk"])
                if expert == "action":
                    given["history_action_state"] = read[-1]
        recorded = {key.removeprefix("fwd_in.") for key in self.tensors if key.startswith("fwd_in.")}
        assert recorded == {*given, "condition_mask"}
        for key, tensor in given.items():
            wanted = self.tensors[f"fwd_in.{key}"]
            torch.testing.assert_close(tensor.reshape(wanted.shape), wanted, atol=1e-5, rtol=0, msg=key)


@pytest.fixture(scope="module", params=list(STAGES))
def stage(request: pytest.FixtureRequest, golden: Golden) -> Stage:
    return Stage(golden, request.param)


def test_iteration(stage: Stage, golden: Golden) -> None:
    model = golden.transformer()
    calls = {name: record_calls(model, name) for name in ("video", "value", "action")}
    objective = stage.objective(model, KINDS[stage.name][0])
    loss, _ = objective(objective.draw(stage.batch, stage, stage, 0))
    stage.check_given(calls)
    assert loss.item() == pytest.approx(stage.info["loss"], rel=RTOL)
    loss.backward()
    ours = {
        published_name(name): None if p.grad is None else p.grad.norm().item() for name, p in model.named_parameters()
    }
    recorded = stage.info["grad_norms"]
    untouched = {name for name, norm in ours.items() if norm is None}
    assert untouched == {name for name in ours if recorded.get(name) is None}
    wrong = {n: (ours[n], norm) for n, norm in recorded.items() if norm is not None and not _close(ours[n], norm)}
    assert not wrong


def _close(ours: float | None, recorded: float) -> bool:
    return ours == pytest.approx(recorded, rel=RTOL, abs=1e-7)


def test_our_own_objective_differs(stage: Stage, golden: Golden) -> None:
    """Guard against departures that do nothing: without them the loss is not the reference's."""
    objective = stage.objective(golden.transformer(), KINDS[stage.name][1])
    inputs = objective.draw(stage.batch, stage, stage, 0)
    rate = inputs.draws.memory_rate[:1].expand_as(inputs.draws.memory_rate)  # one rate is all that is recorded
    with torch.no_grad():
        loss, _ = objective(replace(inputs, draws=replace(inputs.draws, memory_rate=rate)))
    assert torch.isfinite(loss)
    assert loss.item() != pytest.approx(stage.info["loss"], rel=10 * RTOL)
