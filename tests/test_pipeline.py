"""dvc.yaml against the settings and the code; parameter files complete; all eight stages run on presets/smoke.yaml."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra.local import ports
from infra.local.workspace import make_workspace
from wav.config import STAGE_SECTIONS, Settings, load_settings

PROJECT = Path(__file__).resolve().parents[1]
STAGES = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
#: code that cannot change a stage's result: settings (their values are params), services, artefacts, pictures
PLUMBING = (
    "flows/__init__.py",
    "flows/common.py",
    "flows/artifacts.py",
    "wav/__init__.py",
    "wav/data/__init__.py",
    "wav/io/__init__.py",
    "wav/config.py",
    "wav/errors.py",
    "wav/local.py",
    "wav/plots.py",
    "wav/io/storage/",
)
#: imports that a stage does not reach: only for_simulator() needs the simulator, called where wav.sim is imported too;
#: replay looks for the dataset's files under `wav replay` alone, never in an evaluation
NOT_FOLLOWED = {("wav/data/conventions.py", "wav/sim/"), ("wav/evaluation/extras/replay.py", "wav/data/sources/")}
#: modules that run in processes of their own, which no import names
PROCESSES = {
    "ingest": ("wav.sim.worker",),
    "pretrain_video": ("wav.training.loop",),
    "train_value": ("wav.training.loop",),
    "train_joint": ("wav.training.loop",),
    "eval_libero": ("wav.sim.worker",),
}


def module_file(name: str) -> Path | None:
    """File of a module of this project, or None."""
    base = PROJECT.joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported(path: Path) -> set[Path]:
    """Project files that a file imports at any depth of its code, those under ``if TYPE_CHECKING`` left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parents = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    return {found for name in parents if name.split(".")[0] in ("wav", "flows") and (found := module_file(name))}


def _not_followed(source: str, target: str) -> bool:
    return any(source == ours and target.startswith(theirs) for ours, theirs in NOT_FOLLOWED)


def closure(stage: str) -> set[str]:
    """Relative paths of all code a stage may run, plumbing left out (and not followed)."""
    roots = [module_file(name) for name in (f"flows.{stage}", *PROCESSES.get(stage, ()))]
    todo, seen = [path for path in roots if path is not None], set()
    assert len(todo) == len(roots), f"{stage}: a root module does not exist"
    while todo:
        path = todo.pop()
        relative = path.relative_to(PROJECT).as_posix()
        if relative in seen or relative.startswith(PLUMBING):
            continue
        seen.add(relative)
        todo += [p for p in imported(path) if not _not_followed(relative, p.relative_to(PROJECT).as_posix())]
    return seen


def code_deps(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in ("wav", "flows")]


def covers(dep: str, path: str) -> bool:
    return path == dep or path.startswith(dep + "/")


def out_paths(stage: str) -> list[str]:
    entries = STAGES[stage].get("outs", []) + STAGES[stage].get("metrics", [])
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def test_stages_and_params_are_the_settings_sections() -> None:
    assert list(STAGES) == list(STAGE_SECTIONS)
    for stage, sections in STAGE_SECTIONS.items():
        assert tuple(STAGES[stage]["params"]) == sections, stage
        assert STAGES[stage]["cmd"] == f"python -m flows.{stage}"


@pytest.mark.parametrize("stage", STAGE_SECTIONS)
def test_code_dependencies_are_what_the_stage_imports(stage: str) -> None:
    used, deps = closure(stage), code_deps(stage)
    missing = sorted(path for path in used if not any(covers(dep, path) for dep in deps))
    assert not missing, f"dvc.yaml: {stage} lacks deps {missing}"
    idle = [dep for dep in deps if not any(covers(dep, path) for path in used)]
    assert not idle, f"dvc.yaml: {stage} lists deps it does not use: {idle}"


@pytest.mark.parametrize("stage", STAGE_SECTIONS)
def test_data_dependencies_are_made_by_earlier_stages(stage: str) -> None:
    order = list(STAGES)
    made = [out for earlier in order[: order.index(stage)] for out in out_paths(earlier)]
    for dep in set(STAGES[stage]["deps"]) - set(code_deps(stage)):
        assert any(covers(out, dep) for out in made), f"{stage}: nothing makes {dep}"


def test_training_outputs_persist_and_metrics_stay_in_git() -> None:
    for stage in ("pretrain_video", "train_value", "train_joint"):
        for entry in STAGES[stage]["outs"]:
            path, options = next(iter(entry.items()))
            assert options.get("persist") or path.startswith("reports/stages/"), path
    for stage in STAGES.values():
        for entry in stage.get("metrics", []):
            path, options = next(iter(entry.items()))
            assert options == {"cache": False} | ({"persist": True} if path.startswith("models/") else {}), path


@pytest.mark.parametrize("name", ["params.yaml", *(f"presets/{p.name}" for p in PROJECT.glob("presets/*.yaml"))])
def test_parameter_files_state_every_value(name: str) -> None:
    raw, whole = yaml.safe_load((PROJECT / name).read_text()), load_settings(PROJECT / name).model_dump()
    for section, values in whole.items():
        assert set(raw.get(section, {})) == set(values), f"{name}: section {section}"
    numbers = {f"{s}.{k}": v for s, values in raw.items() for k, v in values.items()}
    strings = [k for k, v in numbers.items() if isinstance(v, str) and re.fullmatch(r"[\d.]+e-?\d+", v)]
    assert not strings, f"{name}: YAML reads {strings} as text; write 1.0e-5"


def test_a_stage_sees_only_its_sections() -> None:
    view = Settings().for_stage("ingest")
    assert view.ingest == Settings().ingest
    with pytest.raises(ValueError, match="train_joint"):
        _ = view.train_joint


def services(command: str, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-m", "infra.local.services", command], cwd=PROJECT, env=environment, check=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str], str]]:
    """A finished run of the smoke preset: its workspace, its environment, what ``dvc repro`` said."""
    root = tmp_path_factory.mktemp("smoke")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "WAV_"))}
    environment |= ports.find_free() | {"WAV_LOCAL_DIR": str(root / "local"), "PYTHONUNBUFFERED": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    workspace = make_workspace("smoke", root / "workspace", root / "cache")
    services("up", environment)
    try:
        log = root / "repro.log"
        with log.open("w") as output:
            command = [sys.executable, "-m", "dvc", "repro"]
            process = subprocess.Popen(
                command, cwd=workspace, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=600)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        text = log.read_text()
        assert code == 0, text[-6000:]
        yield workspace, environment, text
    finally:
        services("down", environment)


@pytest.mark.smoke
def test_every_stage_ran(smoke: tuple[Path, dict[str, str], str]) -> None:
    _, environment, text = smoke
    ran = re.findall(r"^Running stage '(\w+)'", text, re.MULTILINE)
    assert sorted(ran) == sorted(STAGE_SECTIONS)
    assert "skipping" not in text
    assert "is cached" not in text
    local = Path(environment["WAV_LOCAL_DIR"])
    url = dict(line.split("=", 1) for line in (local / "env").read_text().splitlines())["PREFECT_API_URL"]
    request = urllib.request.Request(
        f"{url}/flow_runs/filter", data=b'{"limit": 50}', headers={"content-type": "application/json"}
    )
    runs = json.load(urllib.request.urlopen(request, timeout=10))
    assert {run["state_name"] for run in runs} == {"Completed"}
    assert len(runs) == len(STAGE_SECTIONS)


@pytest.mark.smoke
def test_results_are_whole_and_declared(smoke: tuple[Path, dict[str, str], str]) -> None:
    workspace, _, _ = smoke
    declared = [out for stage in STAGES for out in out_paths(stage)]
    for out in declared:
        assert (workspace / out).exists(), out
    for top in ("data", "models", "reports", "export"):
        for path in (workspace / top).rglob("*"):
            relative = path.relative_to(workspace).as_posix()
            assert path.is_dir() or any(covers(out, relative) for out in declared), f"{relative}: no stage declares it"
    metrics = json.loads((workspace / "reports/eval/metrics.json").read_text())
    for variant in ("planned", "unplanned", "temperature"):
        assert metrics[variant]["episodes"] == 2
        assert 0 <= metrics[variant]["wilson_low"] <= metrics[variant]["success_rate"] <= 1
    assert json.loads((workspace / "models/joint/metrics.json").read_text())["steps"] == 6
    assert "<html" in (workspace / "reports/index.html").read_text().lower()


def repro(workspace: Path, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.smoke
def test_second_repro_is_a_no_op(smoke: tuple[Path, dict[str, str], str]) -> None:
    workspace, environment, _ = smoke
    began = time.monotonic()
    text = repro(workspace, environment, "repro")
    assert "Running stage" not in text
    assert time.monotonic() - began < 15


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("edit", "again"),
    [
        ("eval_libero.seed=8", {"eval_libero", "export"}),
        (
            "label_rewards.gamma=0.9",
            {"label_rewards", "train_value", "train_joint", "eval_libero", "export"},
        ),
    ],
)
def test_a_parameter_reruns_what_depends_on_it(
    smoke: tuple[Path, dict[str, str], str], edit: str, again: set[str]
) -> None:
    """What ``dvc repro`` would run after an edit: the stages whose parameters changed and all that follow."""
    workspace, environment, _ = smoke
    before = (workspace / "params.yaml").read_text()
    name, value = edit.split("=")
    section, field = name.split(".")
    changed = yaml.safe_load(before)
    changed[section][field] = yaml.safe_load(value)
    (workspace / "params.yaml").write_text(yaml.safe_dump(changed))
    try:
        text = repro(workspace, environment, "repro", "--dry")
    finally:
        (workspace / "params.yaml").write_text(before)
    ran = set(re.findall(r"^Running stage '(\w+)'", text, re.MULTILINE))
    assert ran <= again, text
    assert section in ran


@pytest.mark.smoke
def test_metrics_and_plots_are_shown(smoke: tuple[Path, dict[str, str], str]) -> None:
    workspace, environment, _ = smoke
    assert "success_rate" in repro(workspace, environment, "metrics", "show")
    page = Path(repro(workspace, environment, "plots", "show").strip().splitlines()[-1].removeprefix("file://"))
    html = page.read_text()
    assert "loss" in html
    assert 'src="http' not in html, "the page must work without a network"
