#!/usr/bin/env bash
# gymnasium 1.4.0: in a vector environment the type of the first environment's number is forced on the others' numbers.
#
# Guess: info["progress"] of a vector environment holds what each environment gave, in one array that fits them all.
# Seen: the array has the type of the first environment's value, and the others are cast to it without a word. Progress
#   max(0, 1 - distance) is the whole number 0 for an arm that is far away: where that is arm 0, the 0.9 and 0.6 of the
#   others become 0; where it is arm 1, nothing is lost. A grade "near and 0.3" is False or 0.3: behind the False of arm
#   0 every 0.3 becomes True, a mean of 0.67 instead of 0.2. Alike in SyncVectorEnv, AsyncVectorEnv and DictInfoToList;
#   rewards are right, and so are values that every environment gives as a float.
# Met by: scores of policies that are evaluated in parallel; they change with the order of the environments.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gymnasium==1.4.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList


class Arm(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, distance):
        self.distance = distance

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        progress = max(0, 1 - self.distance)
        info = {"progress": progress, "grade": progress > 0 and 0.3, "float": float(progress)}
        return np.zeros(1, np.float32), progress, False, False, info


def step(kind, distances):
    arms = kind([lambda distance=distance: Arm(distance) for distance in distances])
    arms.reset(seed=0)
    _, rewards, _, _, info = arms.step(np.zeros((len(distances), 1), np.float32))
    arms.close()
    return rewards, info


def listed(arms):
    return DictInfoToList(SyncVectorEnv(arms))


if __name__ == "__main__":
    for kind in (SyncVectorEnv, AsyncVectorEnv):
        for distances in ((1.5, 0.1, 0.4), (0.1, 1.5, 0.4)):
            rewards, info = step(kind, distances)
            progress, grades = info["progress"].tolist(), info["grade"].tolist()
            print(f"{kind.__name__}, distances {distances}: rewards {rewards}, progress {progress}, grades {grades}")
            if distances[0] == 1.5:
                assert progress == [0, 0, 0] and grades == [False, True, True]
            else:
                assert progress == [0.9, 0.0, 0.6] and grades == [0.3, 0.0, 0.3]
            assert rewards.tolist() == info["float"].tolist() == [max(0, 1 - distance) for distance in distances]
    assert [info["progress"] for info in step(listed, (1.5, 0.1, 0.4))[1]] == [0, 0, 0]
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
