"""From messages to observations as trained on, and the sentence for everything else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.helpers.serving import message
from tests.helpers.stage_folders import DATA
from wav.data.conventions import Conventions
from wav.errors import DataError
from wav.serving.requests import Reader

READER = Reader(DATA, Conventions.for_simulator(DATA, {}))
GIVEN = message()


def images(sent: dict) -> dict:
    return READER(sent).observation.images


def test_an_observation_in_openpis_names_and_in_ours() -> None:
    request = READER(GIVEN)
    assert not request.reset
    assert (request.episode, request.seed, request.observation.instruction) == (None, None, GIVEN["prompt"])
    np.testing.assert_array_equal(request.observation.state, GIVEN["observation/state"])
    own = {"agentview": "image", "wrist": "wrist_image"}
    for view, name in own.items():
        np.testing.assert_array_equal(request.observation.images[view], GIVEN[f"observation/{name}"])
    other = {k: v for k, v in GIVEN.items() if "image" not in k}
    other |= {f"observation/{view}": GIVEN[f"observation/{name}"] for view, name in own.items()}
    for view, image in images(other).items():
        np.testing.assert_array_equal(image, request.observation.images[view])


def test_images_are_brought_to_the_checkpoints_form() -> None:
    given = GIVEN["observation/image"]
    turned = images({**GIVEN, "image_rotation": "none", "observation/image": given[::-1, ::-1]})
    np.testing.assert_array_equal(turned["agentview"], given)
    first = images({**GIVEN, "observation/image": np.moveaxis(given, 2, 0)})
    np.testing.assert_array_equal(first["agentview"], given)
    floats = images({**GIVEN, "observation/image": given.astype(np.float64) / 255})
    assert np.abs(floats["agentview"].astype(int) - given).max() <= 1
    large = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(images({**GIVEN, "observation/image": large})["agentview"], wanted)


def test_a_camera_of_a_real_robot_is_not_turned() -> None:
    real = Reader(DATA, dataclasses.replace(READER.conventions, image_rotation="none"))
    np.testing.assert_array_equal(real(GIVEN).observation.images["agentview"], GIVEN["observation/image"])


def test_episodes() -> None:
    assert READER({**GIVEN, "reset": np.bool_(True)}).reset
    request = READER({**GIVEN, "prompt": "<reset> lift it ", "episode": "e-7", "seed": np.int64(3)})
    assert (request.reset, request.episode, request.seed) == (True, "e-7", 3)
    assert request.observation.instruction == "lift it"


SMALL = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"observation/image": None}, r"observation/image: missing; send an RGB image, uint8"),
        ({"observation/image": [1, 2]}, r"observation/image: list; send an RGB image"),
        ({"observation/image": SMALL}, r"observation/image: uint8 \(4, 4\); send"),
        ({"observation/wrist_image": np.zeros((4, 4, 4), np.uint8)}, r"observation/wrist_image: uint8 \(4, 4, 4\)"),
        ({"observation/image": np.zeros((0, 4, 3), np.uint8)}, r"\(0, 4, 3\)"),
        ({"observation/image": np.full((4, 4, 3), 2.0)}, "floats between 0 and 1"),
        ({"observation/image": np.full((4, 4, 3), np.nan)}, "floats between 0 and 1"),
        ({"observation/image": np.zeros((4, 4, 3), np.int64)}, r"int64 \(4, 4, 3\)"),
        ({"observation/state": None}, r"observation/state: missing; send 8 finite numbers \(eef_pos"),
        ({"observation/state": np.zeros(7)}, r"observation/state: float64 \(7,\)"),
        ({"observation/state": np.full(8, np.inf)}, "8 finite numbers"),
        ({"observation/state": np.full(8, 1e300)}, "8 finite numbers"),
        ({"observation/state": np.zeros(8, bool)}, "8 finite numbers"),
        ({"observation/state": ["a"] * 8}, "8 finite numbers"),
        ({"prompt": None}, "prompt: missing"),
        ({"prompt": 3}, "prompt: int"),
        ({"prompt": "<reset>"}, "prompt: is empty"),
        ({"prompt": "a" * 1001}, "prompt: str; send the instruction, a string of at most 1000"),
        ({"prompt": "a\nb"}, "printable"),
        ({"image_rotation": "90"}, "image_rotation: send 'none'"),
        ({"image_rotation": SMALL}, "image_rotation: send 'none'"),
        ({"reset": SMALL}, "reset: uint8"),
        ({"episode": 1.5}, "episode: float"),
        ({"seed": "a"}, "seed: str"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict, match: str) -> None:
    with pytest.raises(DataError, match=match):
        READER({**GIVEN, **change})


@pytest.mark.parametrize("name", ["observation/image", "observation/state", "prompt"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(DataError, match=f"{name}.*missing"):
        READER({key: value for key, value in GIVEN.items() if key != name})
