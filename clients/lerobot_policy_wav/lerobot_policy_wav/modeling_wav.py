"""The policy: LeRobot's batches in, actions that LeRobot's postprocessor unnormalises out; wav plans between them."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from wav.data.sources.frames import preparation
from wav.hub import is_hub_id
from wav.policy import Observation, Policy
from wav.policy.export import load_export
from wav.policy.sharing import pull

from .configuration_wav import TRAINING, WavConfig


class WavPolicy(PreTrainedPolicy):
    """Plans with an export of wav.

    Rows of a batch are environments: each has a memory of its own, which :meth:`reset` begins anew. The memory takes
    the frames of the calls of :meth:`predict_action_chunk`, one call per ``n_action_steps`` steps, as in training.

    Args:
        config: as the export's ``config.json`` says.
        policy: the loaded export.
    """

    config_class = WavConfig
    name = "wav"

    def __init__(self, config: WavConfig, policy: Policy | None = None, **_: Any) -> None:
        super().__init__(config)
        if policy is None:
            raise ValueError(f"--policy.path: name a folder that `wav export --lerobot` made; {TRAINING}")
        self.policy = policy
        self.model = policy.model.model  # so that LeRobot counts its parameters
        self._episode = -1
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: Any = None, revision: str | None = None, **_: Any
    ) -> WavPolicy:
        """Load a folder of ``wav export --lerobot``, or its hub id; every file is verified."""
        name = str(pretrained_name_or_path)
        folder = pull(name, revision=revision) if is_hub_id(name) else Path(name)
        config = config or PreTrainedConfig.from_pretrained(folder)
        return cls(config, load_export(folder, batch_size=config.batch_size, device=config.device)).eval()

    def reset(self) -> None:
        """Begin new episodes in all environments."""
        self._actions: deque[Tensor] = deque()
        self._episode += 1
        self._begun = 0

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Normalised actions (B, chunk_size, action_dim) for observations of B environments; one call of the policy."""
        statistics = self.policy.statistics
        states = statistics.key("state").denormalize(batch[OBS_STATE].float().cpu().numpy())
        images = {view: self._images(batch[feature]) for feature, view in self.config.views.items()}
        observations = [
            Observation({view: frames[i] for view, frames in images.items()}, state, task)
            for i, (state, task) in enumerate(zip(states, batch["task"], strict=True))
        ]
        for row in range(self._begun, len(observations)):
            self.policy.reset(row, episode=f"{self._episode}-{row}", seed=self.config.seed)
        self._begun = max(self._begun, len(observations))
        output = self.policy.act(observations, range(len(observations)), variant=self.config.variant)
        return torch.from_numpy(statistics.normalize_actions(output.actions)).to(self.config.device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next normalised action (B, action_dim) of each environment; plans every ``n_action_steps`` steps."""
        if not self._actions:
            self._actions.extend(self.predict_action_chunk(batch)[:, : self.config.n_action_steps].unbind(1))
        return self._actions.popleft()

    def _images(self, images: Tensor) -> list[np.ndarray]:
        """uint8 (H, W, 3) each, in the size and rotation trained with, of (B, 3, H, W), floats in [0, 1] or uint8."""
        if images.is_floating_point():
            images = (255 * images).round().clamp(0, 255).to(torch.uint8)
        data, trained = self.policy.data, self.policy.conventions.image_rotation
        stored = self.config.image_rotation or trained
        prepared = preparation(stored, trained, False, data.image_height, data.image_width)
        return [np.ascontiguousarray(prepared(frame)) for frame in images.permute(0, 2, 3, 1).cpu().numpy()]

    def forward(self, batch: dict[str, Any]) -> Any:
        """Not to be trained here."""
        raise NotImplementedError(TRAINING)

    def get_optim_params(self) -> dict[str, Any]:
        """Not to be trained here."""
        raise NotImplementedError(TRAINING)

    def _save_pretrained(self, save_directory: Path, state_dict: Any = None) -> None:
        """The export is the policy."""
        raise NotImplementedError("copy the folder that `wav export --lerobot` made, or `wav push` it")
