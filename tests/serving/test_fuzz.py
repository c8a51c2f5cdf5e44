"""Whatever is sent, each message gets one reply without a traceback, and the other sessions go on.

A short slice runs always, the whole with ``-m long``. The messages are made from a seed.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from tests.helpers.serving import FakePolicy, client, message, serving
from tests.helpers.stage_folders import DATA, PLANNER, make_stages
from wav.policy.export import policy_from_stages
from wav.serving.wire import pack

VALID = pack(message())
PLACES = [i for i in range(len(VALID)) if i < 60 or i > len(VALID) - 400]  # pictures apart: structure and small fields
DTYPES = ("|u1", "<f4", "<f8", ">i2", "|b1", "<U3", "|S2", "<c8", "|O", "<M8[s]", "|V4", "f4,i4", "", "<f4" * 9)


def any_value(random: np.random.Generator, depth: int = 0) -> Any:
    """A value as another program might send it: numbers, strings, lists, maps, arrays in openpi's form or nearly so."""
    kind = random.integers(0, 9 if depth < 4 else 6)
    size = int(random.integers(0, 5))
    simple = (
        None,
        bool(size % 2),
        int(random.integers(-(2**40), 2**40)),
        float(random.normal()) * 10**size,
        "x" * size,
    )
    if kind < 5:
        return simple[kind]
    if kind == 5:
        return random.bytes(size)
    if kind == 6:
        return [any_value(random, depth + 1) for _ in range(size)]
    if kind == 7:
        return {str(i): any_value(random, depth + 1) for i in range(size)}
    shape = [int(n) for n in random.integers(-1, 9, size)]
    if random.random() < 0.2:
        shape = [2 ** int(random.integers(20, 60))] * size  # of data that are not there
    dtype = DTYPES[random.integers(len(DTYPES))]
    data = b"\1" * int(random.choice([0, 8, 12, 96]))
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def fuzzed(random: np.random.Generator) -> bytes | str:
    """One message."""
    kind = random.integers(0, 8)
    if kind == 0:
        return VALID[: random.integers(len(VALID))]
    if kind == 1:  # other bytes in a valid one
        data = bytearray(VALID)
        for place in random.choice(PLACES, random.integers(1, 6)):
            data[place] = random.integers(256)
        return bytes(data)
    if kind == 2:
        return random.bytes(random.integers(0, 300))
    if kind == 3:
        return "text " * int(random.integers(0, 20))
    if kind == 4:  # nested
        depth = int(random.integers(1, 900))
        return b"\x81\xa1a" * depth + b"\xc0"
    if kind == 5:  # more entries declared than there are
        return b"\xdf" + random.bytes(4) + VALID[1:]
    fields = message(int(random.integers(9)))
    names = [*fields, "reset", "episode", "seed", "image_rotation"]
    changed = random.choice(names, random.integers(1, 4))
    return msgpack.packb({**form(fields), **{str(name): any_value(random) for name in changed}})


def form(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as they are packed, so that they can be mixed with what ``pack`` would refuse."""
    return msgpack.unpackb(pack(fields))


def run(policy: Any, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    plans, stop, failures = [0], threading.Event(), []
    with serving(policy, deadline=60.0) as server:

        def work() -> None:
            """Another session, which must get its plans meanwhile."""
            with contextlib.suppress(ConnectionError), client(server) as good:
                while not stop.is_set():
                    plan = good.act(message())
                    if plan["actions"].shape != (DATA.action_chunk, 7):
                        failures.append(plan)
                    plans[0] += 1

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        with client(server) as bad:
            for number in range(count):
                sent = fuzzed(random)
                bad._socket.send(sent)
                reply = bad._socket.recv(60)
                assert isinstance(reply, bytes) or "Traceback" not in reply, (seed, number)
                if isinstance(reply, str):
                    assert 0 < len(reply) < 500, (seed, number, reply)
                    assert "server's log" not in reply, (seed, number, reply)
        with client(server) as after:
            after.act(message())
        stop.set()
        worker.join(60)
    assert not failures
    assert plans[0] > 0


def test_a_slice() -> None:
    run(FakePolicy(), 200, seed=0)


@pytest.mark.long
def test_five_thousand_messages_and_bounded_memory(tmp_path: Any) -> None:
    stages = make_stages(tmp_path)
    policy, _ = policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=2, device="cpu")
    run(policy, 500, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(policy, 4500, seed=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


def test_connections_that_go_nowhere_hold_up_nobody() -> None:
    """Half a handshake, half a message, nothing at all, a flood, and one who reads no replies."""
    request = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    rest = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    begun = b"\x82\xfe\x40\x00" + b"\0" * 4 + VALID[:100]  # a frame of 16 KiB of which 100 bytes come
    with serving(FakePolicy(), sessions=12) as server, client(server) as good, contextlib.ExitStack() as stack:
        good.act(message())
        for sent in (b"", request, b"\0" * 20, request + rest, request + rest + begun, b"GET /healthz HTTP/1.1\r\n"):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            half.sendall(sent)
        good.act(message())
        for _ in range(120):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        for _ in range(3):
            good.act(message())
        stack.close()
        for _ in range(50):  # a closed connection counts until the server has seen that it is
            with contextlib.suppress(ConnectionClosed), client(server) as after:
                after.act(message())
                return
            time.sleep(0.2)
        pytest.fail("nobody comes in after the flood")
