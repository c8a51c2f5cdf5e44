"""A model server for vla-eval 0.8: asks a policy that ``wav serve`` serves, in one session for each shard.

    python -m wav_client.vla_eval --address 127.0.0.1:8001 --args.port 8000

Several shards of an evaluation share the policy, which plans their requests in batches. Each observation gets exactly
one answer: an episode's refusals come with its observations, because vla-eval takes an answer to anything else for the
next observation's.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
from anyio.to_thread import run_sync
from vla_eval.model_servers.base import ModelServer, SessionContext
from vla_eval.model_servers.serve import run_server
from vla_eval.specs import (
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    RAW,
    ROTATION_AA,
    STATE_EEF_POS_AA_GRIP,
    DimSpec,
)

from wav_client import Client


class WavModelServer(ModelServer):
    """Executes chunks of the policy; a plan is asked for where a chunk is used up, and only there are frames sent.

    Args:
        host: where the policy is served.
        port: its port.
        api_key_env: variable that holds its key, if it asks for one.
        execute_steps: actions executed of a chunk; None: as the policy's server advises.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key_env: str = "WAV_API_KEY",
        execute_steps: int | None = None,
    ) -> None:
        self._connect = partial(Client, host, port, os.environ.get(api_key_env))
        self._execute_steps = execute_steps
        self._clients: dict[str, Client] = {}
        self._chunks: dict[str, list[Any]] = {}
        with self._connect() as client:
            self._metadata = client.metadata

    def get_observation_params(self) -> dict[str, Any]:
        """What the benchmark must send: the wrist's camera where the policy sees it, and the state."""
        return {"send_wrist_image": len(self._metadata["views"]) > 1, "send_state": True}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Deltas of position and rotation, and the gripper; another robot's actions as they are."""
        if self._metadata["action"] != "osc_pose_delta":
            return {"actions": RAW}
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Every view of the policy, its state and the instruction."""
        state = STATE_EEF_POS_AA_GRIP if self._metadata["state_dim"] == STATE_EEF_POS_AA_GRIP.dims else RAW
        return {**dict.fromkeys(self._metadata["views"], IMAGE_RGB), "state": state, "language": LANGUAGE}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """The chunk of the episode before, which may have failed without an end, is not played on."""
        self._chunks.pop(ctx.session_id, None)
        if ctx.session_id in self._clients:
            self._clients[ctx.session_id].reset()

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Send one action, from a new plan where the chunk is used up."""
        chunk = self._chunks.get(ctx.session_id)
        if not chunk:
            chunk = self._chunks[ctx.session_id] = await run_sync(self._plan, obs, ctx)
        await ctx.send_action({"actions": chunk.pop(0)})

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Also called where the harness has gone away, which is why the connection ends here."""
        self._chunks.pop(ctx.session_id, None)
        client = self._clients.pop(ctx.session_id, None)
        if client is not None:
            await run_sync(client.close)

    def _plan(self, obs: dict[str, Any], ctx: SessionContext) -> list[Any]:
        """The actions to execute of a new plan."""
        state = obs.get("states", obs.get("state"))
        message: dict[str, Any] = {f"observation/{view}": image for view, image in obs.get("images", {}).items()}
        message["prompt"] = obs.get("task_description")
        if state is not None:
            message["observation/state"] = np.asarray(state)
        client = self._clients.get(ctx.session_id)
        if client is None:
            client = self._clients[ctx.session_id] = self._connect()
        try:
            plan = client.act(message)
        except (ConnectionError, TimeoutError):
            self._clients.pop(ctx.session_id).close()  # the next episode connects anew
            raise
        return list(plan["actions"][: self._execute_steps or plan["execute_steps"]])


if __name__ == "__main__":
    run_server(WavModelServer)
