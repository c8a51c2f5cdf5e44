"""Small datasets in the formats' own libraries: h5py, pyarrow and PyAV."""

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from wav.config import IngestSettings

TASKS = ("pick_up_the_bowl", "open_the_drawer")


def motion(seed: int, steps: int) -> dict[str, np.ndarray]:
    """Numbers of a demonstration whose fingers follow the gripper (-1 open, +1 close); row t is BEFORE action t.

    One row more than actions: the state after the last.
    """
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-0.9, 0.9, (steps, 7))
    actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)
    fingers = [0.04]
    for command in actions[:, 6]:
        fingers.append(float(np.clip(fingers[-1] - 0.01 * command, 0.0, 0.04)))
    opening = np.array(fingers)
    return {
        "actions": actions,
        "pose": np.cumsum(rng.normal(scale=0.01, size=(steps + 1, 6)), axis=0),
        "fingers": np.stack([opening, -opening], axis=1),
        "joints": np.cumsum(rng.normal(scale=0.05, size=(steps + 1, 7)), axis=0),
        "images": rng.integers(0, 256, (steps + 1, 2, 32, 32, 3), np.uint8),
    }


def libero_file(
    path: Path, demos: int = 3, steps: int = 12, after: bool = True, attributes: dict | None = None
) -> Path:
    """As LIBERO's create_dataset.py writes it (``after``: observation t is the one after action t)."""
    task = path.stem.removesuffix("_demo")
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["problem_info"] = json.dumps({"language_instruction": task.replace("_", " ")})
        group.attrs["macros_image_convention"] = "opengl"
        group.attrs["bddl_file_name"] = f"bddl_files/libero_object/{task}.bddl"
        group.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        for name, value in (attributes or {}).items():
            if value is None:
                del group.attrs[name]
            else:
                group.attrs[name] = value
        for number in range(demos):
            m = motion(number, steps)
            rows = slice(1, None) if after else slice(None, -1)
            demo = group.create_group(f"demo_{number}")
            demo["actions"] = m["actions"]
            demo["states"] = np.concatenate([np.zeros((steps, 1)), m["joints"][:-1], np.ones((steps, 5))], axis=1)
            demo["dones"] = np.eye(steps, dtype=np.uint8)[-1]
            obs = demo.create_group("obs")
            obs["agentview_rgb"], obs["eye_in_hand_rgb"] = m["images"][rows, 0], m["images"][rows, 1]
            obs["ee_states"], obs["gripper_states"] = m["pose"][rows], m["fingers"][rows]
            obs["ee_pos"], obs["ee_ori"] = m["pose"][rows, :3], m["pose"][rows, 3:]
            obs["joint_states"] = m["joints"][rows]
    return path


def write_video(path: Path, clips: list[np.ndarray], fps: int) -> None:
    """Clips (T, H, W, 3) one after the other in a lossless mp4 with a key frame every other frame, as lerobot's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"qp": "0", "g": "2", "preset": "ultrafast"})
        stream.height, stream.width = clips[0].shape[1:3]
        stream.pix_fmt, stream.time_base = "rgb24", Fraction(1, fps)
        for picture in np.concatenate(clips):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_depth_video(path: Path, codes: np.ndarray, fps: int) -> None:
    """Codes (T, H, W) of 12 bits in a lossless HEVC, as LeRobot 0.6.1 writes a depth camera's.

    Every frame is a key frame, LeRobot's every other: x265 loses single pixels of the frames between where they are
    noise.
    """
    with av.open(str(path), "w") as container:
        options = {"g": "1", "x265-params": "lossless=1:log-level=none"}
        stream = container.add_stream("hevc", rate=fps, options=options)
        stream.height, stream.width = codes.shape[1:]
        stream.pix_fmt, stream.time_base = "gray12le", Fraction(1, fps)
        for frame in codes.astype(np.uint16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray12le")))
        container.mux(stream.encode())


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def columns(episode: dict, start: int, fps: float, task: int) -> dict[str, list]:
    """Numeric columns of one episode."""
    steps = len(episode["action"])
    return {
        "observation.state": [row.astype(np.float32).tolist() for row in episode["state"]],
        "action": [row.astype(np.float32).tolist() for row in episode["action"]],
        "timestamp": [step / fps for step in range(steps)],
        "frame_index": list(range(steps)),
        "episode_index": [episode["index"]] * steps,
        "index": list(range(start, start + steps)),
        "task_index": [task] * steps,
    }


def lerobot_dataset(
    root: Path, episodes: list[dict], version: str, fps: int = 20, images: bool = False, names: dict | None = None
) -> Path:
    """A LeRobot dataset; an episode has action, state, images (key -> (T, H, W, 3)) and task."""
    tasks = list(dict.fromkeys(e["task"] for e in episodes))
    keys = list(episodes[0]["images"])
    kind, three = "image" if images else "video", version == "v3.0"
    features = {
        "observation.state": {"dtype": "float32", "shape": [episodes[0]["state"].shape[1]], "names": names},
        "action": {"dtype": "float32", "shape": [episodes[0]["action"].shape[1]], "names": names},
    }
    for key in keys:
        shape = list(episodes[0]["images"][key].shape[1:])
        features[key] = {"dtype": kind, "shape": shape, "names": ["height", "width", "channel"]}
    info = {"codebase_version": version, "fps": fps, "robot_type": "panda", "features": features, "chunks_size": 1000}
    if three:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    else:
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    tables, starts, total = [], [], 0
    for number, episode in enumerate(episodes):
        episode["index"] = number
        starts.append(total)
        table = columns(episode, total, fps, tasks.index(episode["task"]))
        if images:
            for key in keys:
                table[key] = [{"bytes": png(p), "path": f"{i}.png"} for i, p in enumerate(episode["images"][key])]
        tables.append(pa.table(table))
        total += len(episode["action"])
    if three:
        _write_v3(root, episodes, tasks, keys, tables, starts, fps, images)
    else:
        _write_v2(root, episodes, tasks, keys, tables, fps, images)
    return root


def _write_v2(root, episodes, tasks, keys, tables, fps, images):
    rows = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
    (root / "meta" / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"episode_index": e["index"], "tasks": [e["task"]], "length": len(e["action"])} for e in episodes]
    (root / "meta" / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "data" / "chunk-000").mkdir(parents=True)
    for episode, table in zip(episodes, tables, strict=True):
        name = f"episode_{episode['index']:06d}"
        pq.write_table(table, root / "data" / "chunk-000" / f"{name}.parquet")
        for key in [] if images else keys:
            write_video(root / "videos" / "chunk-000" / key / f"{name}.mp4", [episode["images"][key]], fps)


def _write_v3(root, episodes, tasks, keys, tables, starts, fps, images):
    names = pa.table({"task_index": list(range(len(tasks))), "__index_level_0__": tasks})
    pq.write_table(names, root / "meta" / "tasks.parquet")
    rows = []
    for episode, start in zip(episodes, starts, strict=True):
        length = len(episode["action"])
        row = {"episode_index": episode["index"], "length": length, "tasks": [episode["task"]]}
        row |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": start}
        for key in [] if images else keys:
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
            row |= {f"videos/{key}/from_timestamp": start / fps, f"videos/{key}/to_timestamp": (start + length) / fps}
        rows.append(row)
    for folder in (root / "meta" / "episodes" / "chunk-000", root / "data" / "chunk-000"):
        folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    with pq.ParquetWriter(root / "data" / "chunk-000" / "file-000.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    for key in [] if images else keys:
        clips = [episode["images"][key] for episode in episodes]
        write_video(root / "videos" / key / "chunk-000" / "file-000.mp4", clips, fps)


def libero_episodes(count: int = 3, steps: int = 12) -> list[dict]:
    """Episodes as in lerobot/libero: images rotated already, 8-D state, 7-D actions."""
    result = []
    for number in range(count):
        m = motion(number, steps)
        state = np.concatenate([m["pose"], m["fingers"]], axis=1)[:-1]
        images = {"observation.images.image": m["images"][:-1, 0], "observation.images.image2": m["images"][:-1, 1]}
        result.append(
            {"action": m["actions"], "state": state, "images": images, "task": TASKS[number % 2].replace("_", " ")}
        )
    return result


def changed(settings: IngestSettings, **changes: Any) -> IngestSettings:
    """Settings with some fields changed, of their own or of the options of their reader."""
    own = {name: value for name, value in changes.items() if name in IngestSettings.model_fields}
    options = getattr(settings, settings.source)
    of_reader = options.model_copy(update={name: v for name, v in changes.items() if name not in own})
    return settings.model_copy(update={**own, settings.source: of_reader})
