"""Runs in an environment with openpi-client alone: its own runtime, broker and client, on the simulator of the test.

python openpi_robot.py PORT_OF_THE_POLICY PORT_OF_THE_SIMULATOR HORIZON STEPS SUITE
"""

import sys
from multiprocessing.connection import Client

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy, simulator, horizon, steps = (int(number) for number in sys.argv[1:5])


class Simulator(Environment):
    def __init__(self):
        self.link = Client(("127.0.0.1", simulator), authkey=b"test")

    def ask(self, *request):
        self.link.send(request)
        return self.link.recv()

    def reset(self):
        self.ask("reset")

    def is_episode_complete(self):
        return False

    def get_observation(self):
        images, state, instruction = self.ask("observe")
        shown = {
            f"observation/{name}": np.frombuffer(data, np.uint8).reshape(shape)
            for name, (data, shape) in zip(("image", "wrist_image"), images.values(), strict=True)
        }
        return {**shown, "observation/state": np.frombuffer(state, np.float32), "prompt": instruction}

    def apply_action(self, action):
        assert isinstance(action["scores"], (list, tuple)), action
        self.ask("step", np.asarray(action["actions"], np.float32).tobytes())


client = WebsocketClientPolicy("127.0.0.1", policy)
assert client.get_server_metadata()["suite"] == sys.argv[5]
agent = PolicyAgent(ActionChunkBroker(client, horizon))
Runtime(Simulator(), agent, [], num_episodes=1, max_episode_steps=steps - 1).run()
refused = ""
try:
    client.infer({"prompt": "lift the red cube"})
except RuntimeError as error:
    refused = str(error)
assert "observation/image: missing" in refused, refused
