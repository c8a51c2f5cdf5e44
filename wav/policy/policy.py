"""Observations in, action chunks out: what evaluation and a robot's server call.

A :class:`Policy` keeps a short memory per row (an environment, a client), encodes only the newest frame, asks the
planner for a chunk and hands it back in the environment's units. Calls are padded to one fixed batch shape and every
row draws its own noise, so a row's actions depend on its own observations, seed, episode and call alone::

    policy = Policy.load("export")
    policy.reset("robot", episode="pick-up-12", seed=0)
    actions = policy.act([observation], ["robot"]).actions[0]  # (A, 7)

Shapes: n rows asked for, V views, C latent channels, h x w latent grid, Ff future latent frames, A action chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wav.config import CouplingSettings, DataSettings, ExportSettings, PlannerSettings
from wav.data.conventions import DELTA_ACTIONS, Conventions
from wav.data.statistics import Statistics
from wav.errors import CheckpointError, DataError
from wav.inference.backends import compiles_here, noise_shapes, planner_model
from wav.inference.threads import on_threads
from wav.io.files import canonical_digest, file_digest, read_json
from wav.io.readers import understood
from wav.planning import VARIANTS, Variant
from wav.planning.planner import Planner
from wav.planning.types import Levels, PlannerModel, RowKey, SeededNoise
from wav.policy.output import PlanSummary, PolicyOutput, concatenate, host, summary
from wav.policy.parts import check_observation, check_parts
from wav.policy.results import Results
from wav.section import Switch
from wav.sim.env import Observation

if TYPE_CHECKING:
    from wav.codec import Codec
    from wav.model import WAVTransformer
    from wav.text import TextEncoder

__all__ = ["VARIANTS", "Observation", "PlanSummary", "Policy", "PolicyOutput"]

Prompt = tuple[NDArray[np.float32], NDArray[np.bool_]]
MAX_PROMPTS = 256
"""Embedded instructions that are kept: whoever calls a server may send a new one each time."""


@dataclass
class _Row:
    """State of one row between calls."""

    episode: int | str
    seed: int
    memory: deque[NDArray[np.float32]]  #: latents (V, C, h, w) of the last policy calls, oldest first
    call: int = 0
    means: tuple[Tensor, Tensor] | None = field(default=None)


class Policy:
    """A trained world-value-action model with all it needs to act.

    Args:
        model: the transformer.
        codec: frames to latents.
        text_encoder: instructions to embeddings; may be None where ``prompts`` holds every instruction.
        statistics: of actions, state and (with a value expert) values, as trained with.
        conventions: what images, states and actions meant in training.
        data: section ``data`` the model was trained with.
        planner: section ``planner``; :meth:`act` takes others for a call.
        batch_size: rows of every model call; fewer are padded, more are split.
        device: cpu, cuda, cuda:1, or auto.
        prompts: instruction -> embedding (L, Ct), mask (L,).
        digest: names the weights.
        compile: ``on``: plan on compiled code and CUDA graphs (:mod:`wav.inference.compiled`), where the CPU kernels
            do not run; ``auto``: where :func:`wav.inference.backends.compiles_here`.
        coupling: section ``coupling`` as trained with: the noise levels at which planning reads video features and
            values; None: none, the paper's form.
        results: what its evaluation found (:mod:`wav.policy.results`); None: it was not evaluated.

    Raises:
        CheckpointError: model, codec, statistics and data settings do not belong together.
    """

    def __init__(
        self,
        model: WAVTransformer,
        codec: Codec,
        text_encoder: TextEncoder | None,
        statistics: Statistics,
        conventions: Conventions,
        data: DataSettings,
        planner: PlannerSettings,
        batch_size: int = 8,
        device: str = "cpu",
        prompts: Mapping[str, Prompt] | None = None,
        digest: str = "",
        compile: Switch | bool = "off",
        coupling: CouplingSettings | None = None,
        results: Results | None = None,
    ) -> None:
        self.codec, self.text_encoder, self.statistics = codec, text_encoder, statistics
        self.conventions, self.data, self.planner, self.batch_size = conventions, data, planner, batch_size
        self.digest, self.coupling, self.results = digest, coupling or CouplingSettings(), results or Results()
        self.levels = Levels.of(self.coupling)
        check_parts(model, codec, statistics, conventions, data)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        grid = (data.image_height // codec.spatial, data.image_width // codec.spatial)
        future = 1 + (data.future_frames - 1) // codec.temporal
        shapes = noise_shapes(model, len(data.views), grid, future, data.action_chunk)
        model = model.to(device).eval()
        compiled = compile in ("on", True) or (compile == "auto" and compiles_here(model))
        self.model = planner_model(model, shapes, "compiled" if compiled else "auto")
        self._prompts: dict[str, Prompt] = dict(prompts or {})
        self._rows: dict[Hashable, _Row] = {}

    @property
    def has_values(self) -> bool:
        """Whether the model has a value expert, which planning needs."""
        return self.model.shapes.value is not None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        batch_size: int = 8,
        device: str = "auto",
        planner: PlannerSettings | None = None,
        compile: Switch | bool | None = None,
    ) -> Policy:
        """Load a policy folder: model/, codec/, text_encoder/, statistics.json, conventions.json, settings.json.

        A name on the hub (``USER/NAME``) is fetched and verified first (:mod:`wav.policy.sharing`).

        ``planner`` and ``compile`` as in the folder's settings unless given.

        Raises:
            CheckpointError: a part is missing, unreadable, or does not belong to the others.
            ServiceError: the hub cannot be reached, or refuses.
        """
        from wav.codec import load_codec
        from wav.model.loading import load_model
        from wav.policy.sharing import local_export
        from wav.text import TextEncoder

        folder, remedy = local_export(folder), "export the policy again"
        for part in ("model", "codec", "text_encoder", "statistics.json", "conventions.json", "settings.json"):
            if not (folder / part).exists():
                raise CheckpointError(f"{folder / part}: missing; {remedy} or give a policy folder")
        settings = read_json(folder / "settings.json", remedy, CheckpointError)
        with understood(folder / "settings.json", f"these are not a policy's settings; {remedy}", CheckpointError):
            data = DataSettings.model_validate(settings["data"])
            planner = planner or PlannerSettings.model_validate(settings["planner"])
            coupling = CouplingSettings.model_validate(settings.get("coupling", {}))
            if compile is None:
                compile = ExportSettings.model_validate(settings.get("export", {})).compile
        weights = sorted((folder / "model").glob("*.safetensors"))
        with understood(folder, remedy, CheckpointError):
            parts = (
                load_model(folder / "model"),
                load_codec(folder / "codec"),
                TextEncoder.from_pretrained(folder / "text_encoder", tokens=data.text_tokens),
                Statistics.load(folder / "statistics.json", remedy),
                Conventions.from_json(read_json(folder / "conventions.json", remedy), str(folder / "conventions.json")),
            )
        return cls(
            *parts,
            data,
            planner,
            batch_size,
            device,
            digest=canonical_digest([file_digest(file) for file in weights]),
            compile=compile,
            coupling=coupling,
            results=Results.load(folder),
        )

    @property
    def execute_steps(self) -> int:
        """Actions of a chunk to execute before the next call: as many as in its evaluation."""
        return min(self.results.execute_steps, self.data.action_chunk)

    @property
    def compiled(self) -> bool:
        """Whether compiled code plans, which rounds otherwise."""
        return bool(self.model.compiled)

    def reset(self, row: Hashable, episode: int | str, seed: int) -> None:
        """Start an episode on a row: its memory is empty and its next call is number 0."""
        self._rows[row] = _Row(episode, seed, deque(maxlen=self.data.memory_frames))

    def forget(self, row: Hashable) -> None:
        """Drop a row's state."""
        self._rows.pop(row, None)

    def act(
        self,
        observations: Sequence[Observation],
        rows: Sequence[Hashable],
        *,
        variant: Variant = "planned",
        with_value: bool = False,
        with_future: bool = False,
        planner: PlannerSettings | None = None,
    ) -> PolicyOutput:
        """Decide a chunk of actions for each row, and advance the rows' memories; a call that fails changes nothing.

        Args:
            observations: n current observations.
            rows: the n rows they belong to, each begun with :meth:`reset`.
            variant: planned, unplanned or temperature; see :meth:`wav.planning.planner.Planner.plan`.
            with_value: also predict the return along the chunk.
            with_future: also predict the future latents (one video denoising more).
            planner: settings for this call instead of the policy's.

        Raises:
            DataError: an observation does not fit, a row is unknown, named twice or has no observation.
            ConfigError: planning or values without value expert. CheckpointError: the model gave no finite numbers.
        """
        if not rows or len(rows) != len(observations) or len(set(rows)) != len(rows):
            raise DataError(f"rows = {list(rows)}: need {len(observations)} different rows, one per observation")
        unknown = [row for row in rows if row not in self._rows]
        if unknown:
            raise DataError(f"row {unknown[0]!r}: no episode was begun on it; call reset first")
        for observation in observations:
            check_observation(observation, self.data, self.conventions)
        prompts = [self._prompt(observation.instruction) for observation in observations]
        states = [self._rows[row] for row in rows]
        groups = [slice(i, i + self.batch_size) for i in range(0, len(rows), self.batch_size)]
        options = (planner or self.planner, variant, with_value, with_future)
        before = [replace(state, memory=state.memory.copy()) for state in states]
        try:
            with torch.inference_mode(), on_threads(self.model) as model:
                parts = [self._act(model, observations[g], states[g], prompts[g], *options) for g in groups]
        except BaseException:
            self._rows.update(zip(rows, before, strict=True))
            raise
        return concatenate(parts)

    def make_planner(self, settings: PlannerSettings | None = None, model: PlannerModel | None = None) -> Planner:
        """A planner on this policy's model, returns and noise levels, by its settings or others."""
        return Planner(model or self.model, settings or self.planner, self.returns, self.levels)

    def context(self, histories: Sequence[Sequence[Observation]]) -> Any:
        """The model's handle of rows that have seen these observations at their policy calls, the newest last.

        For instruments that call the planner themselves; no row's state changes.

        Raises:
            DataError: an observation does not fit.
        """
        states = []
        for seen in histories:
            state = _Row("", 0, deque(maxlen=self.data.memory_frames))
            for observation in seen[-self.data.memory_frames :]:
                check_observation(observation, self.data, self.conventions)
                self._remember(state, np.stack([observation.images[view] for view in self.data.views]))
            states.append(state)
        now = [seen[-1] for seen in histories]
        return self._context(now, states, [self._prompt(observation.instruction) for observation in now])

    def decode_future(self, future: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Frames (V, F_raw, H, W, 3) of one row's predicted future latents (V, C, Ff, h, w)."""
        return self.codec.decode_clips(np.ascontiguousarray(future))

    def generate_video(
        self, observation: Observation, chunks: int, *, seed: int = 0, episode: int | str = "video"
    ) -> NDArray[np.uint8]:
        """Roll the future out over several chunks, each from the frames generated before it.

        The memory is that of deployment: the last frames of the chunks so far, the newest last.

        Returns:
            frames (V, 1 + chunks * F_raw, H, W, 3), the observed frame first; frames of a chunk are
            ``data.frame_stride`` steps apart.
        """
        check_observation(observation, self.data, self.conventions)
        prompt = self._prompt(observation.instruction)
        current = np.stack([observation.images[view] for view in self.data.views])
        state = _Row(episode, seed, deque(maxlen=self.data.memory_frames))
        frames = [current[:, None]]
        with torch.inference_mode():
            for chunk in range(chunks):
                self._remember(state, current)
                context = self._context([observation], [state], [prompt])
                noise = SeededNoise([RowKey(seed, episode, chunk)])("generate.video", self.model.shapes.video)
                future = self.model.denoise_video(context, noise, self.planner.denoise_steps)
                frames.append(self.decode_future(future[0].cpu().numpy()))
                current = frames[-1][:, -1]
        return np.concatenate(frames, axis=1)

    def _act(
        self,
        model: Any,
        observations: Sequence[Observation],
        states: Sequence[_Row],
        prompts: Sequence[Prompt],
        settings: PlannerSettings,
        variant: Variant,
        with_value: bool,
        with_future: bool,
    ) -> PolicyOutput:
        """At most ``batch_size`` rows, padded to it by repeating the first unless rows do not affect each other."""
        for observation, state in zip(observations, states, strict=True):
            self._remember(state, np.stack([observation.images[view] for view in self.data.views]))
        n = len(states)
        index = [*range(n), *[0] * (0 if self.model.independent_rows else self.batch_size - n)]
        padded = [states[i] for i in index]
        context = self._context([observations[i] for i in index], padded, [prompts[i] for i in index])
        keys = [RowKey(s.seed, s.episode, s.call) for s in padded]
        warm = self._warm(padded) if settings.warm_start else None
        noise = SeededNoise(keys, self.model.device)
        planner = self.make_planner(settings, model)
        result = planner.plan(context, noise, variant=variant, warm=warm, with_value=with_value)
        future = None
        if with_future:
            future = host(model.denoise_video(context, result.z_video, settings.denoise_steps), n)
        for i, state in enumerate(states):
            state.call += 1
            state.means = None if result.means is None else (result.means[0][i].clone(), result.means[1][i].clone())
        returns = None if result.values is None else host(self.returns(result.values), n)
        return PolicyOutput(self.actions(host(result.actions, n)), returns, future, summary(result, n, settings))

    def returns(self, values: Tensor) -> Tensor:
        """Returns (..., A) in reward units of normalised values (..., A, Cv)."""
        return self.statistics.denormalize_values(values)[..., -1]

    def actions(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Actions (..., A, action_dim) in the environment's units of tokens (..., A, Ca); deltas clipped to [-1, 1]."""
        actions = self.statistics.denormalize_actions(tokens[..., : self.data.action_dim])
        return np.clip(actions, -1, 1) if self.conventions.action == DELTA_ACTIONS else actions

    def _remember(self, state: _Row, images: NDArray[np.uint8]) -> None:
        """Encode the newest frames (V, H, W, 3), alone so that no other row decides their last bits."""
        latents = self.codec.encode_frames(images)
        missing = self.data.memory_frames - len(state.memory)
        state.memory.extend([latents] * (missing if not state.memory else 1))

    def _context(self, observations: Sequence[Observation], states: Sequence[_Row], prompts: Sequence[Prompt]) -> Any:
        """The model's handle of these rows."""
        memory = np.stack([np.stack(list(state.memory), axis=2) for state in states])  # (B, V, C, Fm, h, w)
        state = self.statistics.normalize_state(np.stack([o.state for o in observations]).astype(np.float32))
        history = np.concatenate([np.zeros((len(state), self.data.action_dim), np.float32), state], axis=1)
        text, mask = (np.stack([prompt[i] for prompt in prompts]) for i in (0, 1))
        return self.model.begin(
            torch.from_numpy(memory),
            torch.from_numpy(text),
            torch.from_numpy(mask),
            torch.from_numpy(history.astype(np.float32))[:, None],
        )

    def _warm(self, states: Sequence[_Row]) -> tuple[Tensor, Tensor] | None:
        """Means of the rows' previous plans; zero for a row without one."""
        shapes = self.model.shapes
        if shapes.value is None:
            return None
        zeros = torch.zeros(shapes.video), torch.zeros(shapes.value)
        means = [state.means or zeros for state in states]
        video, value = (torch.stack([mean[i].to(self.model.device) for mean in means]) for i in (0, 1))
        return video, value

    def _prompt(self, instruction: str) -> Prompt:
        """Embedding and mask of an instruction, computed once."""
        if instruction not in self._prompts:
            if self.text_encoder is None:
                known = ", ".join(map(repr, sorted(self._prompts)))
                raise DataError(
                    f"instruction {instruction!r}: not among this policy's prompts ({known}); "
                    "load it with its text encoder"
                )
            embedding, mask = self.text_encoder.encode([instruction])
            if len(self._prompts) >= MAX_PROMPTS:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[instruction] = embedding[0], mask[0]
        return self._prompts[instruction]
