"""What plans, trains and measures runs with torch, diffusers, safetensors and numpy alone: a bare GPU machine's set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = (
    "pydantic", "pydantic_settings", "deepspeed", "prefect", "dvc", "dvclive", "transformers", "boto3", "psutil",
    "robosuite", "mujoco", "scipy", "h5py", "pyarrow", "av", "matplotlib",
)  # fmt: skip
PREPARE = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # an import of it fails
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
"""
TINY = """
import torch
from sizes import SIZES, Train
from train import Run
from training_data import Encoders, windows
from wav.model import build_model
from wav.inference.backends import noise_shapes, planner_model
from wav.planning.planner import Planner
from wav.planning.types import RowKey, SeededNoise

sizes = SIZES["tiny"]
model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels)
planner = planner_model(model.eval(), noise_shapes(model, sizes.views, sizes.grid, sizes.future, sizes.chunk))
memory = torch.zeros(1, sizes.views, sizes.latent, sizes.memory, *sizes.grid)
context = planner.begin(memory, torch.zeros(1, sizes.text_tokens, sizes.caption), None, None)
noise = SeededNoise([RowKey(0, "light", 0)])
made = Planner(planner, sizes.planner, lambda values: values[..., -1]).plan(context, noise)
assert made.actions.shape == (1, sizes.chunk, sizes.action_channels)
encoders = Encoders(sizes, torch.device("cpu"))
for stage in ("pretrain_video", "train_value", "train_joint"):
    run = Run(model, Train(stage, sizes.batch), sizes, encoders, ())
    assert run.step(*windows(sizes, encoders, sizes.batch, 0), 0) > 0
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.integration
def test_a_plan_and_a_training_step_of_every_stage() -> None:
    run(TINY)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["train", "projection", "growth_training", "gpu", "latency"])
def test_benchmarks_start(name: str) -> None:
    run(
        f"import runpy\nsys.argv = ['{name}.py', '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / 'benchmarks' / name) + '.py'!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\nelse:\n    raise AssertionError('no help')\n"
    )


def test_the_sizes_are_those_of_the_parameter_files() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from latency import COUPLED
    from projection import accounted
    from sizes import SIZES

    from wav.accounting import Sizes
    from wav.config import load_settings
    from wav.planning.types import Levels

    assert Levels.of(load_settings(ROOT / "params.yaml").coupling) == COUPLED
    for name, file in (("default", "params.yaml"), ("full", "presets/libero.yaml")):
        settings, sizes = load_settings(ROOT / file), SIZES[name]
        assert accounted(sizes) == Sizes.of(settings)
        for field in vars(sizes.planner) if name == "default" else ():
            assert getattr(sizes.planner, field) == getattr(settings.planner, field), f"{name}: planner.{field}"
        assert sizes.batch == settings.pretrain_video.batch_size
        assert sizes.model.max_views == settings.model.max_views
        assert sizes.model.rope_scale == pytest.approx(settings.model.rope_scale)


def test_the_realtime_planner_measured_on_a_gpu_is_the_presets() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_planning import COUPLED, REALTIME

    from wav.config import load_settings
    from wav.planning.types import Levels

    default, realtime = (load_settings(ROOT / file) for file in ("params.yaml", "presets/realtime.yaml"))
    assert realtime.planner == default.planner.model_copy(update=REALTIME)
    assert realtime.planner != default.planner
    assert Levels.of(default.coupling) == Levels.of(realtime.coupling) == COUPLED
