"""Runs beside LeRobot: what its scripts do with a policy, on observations that the test left, with its own factories.

python lerobot_robot.py FOLDER WORK: reads WORK/seen.npz, writes WORK/done.npz and WORK/told.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins

folder, work = Path(sys.argv[1]), Path(sys.argv[2])
register_third_party_plugins()
config = PreTrainedConfig.from_pretrained(folder)
config.pretrained_path = folder
config.device = "cpu"
policy_class = get_policy_class(config.type)
policy = policy_class.from_pretrained(config=config, pretrained_name_or_path=folder, revision=None, dataset_stats=None)
policy.to(config.device)
device = {"device_processor": {"device": "cpu"}}
before, after = make_pre_post_processors(config, str(folder), preprocessor_overrides=device)
fresh_before, fresh_after = make_pre_post_processors(config)
fresh_before.save_pretrained(work / "fresh")
fresh_after.save_pretrained(work / "fresh")

seen = np.load(work / "seen.npz")
tasks = json.loads((work / "tasks.json").read_text())
done = []
for _ in range(2):
    policy.reset()
    for step in range(len(seen["state"])):
        observation = {
            feature: torch.from_numpy(seen[view][step]).permute(0, 3, 1, 2).float() / 255
            for feature, view in config.views.items()
        }
        observation |= {"observation.state": torch.from_numpy(seen["state"][step]), "task": tasks}
        with torch.inference_mode():
            action = policy.select_action(before(observation))
        done.append(after(action).numpy())
np.savez(work / "done.npz", actions=np.stack(done), normalised=before(observation)["observation.state"].numpy())
told = {
    "type": config.type,
    "n_action_steps": config.n_action_steps,
    "images": sorted(config.image_features),
    "parameters": sum(p.numel() for p in policy.parameters()),
    "chunk": list(policy.predict_action_chunk(before(observation)).shape),
    "policy": f"{policy_class.__module__}.{policy_class.__name__}",
}
(work / "told.json").write_text(json.dumps(told))
