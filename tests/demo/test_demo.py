"""The demo's session, its server and its page: what is shown is what the policy does; nobody else gets in."""

from __future__ import annotations

import asyncio
import base64
import functools
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.evaluation import tiny
from tests.helpers.browser import CHROMIUM, page
from wav import cli
from wav.demo.server import MAX_MESSAGE, Server
from wav.demo.session import Ask, Session
from wav.policy.results import Results
from wav.sim.env import Observation, SimReply

TASK = "lift_red_cube"


class FakePool:
    """A simulator whose pictures get lighter with every step; it fails when ``broken``."""

    def __init__(self) -> None:
        self.steps, self.broken, self.replies = 0, False, []

    def seen(self) -> Observation:
        image = np.full((32, 32, 3), min(255, 40 + 4 * self.steps), np.uint8)
        return Observation({"agentview": image, "wrist": image // 2}, np.full(8, self.steps / 50, np.float32), "")

    def submit_reset(self, slot: int, task: str, index: int, record: bool) -> None:
        self.steps = index
        self.replies = [(slot, SimReply(self.seen(), frames=[self.seen().images]))]

    def submit_steps(self, slot: int, actions: Any) -> None:
        frames = []
        for _ in actions:
            self.steps += 1
            frames.append(self.seen().images)
        broken = SimReply(None, error="it died")
        self.replies = [(slot, broken if self.broken else SimReply(self.seen(), False, len(actions), frames))]

    def wait(self) -> Any:
        return self.replies


policy = functools.cache(lambda: tiny.policy("tabletop"))


def session(**planner: Any) -> Session:
    policy().planner = tiny.PLANNER.model_copy(update=planner)
    return Session(policy(), FakePool())  # type: ignore[arg-type]


def asking(do: str, **changes: Any) -> dict[str, Any]:
    return {"do": do, "task": TASK, "index": 3, "variant": "planned", "K": 2, "M": 3, "execute": 4} | changes


def answers(one: Session, do: str, **changes: Any) -> dict[str, Any]:
    """Messages by kind; the futures are a list."""
    found: dict[str, Any] = {"futures": []}
    for told in one.answer(Ask.read(json.dumps(asking(do, **changes)))):
        found[told["is"]] = told
        if told["is"] == "future":
            found["futures"].append(told)
    return found


def picture(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def test_what_is_shown_is_what_the_policy_does() -> None:
    one = session()
    told = answers(one, "begin")
    before: list[Any] = []
    policy().reset(0, f"tabletop/{TASK}/3", 7)
    answers(one, "plan", variant="unplanned", K=1)  # another look at the same state changes nothing
    for call in range(3):
        told = answers(one, "plan") if call == 0 else answers(one, "step")
        now = one.pool.seen()
        seen = Observation(now.images, now.state, "lift the red cube")
        output = policy().act([seen], [0], with_value=True, with_future=True)
        plan = told["plan"]
        np.testing.assert_allclose(plan["actions"], output.actions[0], atol=1e-4)
        np.testing.assert_allclose(plan["returns"], output.returns[0], atol=1e-4)
        np.testing.assert_allclose([c["score"] for c in plan["candidates"]], output.plan.candidates[0], atol=1e-4)
        assert sorted(c["rank"] or 0 for c in plan["candidates"]) == [0, 1, 2]
        assert [future["m"] for future in told["futures"]] == [0, 1, 2]
        strip = policy().decode_future(output.future[0]).transpose(2, 1, 0, 3, 4).reshape(32, -1, 3)
        assert np.abs(picture(plan["frames"]).astype(int) - strip).mean() < 12  # a JPEG of noise
        if call:
            assert told["scene"]["steps"] == 4 * call
            np.testing.assert_allclose(told["scene"]["executed"], before[:4])
            assert picture(told["scene"]["frames"]).shape == (32, 4 * 2 * 32, 3)
        before = plan["actions"]


def test_what_is_acted_on_is_named() -> None:
    one = session(act_on="winner")
    plan = answers(one, "begin")["plan"]
    assert plan["candidates"][plan["chosen"]]["rank"] == 1
    assert plan["how"] == f"candidate {plan['chosen'] + 1}, the best of 3"
    plan = answers(one, "plan", variant="temperature", M=5)["plan"]
    assert (plan["chosen"], len(plan["candidates"])) == (None, 5)
    assert "not its mean" in plan["how"]
    for changes in ({"variant": "unplanned"}, {"K": 0}):
        told = answers(one, "plan", **changes)
        assert (told["plan"]["candidates"], told["futures"]) == ([], [])
        assert told["plan"]["how"].endswith("without a search")
    assert answers(session(), "begin")["plan"]["how"] == "a new draw from the Gaussian fitted to the 2 elites"
    assert "planner.gate = 1e+09" in answers(session(gate=1e9), "begin")["plan"]["how"]


@contextmanager
def serving(one: Session) -> Iterator[int]:
    """The page's port."""
    loop, stop, listening = asyncio.new_event_loop(), asyncio.Event(), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: loop.run_until_complete(Server(one).run(listening, stop)), daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


def opened(port: int, origin: str | None = None, **headers: str) -> ClientConnection:
    origin = f"http://127.0.0.1:{port}" if origin is None else origin
    return connect(
        f"ws://127.0.0.1:{port}/session", origin=origin or None, additional_headers=headers, max_size=None, proxy=None
    )  # type: ignore[arg-type]


def told(connection: ClientConnection) -> list[dict[str, Any]]:
    """All messages up to ``ready``."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["is"] != "ready":
        found.append(json.loads(connection.recv(timeout=60)))
    return found


def test_an_episode_over_the_websocket(monkeypatch: pytest.MonkeyPatch) -> None:
    one = session()
    monkeypatch.setattr(policy(), "results", Results(execute_steps=5))
    with serving(one) as port, opened(port) as older:
        about = json.loads(older.recv(timeout=20))
        assert [task["name"] for task in about["tasks"]] == ["lift_red_cube", "lift_green_cube"]
        assert (about["K"], about["M"], about["execute"]) == (2, 3, 5)  # as exported, and as evaluated
        assert (about["size"], about["axes"][6]) == ([32, 32], "gripper")
        for message, wanted in (
            ("{", "Invalid JSON"),
            ("[" * 4000, "message"),
            (json.dumps(asking("step")), "no episode is under way"),
            (json.dumps(asking("begin", task="lift_blue_cube")), "use one of lift_red_cube, lift_green_cube"),
            (json.dumps(asking("begin", M=10**6)), "M = 1000000: input should be less than or equal to 32"),
            (json.dumps(asking("begin", more=1)), "more: unknown parameter"),
        ):
            older.send(message)
            error, _ = told(older)
            assert error["is"] == "error"
            assert wanted in error["text"]
            assert "\n" not in error["text"]
        older.send(json.dumps(asking("begin")))
        assert [m["is"] for m in told(older)] == ["scene", "plan", "future", "future", "future", "ready"]
        one.pool.broken = True
        older.send(json.dumps(asking("step")))
        assert told(older)[0]["text"] == "the simulator failed (it died); begin the episode again"
        older.send(json.dumps(asking("step")))
        assert "begin one" in told(older)[0]["text"]
        with opened(port) as newer:  # has the simulator from now on
            assert json.loads(newer.recv(timeout=20))["is"] == "about"
            with pytest.raises(ConnectionClosed) as closed:
                older.recv(timeout=20)
            assert closed.value.rcvd.code == 4000
            newer.send("x" * (MAX_MESSAGE + 1))
            with pytest.raises(ConnectionClosed) as closed:
                newer.recv(timeout=20)
            assert closed.value.rcvd.code == 1009


def test_other_sites_are_refused() -> None:
    with serving(session()) as port:
        for host, wanted in (
            (f"127.0.0.1:{port}", 200),
            ("localhost", 200),
            ("evil.example", 403),
            ("127.0.0.1.a", 403),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/", headers={"Host": host})
            answer = connection.getresponse()
            assert answer.status == wanted
            if wanted == 200:
                assert "default-src 'none'" in (answer.headers["Content-Security-Policy"] or "")
                text = answer.read().decode()
                assert "://" not in text.replace("ws://${location.host}", "").replace("http://www.w3.org/2000/svg", "")
        for origin in ("", "http://evil.example", "https://127.0.0.1", "http://127.0.0.1:1", "null"):
            with pytest.raises(InvalidStatus, match="403"):
                opened(port, origin)
        connection.request("GET", "/etc/passwd", headers={"Host": "localhost"})
        assert connection.getresponse().status == 404


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["demo", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another --port" in capsys.readouterr().err
    assert cli.main(["demo", str(tmp_path), "--port", "0"]) == 1
    assert "manifest.json" in capsys.readouterr().err

    def without_simulator(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'mujoco'", name="mujoco")

    monkeypatch.setattr("wav.demo.server.demo", without_simulator)
    assert cli.main(["demo", "export"]) == 1
    assert capsys.readouterr().err.startswith("wav demo: mujoco: this package is missing; simulators need `pip install")


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_steps_and_plays(tmp_path: Path) -> None:
    pixels = "document.getElementById('{}').toDataURL()"
    steps, idle = "document.getElementById('progress').value", "document.readyState === 'complete' && scene && !busy"
    with serving(session()) as port, page(f"http://127.0.0.1:{port}/", tmp_path) as tab:
        tab.wait(f"{idle} && document.querySelectorAll('#futures canvas.ready').length === 3")
        now, future = (tab.value(pixels.format(name)) for name in ("now", "future"))
        assert tab.value("document.querySelectorAll('figure.elite').length") == 2
        tab.press("s")
        tab.wait(f"{steps} === 6 && {idle}")  # the whole chunk
        tab.wait(f"{pixels.format('now')} !== '{now}' && {pixels.format('future')} !== '{future}'")
        tab.value("document.getElementById('M').value = 5, document.getElementById('M').onchange()")
        tab.wait(f"{idle} && document.querySelectorAll('#futures canvas.ready').length === 5")
        tab.value("document.getElementById('K').value = 0, document.getElementById('K').onchange()")
        tab.wait(f"{idle} && document.querySelectorAll('#futures figure').length === 0")
        tab.value("document.getElementById('K').value = 1, document.getElementById('K').onchange()")
        tab.wait(f"{idle} && document.querySelectorAll('#futures svg path').length > 5")  # their predicted returns
        tab.press("2")
        tab.wait(f"{idle} && document.querySelectorAll('#futures figure').length === 0")
        tab.value("document.getElementById('play').click()")
        tab.wait(f"{steps} >= 18")
        tab.press("p")
        tab.wait(f"!playing && {idle}")
        assert tab.value("document.getElementById('play').textContent") == "PlayP"
        tab.value("document.getElementById('task').selectedIndex = 1, document.getElementById('task').onchange()")
        tab.wait(f"{idle} && {steps} === 0 && scene.instruction === 'lift the green cube'")
        tab.wait("document.getElementById('status').textContent === 'step 0 of 120'")
        assert tab.complaints == []
