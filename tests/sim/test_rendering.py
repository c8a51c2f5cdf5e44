"""Which renderer is taken: EGL where a frame comes out in time, else OSMesa, announced."""

from __future__ import annotations

import logging
import time

import pytest

from wav import doctor
from wav.errors import ServiceError
from wav.sim import rendering
from wav.sim.rendering import choose_backend, probe


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever is chosen meanwhile
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def test_a_renderer_that_hangs_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(rendering, "_PROBE", "import time; time.sleep(600)")
    began = time.monotonic()
    assert probe("egl", 0.5) == "no frame within 0.5 s"
    assert time.monotonic() - began < 30


def test_a_renderer_that_crashes_is_one_phrase(monkeypatch):
    monkeypatch.setattr(rendering, "_PROBE", "import os; os.abort()")
    assert probe("egl", 30) == "exit status -6"
    monkeypatch.setattr(rendering, "_PROBE", "raise ImportError('no libEGL')")
    assert probe("egl", 30) == "ImportError: no libEGL"


def test_osmesa_takes_over_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setattr(rendering, "probe", lambda backend, _: "no frame within 60 s" if backend == "egl" else "")
    with caplog.at_level(logging.WARNING):
        assert choose_backend() == "osmesa"
    assert "EGL does not render here (no frame within 60 s); trying OSMesa, which is slower" in caplog.text
    assert (rendering.os.environ["MUJOCO_GL"], rendering.os.environ["PYOPENGL_PLATFORM"]) == ("osmesa", "osmesa")


def test_without_any_renderer_the_packages_are_named(monkeypatch):
    monkeypatch.setattr(rendering, "probe", lambda backend, _: f"no {backend}")
    with pytest.raises(ServiceError, match=r"EGL: no egl; OSMesa: no osmesa; on Debian/Ubuntu: apt-get install"):
        choose_backend()


def test_doctor_tries_what_the_user_chose(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setattr(rendering, "probe", lambda backend, _: "no display" if backend == "glfw" else "")
    assert choose_backend() == "glfw"  # taken at the user's word
    (finding,) = doctor.check_renderer()
    assert not finding.ok
    assert finding.text.startswith("MUJOCO_GL = glfw does not render (no display); unset it")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    (finding,) = doctor.check_renderer()
    assert (finding.ok, finding.text) == (True, "egl")
