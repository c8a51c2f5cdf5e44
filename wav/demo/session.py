"""One episode of a policy in a simulator, and what the policy imagines before each of its calls.

The plans are those of an evaluation: the same noise, memory and actions as :meth:`wav.policy.policy.Policy.act` has for
the episode of that task and initial state. Beyond them every candidate future of the search is decoded to frames.

Letters: M candidates, N values of each, K1 elites, V views, F frames, A actions of a chunk.
"""

from __future__ import annotations

import base64
import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError

from wav.config import PlannerSettings, Section
from wav.data.conventions import DELTA_ACTIONS
from wav.data.names import full_name
from wav.errors import ConfigError, SimulationError
from wav.evaluation.evaluate import applicable
from wav.inference.threads import on_threads
from wav.parameter_files import explain
from wav.planning import VARIANTS, Variant
from wav.planning.planner import Planner
from wav.planning.scores import phi
from wav.planning.types import Plan, RowKey, SeededNoise
from wav.policy.policy import Policy
from wav.sim.env import Observation, SimReply, TaskSpec
from wav.sim.registry import select_tasks
from wav.sim.workers import SimPool

MAX_K, MAX_M = 10, 32
AXES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


class Ask(Section):
    """What the page asks for."""

    do: Literal["begin", "plan", "step"]  #: an episode; other futures of the same state; actions, then a plan
    task: str = Field(max_length=200)
    index: int = Field(ge=0, le=49, description="initial state, of evaluation's")
    variant: Variant = "planned"
    K: int = Field(ge=0, le=MAX_K)
    M: int = Field(ge=1, le=MAX_M)
    execute: int = Field(ge=1, le=1000, description="actions executed of the plan that is shown")

    @classmethod
    def read(cls, message: str | bytes) -> Ask:
        """A message of the page; raises ConfigError for any other."""
        try:
            return cls.model_validate_json(message)
        except ValidationError as error:
            raise explain(error, cls, "message") from None


@dataclass
class Episode:
    """The episode that is shown, between two calls of the policy."""

    task: TaskSpec
    index: int
    seen: deque[Observation]  #: at the last calls, the newest last
    steps: int = 0
    call: int = 0
    success: bool = False
    warm: tuple[torch.Tensor, torch.Tensor] | None = None  #: means of the plan before
    plan: Plan | None = None
    actions: NDArray[np.float32] | None = None  #: (A, action_dim) of ``plan``

    @property
    def over(self) -> bool:
        """Whether nothing is left to execute."""
        return self.success or self.steps >= self.task.max_steps


class Session:
    """Answers what the page asks; called from one thread.

    ``policy`` is loaded with ``batch_size`` 1, and ``pool`` is one slot of its suite.
    """

    def __init__(self, policy: Policy, pool: SimPool, seed: int = 7) -> None:
        self.policy, self.pool, self.seed = policy, pool, seed
        self.tasks = {task.name: task for task in select_tasks(policy.data.suite, policy.data.tasks)}
        self.variants, _ = applicable(VARIANTS, policy.has_values)
        self.episode: Episode | None = None

    def about(self) -> dict[str, Any]:
        """What the page has to know before it asks."""
        data, planner = self.policy.data, self.policy.planner
        named = self.policy.conventions.action == DELTA_ACTIONS and data.action_dim == len(AXES)
        return {
            "is": "about",
            "suite": data.suite,
            "checkpoint": self.policy.digest[:12],
            "tasks": [{"name": task.name, "instruction": task.instruction} for task in self.tasks.values()],
            "variants": self.variants,
            "views": data.views,
            "size": [data.image_width, data.image_height],
            "hz": data.control_hz,
            "stride": data.frame_stride,
            "ahead": round(data.future_frames * data.frame_stride / data.control_hz, 2),
            "axes": AXES if named else [str(number) for number in range(data.action_dim)],
            "K": min(planner.iterations, MAX_K),
            "M": min(planner.video_samples, MAX_M),
            "execute": self.policy.execute_steps,  # as it was evaluated
            "most": {"K": MAX_K, "M": MAX_M, "execute": data.action_chunk, "index": 49},
            "score": planner.score,
        }

    def warm_up(self) -> None:
        """Start the simulator and plan once, so that the first page does not wait for either."""
        planner = self.policy.planner
        first = {"do": "begin", "task": next(iter(self.tasks)), "index": 0, "variant": self.variants[0], "execute": 1}
        K, M = min(planner.iterations, MAX_K), min(planner.video_samples, MAX_M)
        deque(self.answer(Ask.model_validate({**first, "K": K, "M": M})), maxlen=0)

    def answer(self, ask: Ask) -> Iterator[dict[str, Any]]:
        """The scene where it changed, the plan for it, then the candidates' futures one by one.

        Raises:
            ConfigError: what is asked for does not exist. SimulationError: the simulator failed.
        """
        if ask.variant not in self.variants:
            raise ConfigError(f"variant = {ask.variant}: the model has no value expert; use {self.variants[0]}")
        if ask.do == "begin":
            yield self._begin(ask)
        elif self.episode is None or (ask.do == "step" and (self.episode.over or self.episode.actions is None)):
            raise ConfigError(f"do = {ask.do}: no episode is under way; begin one")
        elif ask.do == "step":
            yield self._step(self.episode, ask)
        assert self.episode is not None
        context, plan, told = self._imagine(self.episode, ask)
        yield told
        if plan.history:
            for number, noise in enumerate(plan.history[-1].z_video[0].unbind()):
                yield {"is": "future", "m": number, "frames": self._decoded(context, noise[None])}

    def _begin(self, ask: Ask) -> dict[str, Any]:
        if ask.task not in self.tasks:
            raise ConfigError(f"task = {ask.task}: not of this export; use one of {', '.join(self.tasks)}")
        self.episode = None
        self.pool.submit_reset(0, ask.task, ask.index, record=True)
        reply = self._reply()
        self.episode = Episode(self.tasks[ask.task], ask.index, deque(maxlen=self.policy.data.memory_frames))
        return self._scene(self.episode, reply)

    def _step(self, episode: Episode, ask: Ask) -> dict[str, Any]:
        assert episode.actions is not None
        count = min(ask.execute, episode.task.max_steps - episode.steps)
        actions, self.episode = episode.actions[:count], None  # lost unless the simulator answers
        self.pool.submit_steps(0, actions)
        reply = self._reply()
        self.episode, episode.warm = episode, episode.plan.means if episode.plan else None
        episode.steps, episode.call = episode.steps + reply.steps_done, episode.call + 1
        return self._scene(episode, reply) | {"executed": rounded(actions[: reply.steps_done])}

    def _reply(self) -> SimReply:
        """The simulator's answer."""
        ((_, reply),) = self.pool.wait()
        if reply.observation is None:
            raise SimulationError(f"the simulator failed ({reply.error}); begin the episode again")
        return reply

    def _scene(self, episode: Episode, reply: SimReply) -> dict[str, Any]:
        """What a person sees of the simulator."""
        assert reply.observation is not None
        episode.seen.append(replace(reply.observation, instruction=episode.task.instruction))
        episode.success, views = reply.success, self.policy.data.views
        return {
            "is": "scene",
            "instruction": episode.task.instruction,
            "steps": episode.steps,
            "of": episode.task.max_steps,
            "success": episode.success,
            "over": episode.over,
            "frames": film(np.stack([[frame[view] for frame in reply.frames] for view in views])),
            "executed": [],
        }

    @torch.inference_mode()
    def _imagine(self, episode: Episode, ask: Ask) -> tuple[Any, Plan, dict[str, Any]]:
        """The model's handle of what is seen, the plan for it, and the plan as the page shows it."""
        policy, settings = self.policy, planner_settings(self.policy.planner, ask)
        name = f"{full_name(policy.data.suite, episode.task.name)}/{episode.index}"  # as in an evaluation (EpisodeSpec)
        noise = SeededNoise([RowKey(self.seed, name, episode.call)], policy.model.device)
        context = policy.context([list(episode.seen)])
        with on_threads(policy.model) as model:
            planner = Planner(model, settings, policy.returns, policy.levels)
            plan = planner.plan(context, noise, variant=ask.variant, warm=episode.warm, with_value=policy.has_values)
        episode.plan, episode.actions = plan, policy.actions(plan.actions.float().cpu().numpy())[0]
        told: dict[str, Any] = {
            "is": "plan",
            "actions": rounded(episode.actions),
            "returns": None if plan.values is None else rounded(policy.returns(plan.values)[0]),
            "frames": self._decoded(context, plan.z_video),
            "candidates": [],
            "chosen": None,
        }
        drawn = bool(torch.equal(plan.z_video, noise("act.video", policy.model.shapes.video)))
        if not plan.history:
            return context, plan, told | {"how": "one draw of the noise, without a search"}
        last = plan.history[-1]
        same = (last.z_video[0] == plan.z_video).flatten(1).all(1).tolist()
        elites = last.video_elites[0].tolist()
        told["candidates"] = [
            {"returns": rounded(returns), "best": int(scores.argmax()), "score": round(float(score), 4), "rank": rank}
            for returns, scores, score, rank in zip(
                policy.returns(last.values)[0],
                last.scores[0],
                phi(last.scores, settings)[0],
                [elites.index(m) + 1 if m in elites else None for m in range(len(same))],
                strict=True,
            )
        ]
        told["chosen"] = same.index(True) if any(same) else None
        if told["chosen"] is not None:
            how = f"candidate {told['chosen'] + 1}, the best of {len(same)}"
        elif drawn:
            how = f"one draw of the noise: the candidates' scores differ by less than planner.gate = {settings.gate:g}"
        elif ask.variant == "temperature":
            how = "a draw with the spread that the search ended with, but not its mean (the control)"
        else:
            how = f"a new draw from the Gaussian fitted to the {len(elites)} elites"
        return context, plan, told | {"how": how}

    @torch.inference_mode()
    def _decoded(self, context: Any, noise: torch.Tensor) -> str:
        """The film of one future noise (1, V, C, Ff, h, w)."""
        latents = self.policy.model.denoise_video(context, noise, self.policy.planner.denoise_steps)
        return film(self.policy.decode_future(latents[0].float().cpu().numpy()))


def planner_settings(planner: PlannerSettings, ask: Ask) -> PlannerSettings:
    """The policy's own with the page's K and M, and no more elites than there are samples."""
    elites = {
        "video_elites": min(planner.video_elites, ask.M),
        "value_elites": min(planner.value_elites, ask.M * planner.value_samples),
    }
    return planner.model_copy(update={"iterations": ask.K, "video_samples": ask.M, **elites})


def rounded(numbers: Any) -> Any:
    """An array or tensor as lists of numbers that are short to send."""
    return np.asarray(numbers, dtype=np.float64).round(4).tolist()


def film(frames: NDArray[np.uint8]) -> str:
    """Frames (V, F, H, W, 3) as the address of one JPEG: frame after frame, in each the views side by side."""
    views, count, height, width, _ = frames.shape
    strip = frames.transpose(2, 1, 0, 3, 4).reshape(height, count * views * width, 3)
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, format="JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
