"""A benchmark for vla-eval: the simulator of the test. ``WAV_TEST_SIMULATOR`` is its port."""

import os
from multiprocessing.connection import Client

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import (
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    STATE_EEF_POS_AA_GRIP,
)


class Simulator(StepBenchmark):
    def __init__(self, seed=0, send_wrist_image=False, send_state=False):
        super().__init__()
        assert send_wrist_image, "the model server asks for the wrist's camera"
        assert send_state, "the model server asks for the state"
        self.link = Client(("127.0.0.1", int(os.environ["WAV_TEST_SIMULATOR"])), authkey=b"test")

    def ask(self, *request):
        self.link.send(request)
        return self.link.recv()

    def get_tasks(self):
        return [{"name": "the test's", "suite": "the test's"}]

    def reset(self, task):
        self.ask("reset")
        return self.ask("observe")

    def step(self, action):
        self.ask("step", np.asarray(action["actions"], np.float32).tobytes())
        return StepResult(self.ask("observe"), 0.0, False, {})

    def make_obs(self, raw_obs, task):
        images, state, instruction = raw_obs
        return {
            "images": {view: np.frombuffer(data, np.uint8).reshape(shape) for view, (data, shape) in images.items()},
            "states": np.frombuffer(state, np.float32).astype(np.float64),
            "task_description": instruction,
        }

    def get_step_result(self, step_result):
        return {"success": True}

    def get_action_spec(self):
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self):
        views = {"agentview": IMAGE_RGB, "wrist": IMAGE_RGB}
        return {**views, "state": STATE_EEF_POS_AA_GRIP, "language": LANGUAGE}

    def get_metadata(self):
        return {"max_steps": 300}
