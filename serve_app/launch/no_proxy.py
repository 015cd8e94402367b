"""Keeps connections inside the system from proxies that the environment names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def without_proxy(
    environment: Mapping[str, str], hosts: Sequence[str] = LOOPBACK
) -> dict[str, str]:
    """An environment in which connections to ``hosts`` are made directly.

    For programs that are not ours and heed such variables even for loopback: Ray's exporter of
    metrics does, through gRPC, and ``/metrics`` stays empty. To other hosts a proxy is still used.
    """
    # The lower-case name is the one that all read, and it wins where both are read.
    said = environment.get("no_proxy") or environment.get("NO_PROXY", "")
    changed = {**environment, "no_proxy": _joined(said, hosts)}
    if "no_grpc_proxy" in environment:  # even if empty, gRPC then asks for no other
        changed["no_grpc_proxy"] = _joined(environment["no_grpc_proxy"], hosts)
    return changed


def _joined(said: str, hosts: Sequence[str]) -> str:
    known = [host.strip() for host in said.split(",") if host.strip()]
    return ",".join(dict.fromkeys([*known, *hosts]))
