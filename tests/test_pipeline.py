"""The table of stages, dvc.yaml and the code; parameter files; all eight stages run on presets/smoke.yaml."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.free_ports import find_free
from tests.helpers.local_services import prefect_client
from wav.config import DataSettings, Settings, load_preset, load_settings
from wav.errors import ConfigError
from wav.io.readers import read_yaml
from wav.local.workspace import make_workspace
from wav.parameter_files import merge
from wav.source_code import code_digest, stage_modules
from wav.stages import CODE_STAGE, STAGES, TRAINING, dvc_yaml, listing, write_code

PROJECT = Path(__file__).resolve().parents[1]


def covers(dep: str, path: str) -> bool:
    return path == dep or path.startswith(dep + "/")


def test_dvc_yaml_is_what_the_table_means() -> None:
    assert (PROJECT / "dvc.yaml").read_text() == dvc_yaml(), "run `python -m wav.stages > dvc.yaml`"


@pytest.mark.parametrize("name", STAGES)
def test_inputs_are_made_by_earlier_stages_and_sections_exist(name: str) -> None:
    order = list(STAGES)
    made = [out for earlier in order[: order.index(name)] for out in STAGES[earlier].made]
    for path in STAGES[name].inputs:
        assert any(covers(out, path) for out in made), f"{name}: nothing makes {path}"
    assert set(STAGES[name].sections) <= set(Settings.model_fields)
    assert set(TRAINING) == {"pretrain_video", "train_value", "train_joint"}


#: what a stage must not depend on: beginnings of paths
LATER = (
    "wav/rewards",
    "wav/codec",
    "wav/text",
    "wav/planning",
    "wav/policy",
    "wav/sim",
    "wav/data/sources",
    "wav/evaluation",
)
NOT_OF = {
    "ingest": ("wav/training", "wav/model", "wav/codec", "wav/rewards", "wav/evaluation", "wav/planning"),
    "label_rewards": ("wav/sim", "wav/data/sources", "wav/codec", "wav/model", "wav/text"),
    "encode": ("wav/sim", "wav/data/sources", "wav/rewards", "wav/model", "wav/training"),
    "pretrain_video": ("wav/data/reward_store", *LATER),
    "train_value": LATER,
    "train_joint": LATER,
    "eval_libero": ("wav/training", "wav/data/sources", "wav/ingest"),
    "export": ("wav/training", "wav/data/sources", "wav/ingest"),
}


@pytest.mark.parametrize("name", NOT_OF)
def test_a_stage_depends_on_what_decides_its_result_and_on_nothing_else(name: str) -> None:
    found = stage_modules(name)
    assert f"flows/{name}.py" in found
    assert not [path for path in found if path.startswith((*NOT_OF[name], "benchmarks"))]


def test_a_digest_is_of_the_code_alone(tmp_path: Path) -> None:
    path, kernel = tmp_path / "a.py", tmp_path / "a.c"
    path.write_text('"""Doc."""\n\n\ndef f(x: int) -> str:\n    """Says."""\n    return f"#{x}" + "# no comment"\n')
    before = code_digest(path)
    path.write_text(
        '"""New."""\n# why\ndef f(x: int) -> str:\n    # so\n    return f"#{x}" + "# no comment"  # really\n'
    )
    assert code_digest(path) == before
    path.write_text(path.read_text().replace("# no comment", "# a comment"))
    assert code_digest(path) != before
    kernel.write_text("/* one\n two */\nint a; // three\n")
    before = code_digest(kernel)
    kernel.write_text("int a;\n")
    assert code_digest(kernel) == before


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose stages write a word where results should be, all of them up to date."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("wav", "flows"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", ".dvcignore"):
        shutil.copy(PROJECT / name, folder)
    stages = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    for name, row in STAGES.items():
        paths = " ".join(row.made)
        stages[name]["cmd"] = f"mkdir -p $(dirname {paths}) && for p in {paths}; do echo {name} > $p; done"
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    dvc(folder, "init", "--no-scm", "-q")
    dvc(folder, "repro", "-q")
    return folder


@pytest.fixture(scope="module")
def known(copy: Path) -> dict[str, str]:
    """Stage -> what the first step wrote down of its code, before anything was edited."""
    return written(copy)


def written(workspace: Path) -> dict[str, str]:
    return {name: (workspace / row.code).read_text() for name, row in STAGES.items()}


def dvc(workspace: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    environment = {**(environment or os.environ), "PYTHONPATH": str(workspace)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_code_again(workspace: Path) -> None:
    """What ``dvc repro`` runs first."""
    environment = {**os.environ, "PYTHONPATH": str(workspace)}
    subprocess.run([sys.executable, "-m", "wav.stages", CODE_STAGE], cwd=workspace, env=environment, check=True)


def stale(workspace: Path) -> set[str]:
    """Stages that ``dvc repro`` would run now, after ``code``."""
    write_code_again(workspace)
    return set(json.loads(dvc(workspace, "status", "--json"))) - {CODE_STAGE}


#: module -> the stages whose result it decides
DECIDES = {
    "wav/inference/torch.py": {"eval_libero", "export"},
    "wav/data/sources/libero_hdf5.py": {"ingest"},
    "wav/rewards/terms.py": {"label_rewards", "eval_libero"},
    "wav/codec/pca.py": {"encode", "eval_libero", "export"},
    "wav/training/objectives/video.py": {"pretrain_video"},
    "wav/training/loop.py": {"pretrain_video", "train_value", "train_joint"},
    "wav/config.py": set(),
}


def test_a_comment_runs_nothing_again(copy: Path, known: dict[str, str]) -> None:
    before = {module: (copy / module).read_text() for module in DECIDES}
    for module, text in before.items():
        (copy / module).write_text(f"# a comment\n{text}\n# another\n")
    try:
        assert stale(copy) == set()
        assert written(copy) == known
    finally:
        for module, text in before.items():
            (copy / module).write_text(text)


@pytest.mark.parametrize("module", DECIDES)
def test_code_runs_again_what_it_decides(copy: Path, known: dict[str, str], module: str) -> None:
    before = (copy / module).read_text()
    (copy / module).write_text(f"{before}\nEDITED = 1\n")
    try:
        write_code_again(copy)
        now = written(copy)
        assert {name for name in STAGES if now[name] != known[name]} == DECIDES[module]
        if module == "wav/rewards/terms.py":  # to DVC each of these files is a dependency like any other
            assert stale(copy) == DECIDES[module]
    finally:
        (copy / module).write_text(before)


@pytest.mark.integration
def test_files_that_parameters_name_are_looked_at(tmp_path: Path) -> None:
    """A dataset that has grown is ingested again; DVC, which runs ``code`` every time, knows by the file it writes."""
    (tmp_path / "set" / ".cache").mkdir(parents=True)
    (tmp_path / "set" / "episode_0.hdf5").touch()
    (tmp_path / "params.yaml").write_text("ingest: {path: set}\nencode: {text: builtin-small}\n")
    assert {line.partition(":")[0] for line in write_code(tmp_path)} == set(STAGES)
    (tmp_path / "set" / ".cache" / "lock").touch()
    assert not list(write_code(tmp_path))
    (tmp_path / "set" / "episode_1.hdf5").touch()
    assert [line.partition(":")[0] for line in write_code(tmp_path)] == ["ingest"]
    assert yaml.safe_load(dvc_yaml())["stages"][CODE_STAGE]["always_changed"]


def test_a_linked_folder_of_a_dataset_is_looked_into(tmp_path: Path) -> None:
    """Videos on another disk; links in a circle, two to one folder, and one to nothing end too."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "0.mp4").touch()
    (tmp_path / "set" / "meta").mkdir(parents=True)
    for name, target in {"videos": "disk", "again": "disk", "meta/up": "set", "gone": "nothing"}.items():
        (tmp_path / "set" / name).symlink_to(tmp_path / target)
    before = listing(tmp_path / "set")
    assert before.startswith("1 files")
    (tmp_path / "disk" / "0.mp4").write_text("longer")
    assert listing(tmp_path / "set") != before


@pytest.mark.integration
def test_weights_that_were_fetched_again_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id means the snapshot that was fetched last; another one runs what starts from it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "models--owner--video"
    (cache / "refs").mkdir(parents=True)
    (tmp_path / "params.yaml").write_text("model: {init_from: owner/video}\n")
    changed = []
    for commit in ("one", "two"):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "weights").touch()
        (cache / "refs" / "main").write_text(commit)
        changed.append([line.partition(":")[0] for line in write_code(tmp_path)])
    assert changed == [list(STAGES), ["pretrain_video"]]
    assert not list(write_code(tmp_path))


PRESETS = sorted(path.stem for path in PROJECT.glob("presets/*.yaml"))


def leaves(section: dict[str, Any], name: str = "") -> dict[str, Any]:
    """``a.b.c`` -> value of everything that is no mapping (an empty one is a value)."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= leaves(value, f"{name}{key}.") if isinstance(value, dict) and value else {f"{name}{key}": value}
    return found


def test_params_yaml_states_every_value() -> None:
    raw, whole = yaml.safe_load((PROJECT / "params.yaml").read_text()), load_settings(PROJECT / "params.yaml")
    assert set(leaves(raw)) == set(leaves(whole.model_dump()))


@pytest.mark.parametrize("name", ["params.yaml", *(f"presets/{name}.yaml" for name in PRESETS)])
def test_numbers_of_a_parameter_file_are_numbers(name: str) -> None:
    raw = leaves(yaml.safe_load((PROJECT / name).read_text()))
    strings = [k for k, v in raw.items() if isinstance(v, str) and re.fullmatch(r"[\d.]+e-?\d+", v)]
    assert not strings, f"{name}: YAML reads {strings} as text; write 1.0e-5"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_what_it_is_and_only_what_differs(name: str) -> None:
    text = (PROJECT / "presets" / f"{name}.yaml").read_text()
    assert 5 <= len(text.splitlines()) <= 90
    assert f"#   make repro PRESET={name}" in text
    base, stated = leaves(load_settings(PROJECT / "params.yaml").model_dump(mode="json")), leaves(yaml.safe_load(text))
    same = [field for field, value in stated.items() if base.get(field) == value]
    assert not same, f"presets/{name}.yaml repeats params.yaml: {same}"


def test_a_workspace_holds_the_merged_file(tmp_path: Path) -> None:
    folder = make_workspace("piper-small", tmp_path / "w", tmp_path / "cache")
    merged = load_settings(folder / "params.yaml")
    assert merged == load_preset("piper-small") == load_settings(PROJECT / "presets" / "piper-small.yaml")
    assert merged.ingest.lerobot.action == "joint_absolute"
    assert merged.train_value.steps == 20
    assert merged.train_value.learning_rate == load_settings(PROJECT / "params.yaml").train_value.learning_rate


def test_mappings_are_merged_and_lists_replaced(tmp_path: Path) -> None:
    base = {"a": {"b": {"c": 1, "d": 2}, "e": [1, 2]}, "f": 3}
    assert merge(base, {"a": {"b": {"d": 4}, "e": [5]}}) == {"a": {"b": {"c": 1, "d": 4}, "e": [5]}, "f": 3}
    assert base["a"] == {"b": {"c": 1, "d": 2}, "e": [1, 2]}
    (tmp_path / "presets").mkdir()
    (tmp_path / "params.yaml").write_text("model: {layers: 3, heads: 2}\n")
    (tmp_path / "presets" / "p.yaml").write_text("model: {heeds: 1}\n")
    with pytest.raises(ConfigError, match=r"p\.yaml: model\.heeds: unknown parameter; did you mean 'heads'\?"):
        load_settings(tmp_path / "presets" / "p.yaml")
    with pytest.raises(ConfigError, match=r"PRESET = 'smock': no presets/smock\.yaml; did you mean 'smoke'\?"):
        load_preset("smock")


def test_the_earlier_name_of_suites_is_read_with_a_note_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "params.yaml").write_text("data: {suites: [tabletop]}\n")
    (tmp_path / "presets" / "mine.yaml").write_text("data: {suite: my_robot, tasks: []}\n")
    for _ in range(2):
        data = load_settings(tmp_path / "presets" / "mine.yaml").data
        assert (data.suites, data.suite, data.tasks) == (("my_robot",), "my_robot", ())
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "data.suite is a list now and called data.suites; write data: {suites: [...]}"
    ]
    assert DataSettings.model_validate({"suite": "libero_10"}).suites == ("libero_10",), "of an earlier export"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{suites: [libero_goal, tabletop]}", "'tabletop' is none of LIBERO's suites"),
        ("{suites: [libero_goal, libero_10], tasks: [turn_it]}", "with its own, such as 'libero_goal/turn_it'"),
        ("{suites: [libero_goal, libero_goal]}", "names something twice"),
        ("{suites: []}", "at least 1 item"),
        ("{suites: [libero_goal], suite: libero_10}", "data.suite: unknown parameter; did you mean 'suites'?"),
    ],
)
def test_suites_that_do_not_fit_together_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "params.yaml").write_text(f"data: {text}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_settings(tmp_path / "params.yaml")


@pytest.mark.integration
def test_a_stage_sees_only_its_sections() -> None:
    view = Settings().for_stage("ingest")
    assert view.ingest == Settings().ingest
    with pytest.raises(ValueError, match="train_joint"):
        _ = view.train_joint


def services(command: str, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-m", "wav.local.services", command], cwd=PROJECT, env=environment, check=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str], str]]:
    """A finished run of the smoke preset: its workspace, its environment, what ``dvc repro`` said."""
    root = tmp_path_factory.mktemp("smoke")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "WAV_"))}
    environment |= find_free() | {"WAV_LOCAL_DIR": str(root / "local"), "PYTHONUNBUFFERED": "1"}
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
    assert sorted(ran) == sorted([CODE_STAGE, *STAGES])
    assert "skipping" not in text
    assert "is cached" not in text
    with prefect_client(environment) as client:
        runs = client.read_flow_runs(limit=50)
    assert {run.state_name for run in runs} == {"Completed"}
    assert len(runs) == len(STAGES)


@pytest.mark.smoke
def test_results_are_whole_and_declared(smoke: tuple[Path, dict[str, str], str]) -> None:
    workspace, _, _ = smoke
    declared = [path for stage in STAGES.values() for path in (*stage.made, stage.code)]
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


@pytest.mark.smoke
def test_second_repro_is_a_no_op(smoke: tuple[Path, dict[str, str], str]) -> None:
    workspace, environment, _ = smoke
    began = time.monotonic()
    text = dvc(workspace, "repro", environment=environment)
    assert re.findall(r"^Running stage '(\w+)'", text, re.MULTILINE) == ["code"]  # it looks every time; nothing follows
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
    changed = read_yaml(workspace / "params.yaml", "")  # as DVC reads it: off is no boolean
    changed[section][field] = yaml.safe_load(value)
    (workspace / "params.yaml").write_text(yaml.safe_dump(changed))
    try:
        text = dvc(workspace, "repro", "--dry", environment=environment)
    finally:
        (workspace / "params.yaml").write_text(before)
    ran = set(re.findall(r"^Running stage '(\w+)'", text, re.MULTILINE))
    assert ran - {"code"} <= again, text
    assert section in ran


@pytest.mark.smoke
def test_metrics_and_plots_are_shown(smoke: tuple[Path, dict[str, str], str]) -> None:
    workspace, environment, _ = smoke
    assert "success_rate" in dvc(workspace, "metrics", "show", environment=environment)
    page = Path(
        dvc(workspace, "plots", "show", environment=environment).strip().splitlines()[-1].removeprefix("file://")
    )
    html = page.read_text()
    assert "loss" in html
    assert 'src="http' not in html, "the page must work without a network"
