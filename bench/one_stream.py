"""One stream at a time: Baton's demo beside one plain vLLM server bound to one core.

Prints and writes Markdown: what all processes of the demo take when idle, then for several prompt
lengths the time to the first token and the gap between tokens of both, interleaved round by round::

    python -m bench.one_stream --out docs/benchmarks/one_stream.md
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.http_server import HttpServer
from serve_app.launch.demo_model import resolve_model
from serve_app.launch.surroundings import free_ports

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"
WORDS = (50, 500, 1000)
TOKENS = 64
IDLE_S = 30.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@dataclass
class Timings:
    """Milliseconds, one entry per request."""

    first_token: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)


def main() -> None:
    """Runs the benchmark and writes its report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options.rounds, Path(folder))
    print(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report)


def run(rounds: int, folder: Path) -> str:
    """Starts both, measures, returns the report."""
    app_port, plain_port = free_ports(2)
    timings: dict[tuple[str, int], Timings] = {}
    with baton(app_port, folder / "up.log") as app:
        time.sleep(15)  # past the start
        idle = idle_shares(app.pid, IDLE_S)
        with plain_vllm(plain_port, folder / "plain.log") as plain:
            last_cpu = (os.cpu_count() or 1) - 1
            psutil.Process(plain.pid).cpu_affinity([last_cpu])
            for child in psutil.Process(plain.pid).children(recursive=True):
                for thread in child.threads():
                    os.sched_setaffinity(thread.id, [last_cpu])
            servers = {"baton": app_port, "plain": plain_port}
            for port in servers.values():
                ask(port, prompt(50, 0), TOKENS)
            for number in range(1, rounds + 1):
                for words in WORDS:
                    for server, port in servers.items():
                        # Both get the same text, and nobody has seen it before.
                        first, gap = ask(port, prompt(words, number), TOKENS)
                        entry = timings.setdefault((server, words), Timings())
                        entry.first_token.append(first)
                        entry.gap.append(gap)
    return render(rounds, idle, timings)


def baton(port: int, log: Path) -> HttpServer:
    """The demo, as ``baton up`` starts it."""
    command = [sys.executable, "-m", "serve_app.cli", "up", str(ROOT / "config.yaml")]
    return HttpServer([*command, "--port", str(port)], port, log, OFFLINE)


def plain_vllm(port: int, log: Path) -> HttpServer:
    """One stock vLLM server of the same model, with the demo's engine arguments."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", resolve_model("baton-demo"), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", "4096", "--block-size", "32"),
        *("--enforce-eager", "--kv-cache-memory-bytes", str(512 << 20)),
        *("--distributed-executor-backend", "uni"),
    ]
    environment = {
        **OFFLINE,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    return HttpServer(command, port, log, environment)


def prompt(words: int, salt: int) -> str:
    """English words in random order; the same for the same arguments."""
    vocabulary = (ROOT / "LICENSE").read_text().split()
    return " ".join(random.Random(1000 * salt + words).choices(vocabulary, k=words))


def ask(port: int, text: str, tokens: int) -> tuple[float, float]:
    """Milliseconds to the first token, and the median gap between the further ones."""
    body = {
        "model": MODEL,
        "prompt": text,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        start = time.perf_counter()
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        arrivals = [time.perf_counter() for line in response if line.startswith(b"data: {")]
    finally:
        connection.close()
    if len(arrivals) < 2:
        raise RuntimeError(f"port {port} gave {len(arrivals)} events, status {response.status}")
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return 1e3 * (arrivals[0] - start), 1e3 * statistics.median(gaps)


def idle_shares(launcher: int, seconds: float) -> dict[str, float]:
    """Percent of one core that every process below ``launcher`` takes, by name."""
    root = psutil.Process(launcher)

    def used() -> dict[int, tuple[str, float]]:
        found = {}
        for process in [root, *root.children(recursive=True)]:
            try:
                cpu = process.cpu_times()
                command = " ".join(process.cmdline()[:2]) or process.name()
            except psutil.NoSuchProcess:
                continue
            found[process.pid] = (command, cpu.user + cpu.system)
        return found

    before, start = used(), time.monotonic()
    time.sleep(seconds)
    after, passed = used(), time.monotonic() - start
    shares: dict[str, float] = {}
    for pid, (command, cpu) in after.items():
        name = Path(command.split(" ")[0]).name if command.startswith("/") else command
        share = 100 * (cpu - before.get(pid, (command, cpu))[1]) / passed
        shares[name] = shares.get(name, 0.0) + share
    return shares


def render(rounds: int, idle: dict[str, float], timings: dict[tuple[str, int], Timings]) -> str:
    """The report in Markdown."""
    total = sum(idle.values())
    lines = [
        "# One stream at a time",
        "",
        (
            f"`python -m bench.one_stream`, {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.2f}, medians of {rounds} interleaved rounds, "
            f"{TOKENS} tokens each, SmolLM2-135M in bfloat16."
        ),
        "",
        (
            f"Idle for {IDLE_S:.0f} s, all processes of the demo, Ray's included, take "
            f"**{total:.1f} %** of one core:"
        ),
        "",
        "| process | % of a core |",
        "| --- | --- |",
        *(
            f"| `{name}` | {share:.1f} |"
            for name, share in sorted(idle.items(), key=lambda item: -item[1])
            if share >= 0.1
        ),
        "",
        "The plain server is one `vllm.entrypoints.openai.api_server` bound to one core.",
        "",
        (
            "| prompt, words | first token, plain | first token, Baton | ratio | gap, plain | gap, "
            "Baton | ratio |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for words in WORDS:
        plain, baton = timings["plain", words], timings["baton", words]
        first = statistics.median(plain.first_token), statistics.median(baton.first_token)
        gap = statistics.median(plain.gap), statistics.median(baton.gap)
        lines.append(
            f"| {words} | {first[0]:.0f} ms | {first[1]:.0f} ms | {first[1] / first[0]:.2f} | "
            f"{gap[0]:.1f} ms | {gap[1]:.1f} ms | {gap[1] / gap[0]:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
