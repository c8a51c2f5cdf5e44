"""Files that people wrote: DVC's YAML, bounds, and one sentence for whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from wav.config import Runtime, load_settings, parameter_text, parse_settings
from wav.errors import MESSAGE_CHARACTERS, ConfigError, DataError, exit_status
from wav.io.readers import read_json, read_text, read_yaml, understood


@pytest.mark.parametrize("spelling", ["010", "0o10", "1_0", "1e1", "8"])
def test_a_run_uses_the_number_that_dvc_records(spelling: str, tmp_path: Path) -> None:
    from dvc.utils.serialize import load_yaml  # slow, and imported by every process that collects this file

    path = tmp_path / "params.yaml"
    path.write_text(f"data: {{control_hz: {spelling}}}\n")
    try:
        used = load_settings(path).data.control_hz
    except ConfigError:
        assert isinstance(load_yaml(str(path))["data"]["control_hz"], float)
    else:
        assert used == load_yaml(str(path))["data"]["control_hz"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data:\n  suite: 2024-01-02\n", "line 2: 2024-01-02 is a date, which DVC refuses; put it in quotes"),
        ("data:\n  suite: a\n  suite: b\n", "line 3: not valid YAML (found duplicate key"),
        ("data: {state_dim: true}", "data.state_dim = True"),
        ("data: {state_dim: '8'}", "data.state_dim = '8'"),
        ("ingest: {image_rotation: 180}", "unknown parameter"),
        ("ingest: {lerobot: {gripper: 1}}", "ingest.lerobot.gripper = 1"),
        ("data: {suite: 180}", "put it in quotes: '180'"),
        ("train_joint: {learning_rate: .inf}", "train_joint.learning_rate = inf"),
        ("train_joint: {seed: 99999999999999999999}", "whole numbers lie between"),
        ("model: {layers: 2147483648}", "model.layers"),
        ("eval_libero: {variants: []}", "eval_libero.variants"),
        ("data: {views: [top, top]}", "names something twice"),
        ("data: {views: [../x]}", "data.views.0"),
        ("data: !!map {suite: a}", "line 1: tag"),
        ("[" * 3000, "more than 20 levels"),
        ("a: &a [*a]", "not valid YAML"),
        ("- data", "must hold sections"),
        ("data: {suite: \x00}", "not valid YAML"),
        ("x" * 2_000_000, "bytes where at most"),
    ],
)
def test_what_is_wrong_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < MESSAGE_CHARACTERS


def test_aliases_make_no_long_message(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "params.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 100000 values") as caught:
        load_settings(tmp_path / "params.yaml")
    assert len(str(caught.value)) < 300


def test_a_written_file_is_read_in_the_same_dialect(tmp_path: Path) -> None:
    settings = parse_settings({"ingest": {"path": "1e3"}, "encode": {"text": "0o10"}, "export": {"name": "010"}})
    (tmp_path / "p.yaml").write_text(parameter_text(settings))
    assert load_settings(tmp_path / "p.yaml") == settings


@pytest.mark.parametrize("reader", [read_json, read_yaml, read_text])
def test_files_of_the_wrong_kind(reader, tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes(b"a\nb: caf\xe9")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in {
        "": "Is a directory",
        "none": "missing",
        "latin1": "line 2 is not UTF-8",
        "loop": "symbolic links",
        "a" * 300: "too long",
        "a\0": "null byte",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            reader(f"{tmp_path}/{name}", "give another file")
        assert str(caught.value).endswith("give another file")


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json", "") == [1]


@pytest.mark.parametrize("surprise", [KeyError("a"), TypeError("b"), RuntimeError("c"), OverflowError("d")])
def test_content_that_surprises(surprise: Exception) -> None:
    with (
        pytest.raises(ConfigError, match=r"x\.json: .*make it again"),
        understood("x.json", "make it again", ConfigError),
    ):
        raise surprise
    with pytest.raises(DataError, match="own words"), understood("x.json", "make it again", ConfigError):
        raise DataError("own words")


@pytest.mark.parametrize(("name", "value"), [("WAV_WORKERS", "auto"), ("WAV_THREADS", "-1"), ("WAV_THREADS", "9" * 50)])
def test_a_variable_is_empty_or_right_or_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert getattr(Runtime(), name.removeprefix("WAV_").lower()) == 0
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} = .*unset {name}"):
        Runtime()


def test_the_region_is_set_as_other_programs_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WAV_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert Runtime().s3_region == ""
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "WAV_S3_REGION"):  # the later ones win
        monkeypatch.setenv(name, name)
        assert Runtime().s3_region == name


def test_the_boundary_of_an_entry_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: Path(tmp_path).read_text() and None) == 1
    assert capsys.readouterr().err == f"{tmp_path}: Is a directory; check the path, its permissions and the disk\n"

    def long() -> None:
        raise ConfigError("x\n" * 10**6)

    assert exit_status(long, "wav: ") == 1
    assert len(capsys.readouterr().err) < MESSAGE_CHARACTERS + 10
    with pytest.raises(ZeroDivisionError):  # a fault of the code keeps its traceback
        exit_status(lambda: 1 // 0)
