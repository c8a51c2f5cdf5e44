"""One training iteration of each stage against the reference's trainer, with its departures switched on.

The batch is encoded by the recorded VAE and corrupted by our own code from the recorded random numbers, so that what
the model is given, the loss and every parameter's gradient norm are all ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.conftest import Golden
from wav.config import PretrainVideoSettings, TrainJointSettings, TrainSettings, TrainValueSettings
from wav.data.statistics import symlog
from wav.data.windows import WindowBatch
from wav.flow_matching import training_sigmas
from wav.model import WAVTransformer
from wav.model.video import pack
from wav.training.draws import CLEAN, REFERENCE, Compat, StepInputs, draw
from wav.training.objectives import StageModule

RTOL = 1e-4
STAGES = {"video_only": PretrainVideoSettings, "value_only": TrainValueSettings, "action_full": TrainJointSettings}
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

    def inputs(self, compat: Compat) -> StepInputs:
        return draw(self.batch, self.settings, self, self, has_value=True, index=0, compat=compat)

    def module(self, model: WAVTransformer, compat: Compat) -> StageModule:
        """The recorded state is the whole history token: no zeros in front."""
        return StageModule(model, self.settings, self.memory_frames, action_dim=0, compat=compat)

    def check_given(self, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """What the model was called with, against what the reference's was."""
        latents, timestep, text, mask = args
        per_token = timestep[:, None, :, None].expand(-1, latents.shape[1], -1, latents.shape[4] * latents.shape[5])
        given = {"noisy_latents": pack(latents), "timesteps": per_token, "prompt_embeds": text}
        given["prompt_attention_mask"] = mask.float()
        for expert in ("value", "action"):
            if kwargs.get(f"{expert}_tokens") is not None:
                given[f"{expert}_states"] = kwargs[f"{expert}_tokens"]
                level = kwargs[f"{expert}_timestep"].view(-1, 1)
                given[f"{expert}_timestep"] = level.expand(-1, self.info["action_chunk"])
        if kwargs.get("history") is not None:
            given["history_action_state"] = kwargs["history"]
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
    model.register_forward_pre_hook(lambda _, args, kwargs: stage.check_given(args, kwargs), with_kwargs=True)
    loss, _ = stage.module(model, REFERENCE)(stage.inputs(REFERENCE))
    assert loss.item() == pytest.approx(stage.info["loss"], rel=RTOL)
    loss.backward()
    ours = {name: None if p.grad is None else p.grad.norm().item() for name, p in model.named_parameters()}
    recorded = stage.info["grad_norms"]
    untouched = {name for name, norm in ours.items() if norm is None}
    assert untouched == {name for name in ours if recorded.get(name) is None}
    wrong = {n: (ours[n], norm) for n, norm in recorded.items() if norm is not None and not _close(ours[n], norm)}
    assert not wrong


def _close(ours: float | None, recorded: float) -> bool:
    return ours == pytest.approx(recorded, rel=RTOL, abs=1e-7)


def test_our_own_objective_differs(stage: Stage, golden: Golden) -> None:
    """Guard against switches that do nothing: without them the loss is not the reference's."""
    rate = Compat(shared_memory_rate=True)  # one rate is all that is recorded
    with torch.no_grad():
        loss, _ = stage.module(golden.transformer(), CLEAN)(stage.inputs(rate))
    assert torch.isfinite(loss)
    assert loss.item() != pytest.approx(stage.info["loss"], rel=10 * RTOL)
