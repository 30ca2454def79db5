"""Stage `serve`: one policy behind WebSocket and HTTP, for robots whose own computer is small.

    ws://host:port/           observations in, chunks of actions out (see protocol.py; openpi's clients work)
    POST /act                 the same for one observation, application/msgpack or application/json
    GET /healthz              200 while the server takes requests
    GET /metadata             what the policy needs and gives
    GET /metrics              counts and latencies, in Prometheus' text format

By default it listens on this machine alone. On any other address a token is required, read from an environment
variable, so that no process list or shell history shows it; it travels as `Authorization: Bearer <token>` (or openpi's
`Api-Key`), so put TLS before the server where the network is not trusted. The actions are bounded by the embodiment's
limits before they leave, and the robot should bound them again (client.py).
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import os
import signal
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from aiohttp import WSCloseCode, WSMsgType, web

from lapa.runtime import setup
from lapa.schema import Embodiment, ServeConfig
from policies.serving.onnx_policy import OnnxPolicy, is_export
from policies.serving.protocol import PROTOCOL, VERSION, ProtocolError, pack, read_observation, unpack
from policies.serving.safety import SafetyLayer, SafetyLimits, SafetyStop

log = logging.getLogger(__name__)

MSGPACK, JSON = "application/msgpack", "application/json"
OPEN_PATHS = {"/healthz"}
MAX_CLIENTS_REMEMBERED = 1024
LATENCIES_KEPT = 1000
MAX_JSON_BYTES = 4_000_000  # its decoding blocks the server even in a thread, and makes an object of every number
LARGE_BYTES = 65_536  # a message of more is decoded and checked in a thread: going there and back costs 0.1 ms

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Policy(Protocol):
    """What the server needs of a policy; `ServedPolicy` is one."""

    type: str
    inputs: dict[str, tuple[int, ...]]
    action_shape: tuple[int, int]

    def infer(self, observation: dict[str, Any]) -> np.ndarray:
        """Actions (T, A) for a checked observation."""


def run(cfg: ServeConfig) -> dict:
    """Serve until SIGINT or SIGTERM; returns the counts.

    Raises:
        ValueError: for an address beyond this machine without a token, or limits that do not fit the policy.
    """
    compute = setup(cfg.runtime)
    token = read_token(cfg)
    policy: Policy
    if is_export(cfg.policy):
        policy = OnnxPolicy(cfg.policy, torch.get_num_threads())
    else:
        from policies.serving.served_policy import ServedPolicy

        policy = ServedPolicy(cfg.policy, compute.device)
    server = PolicyServer(policy, cfg, token)
    warm_up(policy)
    return asyncio.run(serve_until_signal(server, cfg))


def read_token(cfg: ServeConfig) -> str | None:
    """The token of the environment; ValueError where the address needs one and there is none."""
    token = os.environ.get(cfg.token_env) or None
    if token is not None and len(token) < 16:
        raise ValueError(
            f"the token in ${cfg.token_env} has {len(token)} characters, expected at least 16: openssl rand -hex 32"
        )
    if token is None and not is_loopback(cfg.host):
        raise ValueError(
            f"host={cfg.host} can be reached from other machines, and ${cfg.token_env} holds no token: "
            f"export {cfg.token_env}=$(openssl rand -hex 32), or serve on host=127.0.0.1"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether a host names this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def warm_up(policy: Policy) -> None:
    """One inference, so that the first request does not pay for what is set up on first use."""
    zeros = {
        name: np.zeros((*shape[1:], 3), np.uint8) if len(shape) == 3 else np.zeros(shape, np.float32)
        for name, shape in policy.inputs.items()
    }
    policy.infer({"task": "", **zeros})


def safety_limits(embodiment: Embodiment) -> SafetyLimits:
    """The limits of a configuration."""
    return SafetyLimits.from_dict({name: value for name, value in asdict(embodiment).items() if name != "name"})


class RateLimit:
    """A bucket of tokens a client address: `per_second` on average, bursts of twice as many."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic):
        self.per_second, self.clock = per_second, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, client: str) -> bool:
        """Whether a request of this client may pass now; it is counted."""
        if self.per_second <= 0:
            return True
        now, full = self.clock(), 2 * self.per_second
        tokens, then = self._buckets.pop(client, (full, now))
        tokens = min(full, tokens + (now - then) * self.per_second)
        self._buckets[client] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > MAX_CLIENTS_REMEMBERED:
            self._buckets.popitem(last=False)
        return tokens >= 1


class Metrics:
    """Counts since the start, and the latest latencies."""

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.num_clipped = 0

    def count(self, outcome: str) -> None:
        self.requests[outcome] = self.requests.get(outcome, 0) + 1

    def text(self) -> str:
        """Prometheus' text format."""
        lines = ["# TYPE lapa_requests_total counter"]
        lines += [f'lapa_requests_total{{outcome="{name}"}} {count}' for name, count in sorted(self.requests.items())]
        lines += ["# TYPE lapa_actions_clipped_total counter", f"lapa_actions_clipped_total {self.num_clipped}"]
        lines.append("# TYPE lapa_inference_seconds summary")
        if self.latencies_s:
            latencies = np.array(self.latencies_s)
            lines += [
                f'lapa_inference_seconds{{quantile="{share}"}} {np.quantile(latencies, share):.6f}'
                for share in (0.5, 0.9, 0.99)
            ]
        lines.append(f"lapa_inference_seconds_count {self.requests.get('ok', 0)}")
        return "\n".join(lines) + "\n"


class PolicyServer:
    """The web application around one policy.

    One inference at a time, in a thread of its own, so that health and refusals are answered meanwhile; large messages
    are decoded in another one.
    """

    def __init__(self, policy: Policy, cfg: ServeConfig, token: str | None) -> None:
        self.policy, self.cfg, self.token = policy, cfg, token
        self.limits = safety_limits(cfg.embodiment)
        if len(self.limits.action_low) != policy.action_shape[1]:
            raise ValueError(
                f"embodiment.action_low has {len(self.limits.action_low)} numbers, the policy's actions "
                f"{policy.action_shape[1]}: set embodiment.action_low and embodiment.action_high for this robot"
            )
        self.metrics = Metrics()
        self.rate_limit = RateLimit(cfg.max_requests_per_s)
        self.num_waiting = 0
        self.num_open = 0  # WebSockets, and bodies that are being read
        self.inference = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self.decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding")
        self.sockets: set[web.WebSocketResponse] = set()
        self.max_bytes = int(cfg.max_request_mb * 1e6)

    def application(self) -> web.Application:
        """The aiohttp application, with its routes and guards."""
        app = web.Application(client_max_size=self.max_bytes, middlewares=[self.guard])
        app.router.add_get("/", self.websocket)
        app.router.add_post("/act", self.act)
        app.router.add_get("/healthz", self.health)
        app.router.add_get("/metadata", self.show_metadata)
        app.router.add_get("/metrics", self.show_metrics)
        app.on_shutdown.append(self.close_sockets)
        app.on_cleanup.append(self.stop_threads)
        return app

    def metadata(self) -> dict[str, Any]:
        """What a client is told on connecting."""
        return {
            "protocol": PROTOCOL,
            "version": VERSION,
            "policy": self.policy.type,
            "inputs": {name: list(shape) for name, shape in self.policy.inputs.items()},
            "action_shape": list(self.policy.action_shape),
            "embodiment": self.cfg.embodiment.name,
            "limits": {
                name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.limits).items()
            },
        }

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Token, rate, and no requests by web pages; every outcome is counted."""
        try:
            refusal = self.refusal(request)
            if refusal is None and request.path not in OPEN_PATHS and not self.rate_limit.allows(request.remote or ""):
                refusal = 429, "rate", f"more than {self.cfg.max_requests_per_s:g} requests a second"
            if refusal is not None:
                status, code, message = refusal
                self.metrics.count(code)
                return error_response(status, code, message)
            return await handler(request)
        except ProtocolError as error:
            self.metrics.count(error.code)
            return error_response(400, error.code, str(error))
        except web.HTTPException as error:
            self.metrics.count(f"http_{error.status}")
            return error_response(error.status, "http", error.reason)
        except Exception:
            log.exception("a request failed")
            self.metrics.count("internal")
            return error_response(500, "internal", "the server failed; its log says how")

    def refusal(self, request: web.Request) -> tuple[int, str, str] | None:
        """Status, code and message where the request may not pass."""
        if request.path in OPEN_PATHS:
            return None
        # A page in a browser on this machine could reach the loopback address; a robot's client sends no Origin.
        if "Origin" in request.headers:
            return 403, "origin", "requests of web pages are refused"
        if self.token is None:
            # 0.0.0.0 is the name by which openpi's examples call this machine; no web page can have it.
            if not is_loopback(host_of(request)) and host_of(request) != "0.0.0.0":
                return 403, "host", "without a token only requests to this machine's own name are answered"
            return None
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        known = scheme.lower() in ("bearer", "api-key")
        if not known or not hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.token.encode()):
            return 401, "token", "the header `Authorization: Bearer <token>` is missing or wrong"
        return None

    async def infer(self, data: bytes, decode: Callable[[bytes], Any]) -> dict[str, Any]:
        """Bounded actions (T, A) and the time it took.

        Raises ProtocolError for a bad observation, for actions that are not finite, and where too many wait.
        """
        if self.num_waiting >= self.cfg.max_waiting:
            raise ProtocolError("busy", f"{self.num_waiting} requests are waiting already")
        self.num_waiting += 1
        loop = asyncio.get_running_loop()
        try:
            if len(data) > LARGE_BYTES:
                observation = await loop.run_in_executor(self.decoding, self.observation, data, decode)
            else:
                observation = self.observation(data, decode)
            started = time.perf_counter()
            actions_TA = await loop.run_in_executor(self.inference, self.policy.infer, observation)
        except ProtocolError:
            raise
        except Exception:
            log.exception("the policy failed")
            raise ProtocolError("policy", "the policy failed on this observation; the server's log says how") from None
        finally:
            self.num_waiting -= 1
        seconds = time.perf_counter() - started
        bounded_TA = self.bound(actions_TA)
        self.metrics.latencies_s.append(seconds)
        self.metrics.count("ok")
        return {"actions": bounded_TA, "server_timing": {"infer_ms": seconds * 1000}}

    def observation(self, data: bytes, decode: Callable[[bytes], Any]) -> dict[str, Any]:
        """What the policy is to see, decoded and checked."""
        return read_observation(decode(data), self.policy.inputs)

    def bound(self, actions_TA: np.ndarray) -> np.ndarray:
        """The chunk within the embodiment's limits; a chunk begins anywhere, so its first action is not slowed."""
        now_s = 0.0
        safety = SafetyLayer(self.limits, clock=lambda: now_s)
        bounded = []
        try:
            for action in np.asarray(actions_TA):
                bounded.append(safety.bound(action))
                now_s += 1 / self.limits.control_hz
        except SafetyStop as stop:
            raise ProtocolError("unsafe", f"no action: {stop.reason}") from None
        self.metrics.num_clipped += safety.counts.num_clipped + safety.counts.num_slowed
        return np.stack(bounded).astype(np.float32)

    async def act(self, request: web.Request) -> web.StreamResponse:
        """POST /act."""
        if self.num_open >= self.cfg.max_connections:
            raise ProtocolError("busy", f"{self.num_open} connections are open already")
        self.num_open += 1
        try:
            body = await request.read()
        finally:
            self.num_open -= 1
        if request.content_type == JSON:
            if len(body) > MAX_JSON_BYTES:
                raise ProtocolError("size", f"JSON of {len(body)} bytes, at most {MAX_JSON_BYTES}: send {MSGPACK}")
            reply = await self.infer(body, decode_json)
            return web.json_response({**reply, "actions": reply["actions"].tolist()})
        if request.content_type != MSGPACK:
            raise ProtocolError("content_type", f"expected Content-Type {MSGPACK} or {JSON}")
        return web.Response(body=pack(await self.infer(body, unpack)), content_type=MSGPACK)

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        """GET / as a WebSocket: metadata, then an answer to every observation."""
        if self.num_open >= self.cfg.max_connections:
            raise web.HTTPServiceUnavailable(reason="too many connections")
        socket = web.WebSocketResponse(max_msg_size=self.max_bytes, compress=False, heartbeat=20.0)
        if not socket.can_prepare(request).ok:
            raise web.HTTPUpgradeRequired(reason="connect with a WebSocket, or POST to /act")
        # Counted before anything is awaited, so that handshakes at once cannot pass together.
        self.num_open += 1
        try:
            await socket.prepare(request)
            self.sockets.add(socket)
            await socket.send_bytes(pack(self.metadata()))
            async for message in socket:
                if message.type != WSMsgType.BINARY:
                    break
                if not self.rate_limit.allows(request.remote or ""):
                    raise ProtocolError("rate", f"more than {self.cfg.max_requests_per_s:g} requests a second")
                await socket.send_bytes(pack(await self.infer(message.data, unpack)))
        except ProtocolError as error:
            self.metrics.count(error.code)
            # Text is how openpi's clients are told of a failure.
            with contextlib.suppress(ConnectionError):
                await socket.send_str(f"{error.code}: {error}")
                await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=error.code.encode())
        except ConnectionError:
            self.metrics.count("disconnected")
        finally:
            self.num_open -= 1
            self.sockets.discard(socket)
        return socket

    async def health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    async def show_metadata(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.metadata())

    async def show_metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=self.metrics.text(), content_type="text/plain")

    async def close_sockets(self, app: web.Application) -> None:
        """Tell every robot that the server goes away."""
        for socket in list(self.sockets):
            await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server stops")

    async def stop_threads(self, app: web.Application) -> None:
        for threads in (self.decoding, self.inference):
            threads.shutdown(wait=False, cancel_futures=True)


def decode_json(data: bytes) -> Any:
    """A message from JSON; ProtocolError for anything that is not one."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolError("malformed", "the body is no JSON") from None


def host_of(request: web.Request) -> str:
    """The host that a request names; empty where it names none that can be read."""
    try:
        return request.url.host or ""
    except ValueError:
        return ""


def error_response(status: int, code: str, message: str | None) -> web.Response:
    """A refusal, as JSON."""
    return web.json_response({"error": message, "code": code}, status=status)


async def serve_until_signal(server: PolicyServer, cfg: ServeConfig) -> dict:
    """Listen until SIGINT or SIGTERM, let requests at work finish, and return the counts."""
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=cfg.shutdown_s)
    await runner.setup()
    site = web.TCPSite(runner, cfg.host, cfg.port)
    await site.start()
    address = runner.addresses[0]
    print(f"serving {server.policy.type} on {address[0]}:{address[1]}; Ctrl-C stops", flush=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    await stop.wait()
    # A second Ctrl-C ends the process at once, where a policy hangs.
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(name)
    await runner.cleanup()
    return {f"num_{name}": count for name, count in sorted(server.metrics.requests.items())}
