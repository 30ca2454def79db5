"""The server in this process, over real sockets, with a policy that does as it is told."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError, web

from lapa.schema import Embodiment, ExportConfig, Runtime, ServeConfig
from policies import export
from policies.serving import server as server_module
from policies.serving.client import PolicyClient
from policies.serving.protocol import pack, unpack
from policies.serving.safety import SafetyLayer, SafetyStop
from policies.serving.server import Metrics, PolicyServer, RateLimit, is_loopback, read_token

TOKEN = "0123456789abcdef-secret"
STATE = "observation.state"


class EchoPolicy:
    """Acts as the state says: two steps of it."""

    type = "echo"
    inputs = {"observation.images.top": (3, 4, 4), STATE: (2,)}
    action_shape = (2, 2)
    num_calls = 0

    def infer(self, observation):
        self.num_calls += 1
        if observation["task"] == "fail":
            raise RuntimeError("broken on purpose")
        if observation["task"] == "nan":
            return np.full((2, 2), np.nan)
        if observation["task"] == "wait":
            time.sleep(0.3)
        return np.tile(observation[STATE], (2, 1))


def config(**changes) -> ServeConfig:
    limits = Embodiment(action_low=[-1.0, -1.0], action_high=[1.0, 1.0])
    return ServeConfig(**{"policy": "", "embodiment": limits, "port": 0, "max_requests_per_s": 0.0} | changes)


def message(task: str = "go", state=(0.5, -0.5), **changes) -> dict:
    image = np.zeros((4, 4, 3), np.uint8)
    return {"observation.images.top": image, STATE: np.array(state, np.float32), "task": task} | changes


@contextlib.asynccontextmanager
async def serving(token: str | None = None, policy=None, **changes):
    """A running server: its object and http address."""
    server = PolicyServer(policy or EchoPolicy(), config(**changes), token)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield server, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def serving_thread(token: str | None = None, policy=None, **changes):
    """The same in a thread, for clients that block: its object and port."""
    ready, stop, found = threading.Event(), threading.Event(), {}

    async def main():
        async with serving(token, policy, **changes) as (server, address):
            found["server"], found["port"] = server, int(address.rsplit(":", 1)[1])
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(20)
    try:
        yield found["server"], found["port"]
    finally:
        stop.set()
        thread.join()


def test_the_client_gets_bounded_actions_over_one_connection():
    with serving_thread(TOKEN) as (server, port), PolicyClient(port=port, token=TOKEN) as client:
        assert client.metadata["inputs"] == {"observation.images.top": [3, 4, 4], STATE: [2]}
        assert client.actions(message(), "go").tolist() == [[0.5, -0.5]] * 2
        assert client.actions(message(state=(9, -0.5)), "go").tolist() == [[1.0, -0.5]] * 2
        assert client.limits == server.limits
        assert server.metrics.num_clipped == 2


def test_a_robot_is_held_when_the_policy_fails():
    with serving_thread() as (_, port):
        client = PolicyClient(port=port)
        safety = SafetyLayer(client.limits)
        with pytest.raises(ConnectionError, match="the policy failed"):
            client.actions(message(), "fail")
        with pytest.raises(ConnectionError, match="gone"):
            client.actions(message(), "go")
        assert safety.counts.num_commands == 0


def test_actions_that_are_not_finite_never_leave_the_server():
    with serving_thread() as (_, port), pytest.raises(ConnectionError, match=r"unsafe.*not finite"):
        PolicyClient(port=port).actions(message(), "nan")


def test_a_server_that_does_not_answer_in_time_ends_the_connection():
    with serving_thread() as (_, port):
        client = PolicyClient(port=port, timeout_s=0.1)
        with pytest.raises(ConnectionError, match=r"did not answer within 0\.1 s"):
            client.actions(message(), "wait")


def test_dropped_and_late_frames_stop_the_robot():
    now = [0.0]
    with serving_thread() as (_, port), PolicyClient(port=port) as client:
        safety = SafetyLayer(client.limits, clock=lambda: now[0])
        captured_at_s = now[0]
        for action in client.actions(message(), "go"):
            safety.bound(action)
        now[0] += 0.6
        with pytest.raises(SafetyStop, match="old"):
            safety.check_observation(message(), captured_at_s)


def test_no_server_is_a_clear_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="no policy server at"):
        PolicyClient(port=port)


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x"])
def test_without_the_token_nothing_is_answered_but_health(token):
    async def main():
        async with serving(TOKEN) as (server, address), ClientSession() as session:
            headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
            for path in ("/metadata", "/metrics"):
                assert (await session.get(address + path, headers=headers)).status == 401
            packed = {"Content-Type": "application/msgpack"}
            reply = await session.post(f"{address}/act", data=pack(message()), headers=headers | packed)
            assert reply.status == 401
            with pytest.raises(WSServerHandshakeError):
                await session.ws_connect(address, headers=headers)
            assert (await session.get(f"{address}/healthz")).status == 200
            assert server.policy.num_calls == 0

    asyncio.run(main())


def test_http_answers_in_the_type_it_was_asked_in():
    async def main():
        async with serving() as (_, address), ClientSession() as session:
            reply = await session.post(
                f"{address}/act", data=pack(message()), headers={"Content-Type": "application/msgpack"}
            )
            assert unpack(await reply.read())["actions"].tolist() == [[0.5, -0.5]] * 2
            plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in message().items()}
            reply = await session.post(f"{address}/act", json=plain)
            assert (await reply.json())["actions"] == [[0.5, -0.5]] * 2
            reply = await session.post(f"{address}/act", data=b"x", headers={"Content-Type": "text/plain"})
            assert reply.status == 400 and (await reply.json())["code"] == "content_type"

    asyncio.run(main())


def test_a_web_page_cannot_reach_a_robot_through_the_browser():
    async def main():
        async with serving() as (_, address), ClientSession() as session:
            assert (await session.get(f"{address}/metadata", headers={"Origin": "https://evil.example"})).status == 403
            assert (await session.get(f"{address}/metadata", headers={"Host": "evil.example"})).status == 403
            assert (await session.get(f"{address}/metadata", headers={"Host": "0.0.0.0:8000"})).status == 200
            assert (await session.get(f"{address}/metadata")).status == 200

    asyncio.run(main())


def test_large_and_many_requests_are_refused():
    async def main():
        async with serving(max_request_mb=0.01) as (server, address), ClientSession() as session:
            headers = {"Content-Type": "application/msgpack"}
            assert (await session.post(f"{address}/act", data=b"x" * 20_000, headers=headers)).status == 413
            socket = await session.ws_connect(address)
            await socket.receive_bytes()
            await socket.send_bytes(b"x" * 20_000)
            assert (await socket.receive()).type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR)
            assert server.policy.num_calls == 0
        async with serving(max_requests_per_s=5.0) as (_, address), ClientSession() as session:
            statuses = [(await session.get(f"{address}/metadata")).status for _ in range(30)]
            assert statuses[:10] == [200] * 10 and 429 in statuses

    asyncio.run(main())


def test_more_than_can_wait_are_told_that_it_is_busy():
    async def main():
        async with serving(max_waiting=2) as (_, address), ClientSession() as session:
            headers = {"Content-Type": "application/msgpack"}
            requests = [session.post(f"{address}/act", data=pack(message("wait")), headers=headers) for _ in range(5)]
            replies = await asyncio.gather(*requests)
            assert sorted(reply.status for reply in replies) == [200, 200, 400, 400, 400]
            refused = [await reply.json() for reply in replies if reply.status == 400]
            assert {reply["code"] for reply in refused} == {"busy"}

    asyncio.run(main())


def test_a_large_message_that_is_being_decoded_does_not_hold_up_the_rest(monkeypatch):
    release, read = threading.Event(), server_module.read_observation

    def slow(*arguments):
        assert release.wait(10), "nothing else was answered while a message was decoded"
        return read(*arguments)

    async def main():
        async with serving(max_waiting=2) as (server, address), ClientSession() as session:
            monkeypatch.setattr(server_module, "read_observation", slow)
            headers = {"Content-Type": "application/msgpack"}
            large = {"observation.images.top": np.zeros((200, 200, 3), np.uint8)}
            posts = [
                asyncio.create_task(session.post(f"{address}/act", data=pack(message(**large)), headers=headers))
                for _ in range(3)
            ]
            while not any(post.done() for post in posts):
                assert (await session.get(f"{address}/healthz")).status == 200
            assert server.num_waiting == 2 and server.policy.num_calls == 0
            release.set()
            replies = await asyncio.gather(*posts)
            assert sorted(reply.status for reply in replies) == [200, 200, 400]
            assert server.metrics.requests["busy"] == 1 and server.num_waiting == 0

    asyncio.run(main())


def test_large_and_small_messages_of_one_connection_are_answered_in_order():
    async def main():
        async with serving() as (_, address), ClientSession() as session:
            connection = await session.ws_connect(address)
            await connection.receive_bytes()
            states = [(index / 10, 0.0) for index in range(6)]
            for index, state in enumerate(states):
                size = 300 if index % 2 else 4
                image = np.zeros((size, size, 3), np.uint8)
                await connection.send_bytes(pack(message(state=state, **{"observation.images.top": image})))
            answers = [unpack(await connection.receive_bytes())["actions"][0] for _ in states]
            assert np.allclose(answers, states)

    asyncio.run(main())


def test_metrics_tell_what_happened():
    async def main():
        async with serving() as (_, address), ClientSession() as session:
            await session.post(f"{address}/act", data=pack(message()), headers={"Content-Type": "application/msgpack"})
            await session.post(f"{address}/act", data=b"\xc1", headers={"Content-Type": "application/msgpack"})
            text = await (await session.get(f"{address}/metrics")).text()
            assert 'lapa_requests_total{outcome="ok"} 1' in text
            assert 'lapa_requests_total{outcome="malformed"} 1' in text
            assert 'lapa_inference_seconds{quantile="0.99"}' in text

    asyncio.run(main())


def mutated(generator: random.Random) -> bytes:
    """A message with a few of its bytes or entries made wrong."""
    kind = generator.randrange(6)
    if kind == 0:
        return generator.randbytes(generator.randrange(200))
    good = message(state=(generator.random(), float("nan") if kind == 1 else 0.1))
    if kind == 2:
        good[generator.choice(list(good))] = generator.choice([None, -1, "x", [], {}, b"\x00", [[1], [2, 3]], 1e400])
    if kind == 3:
        good.pop(generator.choice(list(good)))
    packed = bytearray(pack(good))
    if kind == 4:
        for _ in range(generator.randrange(1, 20)):
            packed[generator.randrange(len(packed))] = generator.randrange(256)
    if kind == 5:
        packed = packed[: generator.randrange(len(packed))]
    return bytes(packed)


def test_ten_thousand_malformed_requests_neither_crash_nor_move_it():
    """By HTTP with the token, by HTTP with wrong ones, by WebSocket, and raw bytes; then it still works."""
    generator = random.Random(0)

    async def main():
        async with serving(TOKEN) as (server, address), ClientSession() as session:
            good = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/msgpack"}
            unsafe = 0
            for _ in range(5000):
                reply = await session.post(f"{address}/act", data=mutated(generator), headers=good)
                body = await reply.read()
                assert reply.status in (200, 400), reply.status
                if reply.status == 200:
                    unsafe += not (np.abs(unpack(body)["actions"]) <= 1).all()
                else:
                    assert json.loads(body)["code"]
            calls = server.policy.num_calls
            for _ in range(3000):
                wrong = generator.choice(["", "Bearer", "Basic x", f"Bearer {TOKEN[1:]}", "Bearer \udcff", "Api-Key x"])
                headers = good | {"Authorization": wrong}
                path = generator.choice(["/act", "/", "/metadata", "/metrics", "/../act", "//act", "/act?x=1"])
                method = generator.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS"])
                reply = await session.request(method, address + path, data=mutated(generator), headers=headers)
                assert reply.status in (401, 404, 405), (reply.status, method, path)
            assert server.policy.num_calls == calls, "the policy acted for a request without the token"
            for _ in range(1500):
                connection = await session.ws_connect(address, headers=good)
                await connection.receive_bytes()
                if generator.random() < 0.1:
                    await connection.send_str("text")
                else:
                    await connection.send_bytes(mutated(generator))
                reply = await connection.receive()
                if reply.type == WSMsgType.BINARY:
                    unsafe += not (np.abs(unpack(reply.data)["actions"]) <= 1).all()
                await connection.close()
            assert unsafe == 0
            port = int(address.rsplit(":", 1)[1])
            calls = server.policy.num_calls
            for _ in range(600):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                starts = [b"", b"GET / HTTP/1.1\r\n", b"POST /act HTTP/1.1\r\nContent-Length: -1\r\n"]
                writer.write(generator.choice(starts))
                writer.write(generator.randbytes(generator.randrange(300)) + b"\r\n\r\n")
                writer.close()
                del reader
            assert (await session.get(f"{address}/healthz")).status == 200
            assert server.policy.num_calls == calls
            reply = await session.post(f"{address}/act", data=pack(message()), headers=good)
            assert unpack(await reply.read())["actions"].tolist() == [[0.5, -0.5]] * 2

    asyncio.run(main())


def test_rates_are_counted_by_client():
    now = [0.0]
    limit = RateLimit(2.0, clock=lambda: now[0])
    assert [limit.allows("a") for _ in range(5)] == [True] * 4 + [False]
    assert limit.allows("b")
    now[0] = 0.5
    assert limit.allows("a") and not limit.allows("a")


def test_metrics_without_a_request_are_well_formed():
    assert Metrics().text().endswith("lapa_inference_seconds_count 0\n")


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("[::1]", True), ("0.0.0.0", False), ("host.org", False)],
)
def test_which_addresses_are_this_machine_alone(host, alone):
    assert is_loopback(host) is alone


def test_an_open_address_needs_a_token(monkeypatch):
    monkeypatch.delenv("LAPA_SERVE_TOKEN", raising=False)
    assert read_token(config()) is None
    with pytest.raises(ValueError, match="holds no token"):
        read_token(config(host="0.0.0.0"))
    monkeypatch.setenv("LAPA_SERVE_TOKEN", "short")
    with pytest.raises(ValueError, match="at least 16"):
        read_token(config(host="0.0.0.0"))
    monkeypatch.setenv("LAPA_SERVE_TOKEN", TOKEN)
    assert read_token(config(host="0.0.0.0")) == TOKEN


def test_limits_of_another_robot_are_refused():
    limits = Embodiment(action_low=[-1.0] * 3, action_high=[1.0] * 3)
    with pytest.raises(ValueError, match="has 3 numbers, the policy's actions 2"):
        PolicyServer(EchoPolicy(), config(embodiment=limits), None)


def test_the_client_needs_no_torch():
    code = "import sys, policies.serving.client, policies.serving.safety; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def check_first_actions(client: PolicyClient) -> None:
    """A policy answers with as many actions as it says, within the tabletop's limits."""
    (image,) = (name for name in client.metadata["inputs"] if "image" in name)
    actions = client.actions({image: np.zeros((48, 64, 3), np.uint8)}, "go to the red moon")
    assert actions.shape == tuple(client.metadata["action_shape"]) and (np.abs(actions) <= 0.03).all()


def test_an_exported_policy_is_served(policy_folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.run(ExportConfig(str(tmp_path), str(policy_folder)))
    servers = []

    async def remember(server, cfg):
        servers.append(server)
        return {}

    monkeypatch.setattr(server_module, "serve_until_signal", remember)
    limits = Embodiment(action_low=[-0.03] * 2, action_high=[0.03] * 2)
    server_module.run(config(policy=str(tmp_path), embodiment=limits, runtime=Runtime(device="cpu", num_threads=1)))
    with serving_thread(policy=servers[0].policy, embodiment=limits) as (_, port), PolicyClient(port=port) as client:
        check_first_actions(client)


def test_a_policy_folder_is_served_until_it_is_told_to_stop(policy_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lapa.cli",
            "serve",
            f"policy={policy_folder}",
            "embodiment=tabletop",
            f"port={port}",
            "runtime.num_threads=1",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        assert any("serving lapa on" in line for line in process.stdout)
        with PolicyClient(port=port, timeout_s=20) as client:
            check_first_actions(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
