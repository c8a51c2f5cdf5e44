"""A server and our client: sessions, batches, refusals, readiness, keys; the actions of the policy in process."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from tests.helpers.serving import TASK, FakePolicy, client, message, serving, told
from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, make_stages
from wav.cli import main
from wav.errors import ConfigError, ServiceError
from wav.policy.export import export_policy, policy_from_stages
from wav.policy.policy import Observation
from wav.serving.server import Options, Server

from wav_client import RefusedError  # isort: skip  (found by tests.helpers.serving)


def get(server: Server, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def refused(server: Server, reason: str) -> float:
    return server.metrics.registry.get_sample_value("wav_refused_total", {"reason": reason}) or 0.0


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    stages = make_stages(tmp_path_factory.mktemp("stages"))
    return policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=2, device="cpu")


def test_the_actions_are_those_of_the_policy_in_process(policy: Any) -> None:
    sent = [message(number) for number in range(3)]
    with serving(policy[0]) as server, client(server) as one, client(server) as other:
        assert one.metadata["action_horizon"] == DATA.action_chunk
        assert one.metadata["views"]["wrist"] == ["observation/wrist", "observation/wrist_image"]
        one.reset("an episode", seed=3)
        other.act(message(9))
        plans = []
        for observation in sent:
            plans.append(one.act(observation))
            other.act(message(8))
        text = get(server, "/metrics")[1]
    assert "wav_batch_rows_count 8.0" in text  # the warm-up included
    assert "wav_request_seconds_count 7.0" in text
    assert "wav_sessions 2.0" in text
    policy[0].reset("row", "an episode", 3)
    for observation, plan in zip(sent, plans, strict=True):
        images = {"agentview": observation["observation/image"], "wrist": observation["observation/wrist_image"]}
        seen = Observation(images, observation["observation/state"], TASK)
        output = policy[0].act([seen], ["row"], with_value=True)
        np.testing.assert_array_equal(plan["actions"], output.actions[0])
        assert plan["value"] == pytest.approx(float(output.value[0]))
        assert plan["scores"] == pytest.approx(output.plan.candidates[0].tolist())
        assert plan["chosen"] is None  # the default plan draws its noise anew
        assert [name for name, value in plan.items() if isinstance(value, np.ndarray)] == ["actions"]
    policy[0].forget("row")
    assert not policy[0]._rows  # sessions that ended are forgotten


def test_memory_does_not_leak_between_episodes() -> None:
    with serving(FakePolicy()) as server, client(server) as one, client(server) as other:
        assert one.metadata["execute_steps"] == one.metadata["results"]["execute_steps"] == 3  # as evaluated
        assert [told(one.act(message())) for _ in range(2)] == [(1, 0, 7), (2, 0, 7)]
        assert told(other.act(message())) == (1, 0, 7)
        one.reset()
        assert told(one.act(message())) == (1, 1, 7)
        assert told(one.act(message())) == (2, 1, 7)
        one.reset(episode=40, seed=2)
        assert told(one.act(message())) == (1, 40, 2)
        assert told(one.act(message(prompt="<reset>" + TASK))) == (1, 3, 7)
        assert told(one.act(message(prompt="lift the green cube"))) == (1, 4, 7)
        assert told(other.act(message())) == (2, 0, 7)
        plan = other.act(message())
    assert plan["chosen"] == 1
    assert plan["spread"] == 1.0
    with serving(FakePolicy(), keep_memory=True) as server, client(server) as one:
        one.act(message())
        assert told(one.act(message(prompt="lift the green cube"))) == (2, 0, 7)


def test_a_refusal_names_the_field_and_the_session_goes_on() -> None:
    with serving(FakePolicy()) as server, client(server) as one:
        one.act(message())
        with pytest.raises(RefusedError, match=r"observation/state: float64 \(7,\); send 8 finite numbers"):
            one.act(message(**{"observation/state": np.zeros(7)}))
        assert told(one.act(message())) == (2, 0, 7)
        one._socket.send("a text frame")
        assert "send observations as binary frames" in one._socket.recv(20)
        assert told(one.act(message())) == (3, 0, 7)
        assert (refused(server, "field"), refused(server, "message")) == (1, 1)


def test_one_session_that_cannot_be_planned_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakePolicy(gated=True)
    with serving(fake) as server, ThreadPoolExecutor(4) as pool:
        clients = [client(server) for _ in range(4)]
        prompts = [TASK, "fail", "break", "lift another"]
        waiting = pool.submit(clients[0].act, message())
        fake.begun.acquire(timeout=20)  # the warm-up
        assert fake.begun.acquire(timeout=50)  # the first is being planned; the others gather
        plans = [pool.submit(c.act, message(prompt=p)) for c, p in zip(clients[1:], prompts[1:], strict=True)]
        while len(server._batches._waiting) < 3:
            time.sleep(0.001)
        for _ in range(5):
            fake.gate.release()
        assert told(waiting.result(20)) == (1, 0, 7)
        with pytest.raises(RefusedError, match="cannot be planned"):
            plans[0].result(20)
        with pytest.raises(RefusedError, match="see the server's log") as told_client:
            plans[1].result(20)
        assert "secret" not in str(told_client.value)
        assert told(plans[2].result(20)) == (1, 0, 7)
        for each in clients:
            each.close()
    assert "ZeroDivisionError: secret" in caplog.text


def test_requests_are_planned_together_and_older_ones_of_a_connection_dropped() -> None:
    fake = FakePolicy(gated=True)
    with serving(fake) as server, client(server) as one, client(server) as two, client(server) as three:
        sent = [(one, 0), (one, 1), (two, 2), (three, 3), (one, 4)]
        fake.begun.acquire(timeout=20)
        for number, (each, state) in enumerate(sent):
            each._socket.send(pack_state(state))
            if number == 0:
                fake.begun.acquire(timeout=20)
            else:
                while not any(w.request.observation.state[0] == state for w in server._batches._waiting.values()):
                    time.sleep(0.001)
        fake.gate.release(2)
        answers = [answer(each) for each, _ in sent]
        assert [each for each in answers if isinstance(each, str)] == [
            "a newer observation of this connection took its place"
        ]
        assert isinstance(answers[1], str), "replies come in the order of the requests"
        assert [int(a["actions"][0, 3]) for a in answers if not isinstance(a, str)] == [0, 2, 3, 4]
        assert [len(batch) for batch in fake.batches] == [1, 3]
        assert answers[4]["server_timing"]["rows"] == 3
        assert refused(server, "superseded") == 1


def pack_state(state: float) -> bytes:
    from wav.serving.wire import pack

    return pack(message(**{"observation/state": np.full(8, state, np.float32)}))


def answer(each: Any) -> Any:
    from wav.serving.wire import unpack

    data = each._socket.recv(20)
    return data if isinstance(data, str) else unpack(data)


def test_a_reset_of_a_dropped_request_is_not_lost() -> None:
    fake = FakePolicy(gated=True)
    with serving(fake) as server, client(server) as one:
        fake.begun.acquire(timeout=20)
        one._socket.send(pack_state(0))
        fake.begun.acquire(timeout=20)
        from wav.serving.wire import pack

        one._socket.send(pack(message(reset=True)))
        one._socket.send(pack_state(2))
        while not any(w.request.observation.state[0] == 2 for w in server._batches._waiting.values()):
            time.sleep(0.001)
        fake.gate.release(2)
        assert told(answer(one)) == (1, 0, 7)
        assert isinstance(answer(one), str)
        assert told(answer(one)) == (1, 1, 7)


def test_a_request_past_its_deadline_is_answered_and_not_planned() -> None:
    fake = FakePolicy(gated=True)
    with serving(fake, deadline=60.0) as server, client(server) as one, client(server) as two:
        fake.begun.acquire(timeout=20)
        one._socket.send(pack_state(0))
        assert fake.begun.acquire(timeout=50)
        object.__setattr__(server.options, "deadline", 0.05)  # for what comes while the first is being planned
        with pytest.raises(RefusedError, match=r"no plan within 0\.05 s"):
            two.act(message())
        assert refused(server, "deadline") == 1
        object.__setattr__(server.options, "deadline", 60.0)
        fake.gate.release(2)
        assert told(answer(one)) == (1, 0, 7)
        assert told(two.act(message(**{"observation/state": np.full(8, 5, np.float32)}))) == (1, 0, 7)
    assert [len(batch) for batch in fake.batches] == [1, 1]


def test_ready_after_the_first_plan() -> None:
    fake, loading, load, planned = FakePolicy(), threading.Event(), threading.Event(), threading.Event()
    plan = fake.act

    def slow_plan(*arguments: Any, **options: Any) -> Any:
        loading.set()
        assert planned.wait(20)
        return plan(*arguments, **options)

    fake.act = slow_plan

    def slow() -> Any:
        loading.set()
        assert load.wait(20)
        return fake

    ready = threading.Event()
    server, stop = Server(Options(port=0), slow, lambda line: ready.set()), asyncio.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.run(stop)), daemon=True)
    thread.start()
    assert loading.wait(20)
    assert get(server, "/healthz") == (503, "loading\n")
    assert get(server, "/")[0] == 503
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(client, server)  # until the policy is there
        loading.clear()
        load.set()
        assert loading.wait(20)  # loaded; the first plan is being made
        assert get(server, "/healthz") == (503, "loading\n")
        planned.set()
        assert ready.wait(20)
        assert get(server, "/healthz") == (200, "OK\n")
        with waits.result(20) as one:
            one.act(message())
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)


def test_only_who_has_the_key_gets_in() -> None:
    with serving(FakePolicy(), api_key="k") as server:
        for key in (None, "other"):
            with pytest.raises(ConnectionError, match="401"):
                client(server, api_key=key)
        assert get(server, "/healthz")[0] == 200
        assert get(server, "/metrics")[0] == 401
        status, text = get(server, "/metrics", Authorization="Api-Key k")
        assert status == 200
        assert 'wav_refused_total{reason="key"} 3.0' in text
        with client(server, api_key="k") as one:
            one.act(message())


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1", "::"])
def test_beyond_loopback_a_key_is_needed(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-key-env"):
        Options(host=host)
    Options(host=host, api_key="k")
    Options(host="localhost")


def test_too_many_sessions_pages_in_browsers_and_taken_ports_are_refused() -> None:
    with serving(FakePolicy(), sessions=1) as server, client(server) as one:
        one.act(message())
        with pytest.raises(ConnectionError, match="503"):
            client(server, wait=0)
        assert get(server, "/", Upgrade="websocket", Origin="http://elsewhere")[0] == 503
        with pytest.raises(ServiceError, match=r"choose another --port"):
            asyncio.run(Server(Options(port=server.port), FakePolicy).run(asyncio.Event()))
    with serving(FakePolicy()) as server:
        handshake = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        handshake |= {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        assert get(server, "/", **handshake)[0] == 101
        assert get(server, "/", **handshake, Origin="http://elsewhere")[0] == 403


def test_a_message_beyond_the_limit_ends_its_connection_alone() -> None:
    with serving(FakePolicy(), max_message=20_000) as server, client(server) as one:
        two, three = client(server), client(server)
        with pytest.raises(ConnectionError, match="1009"):
            one.act(message(more=np.zeros(20_000, np.uint8)))
        two._socket.socket.sendall(b"\x82\xff" + (1 << 40).to_bytes(8, "big") + bytes(4))  # a frame's header alone
        with pytest.raises(ConnectionClosed, match="1009"):
            two._socket.recv(20)
        three.act(message())
        three.close()


def test_a_policy_that_cannot_plan_is_not_served() -> None:
    fake = FakePolicy()
    fake.act = lambda *_, **__: (_ for _ in ()).throw(ConfigError("variant = 'planned': the model has no value expert"))
    with pytest.raises(ServiceError, match=r"cannot plan: variant"), serving(fake):
        pass


def test_the_command_refuses_in_one_line(policy: Any, tmp_path: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "local"))
    export = export_policy(*policy, tmp_path / "export", settings=SETTINGS, metrics=None)
    for arguments, match in [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others could reach the policy"),
        (["--api-key-env", "NO_SUCH_KEY"], "--api-key-env NO_SUCH_KEY: that variable is empty"),
    ]:
        assert main(["serve", str(export), *arguments]) == 1
        error = capsys.readouterr().err
        assert match in error
        assert error.count("\n") == 1
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "no such folder" in capsys.readouterr().err
