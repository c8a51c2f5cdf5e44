"""A generated bimanual dataset in LeRobot's v3.0 layout: two arms, 14-D joint states and targets, three cameras.

    python benchmarks/bimanual_data.py workspaces/piper-small/datasets/bimanual

One arm takes a cube and hands it to the other: six joints and a gripper per arm, left before right, as in the layout of
the ALOHA and Piper datasets (``cam_high``, ``cam_left_wrist``, ``cam_right_wrist``; 30 Hz; the cameras' sizes differ).
The arms are drawn, not simulated: this is for trying the pipeline on bimanual data, and for nothing else. Written with
the formats' own libraries, pyarrow and PyAV.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

FPS = 30
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
NAMES = [f"{side}_{joint}" for side in ("left", "right") for joint in JOINTS]
SIZES = {"cam_high": (240, 424), "cam_left_wrist": (240, 320), "cam_right_wrist": (240, 320)}
TASKS = ("hand the cube to the right arm", "hand the cube to the left arm")
_LINKS = (70.0, 60.0, 40.0)  # pixels of the top view
_BASES = ((140.0, 225.0), (284.0, 225.0))
_FEATURES = {
    **{
        name: {"dtype": "float32", "shape": [14], "names": {"motors": NAMES}}
        for name in ("observation.state", "action")
    },
    **{name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index", "index")},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


def _smooth(points: list[NDArray[np.float64]], steps: int) -> NDArray[np.float64]:
    """(steps, D) minimum-jerk motion through (D,) points, equally long between any two."""
    at = np.linspace(0, len(points) - 1, steps)
    start = np.minimum(at.astype(int), len(points) - 2)
    x = (at - start)[:, None]
    share = 10 * x**3 - 15 * x**4 + 6 * x**5
    stacked = np.stack(points)
    return stacked[start] * (1 - share) + stacked[start + 1] * share


def joint_path(task: int, steps: int, random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """States (steps, 14), rad and gripper opening in [0, 1], and (steps, 2): which arm holds the cube."""
    rest = np.array([0.0, 0.9, 0.5, 0.0, 0.3, 0.0, 1.0])
    reach = np.array([0.3, 0.5, 0.2, 0.1, 0.6, 0.2, 1.0])
    meet = np.array([0.6, 0.2, 0.1, 0.0, 0.2, 0.0, 1.0])
    spread = random.normal(scale=0.05, size=(4, 7)) * (np.arange(7) < 6)
    shut = np.array([1.0] * 6 + [0.1])
    giver = _smooth([rest + spread[0], reach + spread[1], (reach + spread[1]) * shut, meet * shut, meet, rest], steps)
    taker = _smooth([rest + spread[2], rest, rest, meet + spread[3], (meet + spread[3]) * shut, rest * shut], steps)
    phase = np.linspace(0, 5, steps)
    held = np.stack([(phase >= 1.9) & (phase < 3.9), phase >= 3.9], axis=1)
    arms = (giver, taker) if task == 0 else (taker, giver)
    return np.concatenate(arms, axis=1), held if task == 0 else held[:, ::-1]


def _elbows(arm: NDArray[np.float64], side: int) -> list[tuple[float, float]]:
    """Base, elbow, wrist and gripper of an arm (7,) in the top view; the right arm is the left one mirrored."""
    x, y = _BASES[side]
    sign = 1.0 if side == 0 else -1.0
    angle, points = -np.pi / 2 + arm[0], [(x, y)]
    for length, joint in zip(_LINKS, (0.0, arm[1] - 0.6, arm[2]), strict=True):
        angle += joint
        x, y = x + sign * length * float(np.cos(angle)), y + length * float(np.sin(angle))
        points.append((x, y))
    return points


def _top(state: NDArray[np.float64], cube: tuple[float, float]) -> NDArray[np.uint8]:
    """The third-person view (240, 424, 3): table, cube, both arms."""
    height, width = SIZES["cam_high"]
    picture = Image.new("RGB", (width, height), (168, 146, 118))
    draw = ImageDraw.Draw(picture)
    draw.rectangle([cube[0] - 8, cube[1] - 8, cube[0] + 8, cube[1] + 8], fill=(200, 30, 30))
    for side, colour in enumerate(((60, 60, 70), (90, 90, 110))):
        points = _elbows(state[7 * side : 7 * side + 7], side)
        draw.line(points, fill=colour, width=12, joint="curve")
        gap, (x, y) = 4 + 8 * float(state[7 * side + 6]), points[-1]
        draw.line([(x - gap, y - 12), (x - gap, y)], fill=(20, 20, 20), width=4)
        draw.line([(x + gap, y - 12), (x + gap, y)], fill=(20, 20, 20), width=4)
    return np.asarray(picture)


def _wrist(state: NDArray[np.float64], side: int, cube: tuple[float, float]) -> NDArray[np.uint8]:
    """What a wrist camera sees (240, 320, 3): the cube relative to the gripper, and the two fingers."""
    height, width = SIZES["cam_left_wrist"]
    arm = state[7 * side : 7 * side + 7]
    x, y = _elbows(arm, side)[-1]
    turn, offset = float(arm[5] + arm[3]), np.array([cube[0] - x, cube[1] - y]) * 2
    rotated = [offset[0] * np.cos(turn) - offset[1] * np.sin(turn), offset[0] * np.sin(turn) + offset[1] * np.cos(turn)]
    at, size = (width / 2 + rotated[0], height * 0.7 + rotated[1]), 26
    picture = Image.new("RGB", (width, height), (150, 130, 104))
    draw = ImageDraw.Draw(picture)
    draw.rectangle([at[0] - size, at[1] - size, at[0] + size, at[1] + size], fill=(200, 30, 30))
    gap = 20 + 50 * float(arm[6])
    for sign in (-1, 1):
        finger = sorted((width / 2 + sign * gap, width / 2 + sign * (gap + 18)))
        draw.rectangle([finger[0], height * 0.6, finger[1], height], fill=(30, 30, 30))
    return np.asarray(picture)


def episode(task: int, steps: int, random: np.random.Generator) -> dict[str, Any]:
    """States and targets (steps, 14) float32 and frames camera -> (steps, H, W, 3); the target is the next state."""
    states, held = joint_path(task, steps, random)
    cube, cubes = _elbows(states[int(steps * 0.2), 7 * task : 7 * task + 7], task)[-1], []
    for state, holding in zip(states, held, strict=True):
        for side in np.flatnonzero(holding):
            cube = _elbows(state[7 * side : 7 * side + 7], int(side))[-1]
        cubes.append(cube)
    frames = {
        "cam_high": np.stack([_top(s, c) for s, c in zip(states, cubes, strict=True)]),
        "cam_left_wrist": np.stack([_wrist(s, 0, c) for s, c in zip(states, cubes, strict=True)]),
        "cam_right_wrist": np.stack([_wrist(s, 1, c) for s, c in zip(states, cubes, strict=True)]),
    }
    targets = np.concatenate([states[1:], states[-1:]])
    return {"task": task, "state": states.astype(np.float32), "action": targets.astype(np.float32), "frames": frames}


def _write_video(path: Path, clips: list[NDArray[np.uint8]]) -> None:
    """One H.264 mp4 of the clips after each other, a key frame every other frame as LeRobot writes it."""
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "g": "2", "preset": "veryfast"})
        stream.height, stream.width = clips[0].shape[1:3]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, FPS)
        for clip in clips:
            for picture in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_dataset(root: Path, episodes: int = 8, steps: int = 60, seed: int = 0) -> Path:
    """Write the dataset into the new folder ``root``; tasks alternate. The same seed gives the same numbers."""
    random = np.random.default_rng(seed)
    made = [episode(number % len(TASKS), steps, random) for number in range(episodes)]
    cameras = {f"observation.images.{name}": size for name, size in SIZES.items()}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "bimanual",
        "fps": FPS,
        "total_episodes": episodes,
        "total_frames": episodes * steps,
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "splits": {"train": f"0:{episodes}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": _FEATURES
        | {
            k: {"dtype": "video", "shape": [*s, 3], "names": ["height", "width", "channels"]}
            for k, s in cameras.items()
        },
    }
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info, indent=1) + "\n")
    pq.write_table(pa.table({"task_index": [0, 1], "task": list(TASKS)}), root / "meta" / "tasks.parquet")
    rows, tables = [], []
    for number, one in enumerate(made):
        first = number * steps
        columns = {
            name: [row.tolist() for row in one[key]]
            for name, key in (("observation.state", "state"), ("action", "action"))
        }
        columns |= {"timestamp": [t / FPS for t in range(steps)], "frame_index": list(range(steps))}
        columns |= {"episode_index": [number] * steps, "index": list(range(first, first + steps))}
        tables.append(pa.table({**columns, "task_index": [one["task"]] * steps}))
        row = {"episode_index": number, "length": steps, "tasks": [TASKS[one["task"]]]}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        for key in cameras:
            times = {"from_timestamp": first / FPS, "to_timestamp": (first + steps) / FPS}
            row |= {
                f"videos/{key}/{name}": value for name, value in {"chunk_index": 0, "file_index": 0, **times}.items()
            }
        rows.append(row)
    pq.write_table(pa.concat_tables(tables), root / "data" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.Table.from_pylist(rows), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    for name in SIZES:
        path = root / "videos" / f"observation.images.{name}" / "chunk-000" / "file-000.mp4"
        _write_video(path, [one["frames"][name] for one in made])
    return root


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="generate a bimanual LeRobot dataset")
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="frames per episode")
    chosen = parser.parse_args()
    root = write_dataset(chosen.folder, chosen.episodes, chosen.steps)
    print(f"{root}: {chosen.episodes} episodes of {chosen.steps} frames, {len(SIZES)} cameras")


if __name__ == "__main__":
    main()
