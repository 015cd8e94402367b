"""Gathers the Prometheus metrics that Ray's agents export, one per node, into one text."""

from __future__ import annotations

import asyncio
import logging
import re

import aiohttp
import ray

from transfer.addressing import host_and_port

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines

TIMEOUT_S = 5.0
SCRAPE_KEPT_S = 1.0
"""How long a scrape is given out; agents export anew about as often."""
_WANTED = re.compile(r"(# (HELP|TYPE) )?ray_(baton|vllm|serve)_")


async def scrape() -> str:
    """Metrics of Baton, vLLM and Serve from all nodes that are alive.

    A node that does not answer within :data:`TIMEOUT_S` is left out and logged.
    """
    nodes = await asyncio.to_thread(ray.nodes)
    addresses = [
        (node["NodeManagerAddress"], node["MetricsExportPort"]) for node in nodes if node["Alive"]
    ]
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        texts = await asyncio.gather(*(_fetch(session, host, port) for host, port in addresses))
    return merge(texts)


def merge(texts: list[str]) -> str:
    """One exposition of several: each HELP and TYPE line once, before its samples."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if not _WANTED.match(line):
                continue
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
                known = heads.setdefault(name, [])
                if line not in known:
                    known.append(line)
            else:
                samples.setdefault(name, []).append(line)
    lines = [line for name, values in samples.items() for line in (*heads.get(name, []), *values)]
    return "\n".join(lines) + "\n" if lines else ""


async def _fetch(session: aiohttp.ClientSession, host: str, port: int) -> str:
    try:
        async with session.get(f"http://{host_and_port(host, port)}/metrics") as response:
            return await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError) as error:
        logger.warning("metrics of %s are missing: %s", host_and_port(host, port), error)
        return ""
