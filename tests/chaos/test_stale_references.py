"""The five ways in which a stale reference could read another prompt's KV, with real engines.

Blocks freed and used again before the read, during it, and after it before use; the owner started
anew at the same address; a ticket that is forged or shown twice. Each time the answer must be the
one of a single engine, the blocks recomputed, and the outcome counted.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.chaos.run import Row
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.vllm_server import VllmServer, free_port, post
from tests.support.transfers.fault_points import FaultPoints

pytestmark = pytest.mark.timeout(300)

BLOCK = 32
OWNER_BLOCKS = 40
"""So few that other prompts soon get the blocks of one that was let go of."""
BLOCK_BYTES = 32 << 10
PROMPT_TOKENS = 8 * BLOCK + 5
ENGINE_ID = "the-owner"
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Pair:
    """An owner and a reader in processes of their own, and a reader that can be held."""

    transport: str
    prefill: VllmServer
    decode: VllmServer
    points: FaultPoints
    results: Path
    restart: Callable[[], VllmServer]
    another_reader: Callable[[], VllmServer]

    def ticket(self, prompt: list[int]) -> dict[str, Any]:
        answer = self.prefill.complete(prompt, max_tokens=1, kv_transfer_params=PREFILL)
        return dict(answer["kv_transfer_params"])

    def alone(self, prompt: list[int]) -> str:
        """The answer of one engine: without a ticket, and with nothing cached."""
        answer = self.decode.complete(prompt, cache_salt=f"alone-{time.monotonic_ns()}")
        return str(answer["choices"][0]["text"])

    def outcomes(self) -> dict[str, float]:
        """The reader's counts so far."""
        counts = {
            outcome: self.decode.metric("baton:handoffs_total", side="reader", outcome=outcome)
            for outcome in ("ok", "refused", "failed")
        }
        counts["recomputed"] = self.decode.metric("baton:recomputed_tokens_total")
        return counts

    def pinned(self) -> float:
        return self.prefill.metric("baton:pinned_blocks")

    def let_go(self, ticket: dict[str, Any]) -> None:
        """The owner gives the blocks up, as for a router that says so."""
        body = {"method": "baton_abort", "args": [[ticket["handoff_id"]]]}
        post(f"{self.prefill.url}/collective_rpc", body)

    def use_again(self, ticket: dict[str, Any]) -> None:
        """Compute other prompts until every block of the ticket holds one of them."""
        stale, used = set(ticket["remote_block_ids"]), set()
        for salt in range(1000, 1010):
            other = self.ticket(_prompt(salt))
            used |= set(other["remote_block_ids"])
            self.let_go(other)
            if stale <= used:
                return
        pytest.fail(f"blocks {stale - used} were not used again")


@pytest.fixture(scope="module", params=["tcp", "shm"])
def pair(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    results: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("stale")
    points = FaultPoints(folder / "faults")
    port = free_port()
    with EtcdServer() as etcd:

        def server(role: str, port: int, *arguments: str) -> VllmServer:
            config = {
                "kv_connector": "BatonConnector",
                "kv_connector_module_path": "transfer.connector",
                "kv_role": role,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "discovery": {"kind": "etcd", "endpoints": [etcd.endpoint]},
                    "transfer": {
                        "transports": [request.param],
                        "port": port,
                        "ticket_ttl_s": 120.0,
                        "read_deadline_s": 90.0,
                    },
                },
            }
            if role == "kv_producer":
                config["engine_id"] = ENGINE_ID
            return VllmServer(
                tiny_model,
                [
                    *("--dtype", "float32", "--max-model-len", "1024"),
                    *("--block-size", str(BLOCK), "--kv-transfer-config", json.dumps(config)),
                    *("--worker-extension-cls", "transfer.connector.control.WorkerControl"),
                    *arguments,
                ],
                folder / f"{role}-{time.monotonic_ns()}.log",
                {"BATON_FAULTS": str(points.folder)},
            )

        def owner() -> VllmServer:
            memory = str(OWNER_BLOCKS * BLOCK_BYTES)
            return server("kv_producer", port, "--kv-cache-memory-bytes", memory)

        prefill, decode = owner(), server("kv_consumer", 0)
        made = [prefill, decode]

        def restart() -> VllmServer:
            running.prefill.kill()
            running.prefill = owner()
            made.append(running.prefill)
            running.prefill.start()
            running.prefill.wait()
            return running.prefill

        def another_reader() -> VllmServer:
            another = server("kv_consumer", 0)
            made.append(another)
            another.start()
            another.wait()
            return another

        try:
            for one in made:
                one.start()
            for one in made:
                one.wait()
            running = Pair(request.param, prefill, decode, points, results, restart, another_reader)
            yield running
        finally:
            points.clear()
            for one in made:
                one.kill()


def _prompt(salt: int) -> list[int]:
    return random.Random(salt).choices(range(3, 200), k=PROMPT_TOKENS)


def _answered_through(
    pair: Pair, what: str, salt: int, point: str, meddle: Callable[[dict[str, Any]], None]
) -> dict[str, float]:
    """Decode a prompt, do something while its read is held at ``point``; what was counted."""
    prompt = _prompt(salt)
    expected = pair.alone(prompt)
    ticket = pair.ticket(prompt)
    before = pair.outcomes()
    armed = pair.points.arm(point)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(pair.decode.complete, prompt, kv_transfer_params=ticket)
        try:
            armed.wait()
            meddle(ticket)
        finally:
            armed.release()
        _right(pair, what, [answer.result(60)], expected, before)
    now = pair.outcomes()
    return {name: now[name] - before[name] for name in now if now[name] != before[name]}


def _right(
    pair: Pair, what: str, answers: list[dict[str, Any]], expected: str, before: dict[str, float]
) -> None:
    """Answers are right and nothing stays pinned: a row of the table."""
    ok = sum(answer["choices"][0]["text"] == expected for answer in answers)
    row = Row("stale ticket", f"{what} ({pair.transport})", requests=len(answers), ok=ok)
    row.wrong = len(answers) - ok
    row.degraded = int(pair.outcomes()["recomputed"] > before["recomputed"])
    deadline = time.monotonic() + 15
    while (pinned := int(pair.pinned())) and time.monotonic() < deadline:
        time.sleep(0.02)
    row.leaked = pinned
    row.save(pair.results)
    assert (row.wrong, row.leaked) == (0, 0), row


RECOMPUTED = {"refused": 1.0, "recomputed": PROMPT_TOKENS - 1.0}


def test_blocks_used_again_before_the_read(pair: Pair) -> None:
    def meddle(ticket: dict[str, Any]) -> None:
        pair.let_go(ticket)
        pair.use_again(ticket)

    assert (
        _answered_through(pair, "blocks used again before the read", 1, "reader.connecting", meddle)
        == RECOMPUTED
    )


@pytest.mark.parametrize("pair", ["shm"], indirect=True)
def test_blocks_used_again_during_a_one_sided_read(pair: Pair) -> None:
    """Nobody can stop such a read: it copies another prompt, and is not confirmed."""

    def meddle(ticket: dict[str, Any]) -> None:
        pair.let_go(ticket)
        pair.use_again(ticket)

    assert (
        _answered_through(pair, "blocks used again during the read", 2, "reader.reading", meddle)
        == RECOMPUTED
    )


@pytest.mark.parametrize("pair", ["tcp"], indirect=True)
def test_blocks_are_not_used_again_while_the_owner_sends_them(pair: Pair) -> None:
    def meddle(ticket: dict[str, Any]) -> None:
        pair.let_go(ticket)
        for salt in range(2000, 2006):
            other = pair.ticket(_prompt(salt))
            assert not set(other["remote_block_ids"]) & set(ticket["remote_block_ids"])
            pair.let_go(other)

    assert (
        _answered_through(pair, "given up during the read", 3, "owner.sending", meddle)
        == RECOMPUTED
    )


def test_blocks_used_again_after_the_read_and_before_use(pair: Pair) -> None:
    def meddle(ticket: dict[str, Any]) -> None:
        pair.let_go(ticket)
        pair.use_again(ticket)

    assert (
        _answered_through(pair, "blocks used again after the read", 4, "reader.confirming", meddle)
        == RECOMPUTED
    )


def test_blocks_used_again_after_the_confirmation(pair: Pair) -> None:
    """From then on the bytes are the reader's own."""
    counted = _answered_through(
        pair, "blocks used again after the confirmation", 5, "reader.confirmed", pair.use_again
    )
    assert counted == {"ok": 1.0}


def test_a_ticket_shown_twice(pair: Pair) -> None:
    prompt = _prompt(6)
    ticket = pair.ticket(prompt)
    first = pair.decode.complete(prompt, kv_transfer_params=ticket)
    post(f"{pair.decode.url}/reset_prefix_cache", {})
    pair.use_again(ticket)
    before = pair.outcomes()
    again = pair.decode.complete(prompt, kv_transfer_params=ticket)
    _right(pair, "shown twice", [again], first["choices"][0]["text"], before)
    assert pair.outcomes()["refused"] == before["refused"] + 1


def test_a_ticket_of_one_prompt_forged_to_read_the_blocks_of_another(pair: Pair) -> None:
    """Right credentials, right prompt, blocks that are pinned, too, but for somebody else."""
    mine, other = _prompt(7), _prompt(8)
    expected = pair.alone(mine)
    ticket, foreign = pair.ticket(mine), pair.ticket(other)
    before = pair.outcomes()
    forged = {**ticket, "remote_block_ids": foreign["remote_block_ids"]}
    answer = pair.decode.complete(mine, kv_transfer_params=forged)
    assert pair.outcomes()["refused"] == before["refused"] + 1
    pair.let_go(ticket)
    pair.let_go(foreign)
    _right(pair, "forged for other blocks", [answer], expected, before)


def test_a_ticket_given_to_two_readers_at_once(pair: Pair) -> None:
    """As by a router that took the first one for lost: one gets the blocks, the other computes."""
    prompt = _prompt(30)
    expected = pair.alone(prompt)
    ticket, before, another = pair.ticket(prompt), pair.outcomes(), pair.another_reader()
    armed = pair.points.arm("reader.confirming")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(pair.decode.complete, prompt, kv_transfer_params=ticket)
        try:
            armed.wait()
            second = another.complete(prompt, kv_transfer_params=ticket)
        finally:
            armed.release()
        _right(pair, "at two readers at once", [first.result(60), second], expected, before)
    assert another.metric("baton:handoffs_total", side="reader", outcome="ok") == 1
    now = pair.outcomes()
    assert (now["ok"], now["refused"]) == (before["ok"], before["refused"] + 1)


@pytest.mark.parametrize(
    ("salt", "point", "when"),
    [(9, "reader.connecting", "before"), (10, "reader.confirming", "after")],
)
def test_the_owner_started_anew_at_the_same_address(
    pair: Pair, salt: int, point: str, when: str
) -> None:
    """Same engine_id, same port, same blocks: only the incarnation tells the two apart."""

    def meddle(ticket: dict[str, Any]) -> None:
        pair.restart()
        pair.use_again(ticket)

    what = f"owner started anew {when} the read"
    counted = _answered_through(pair, what, salt, point, meddle)
    assert counted.get("ok") is None
    # Refused by the new start, or failed at once when discovery told of it.
    assert counted.get("refused", 0) + counted.get("failed", 0) == 1
    assert counted["recomputed"] == PROMPT_TOKENS - 1
    after = _prompt(salt + 10)
    expected = pair.alone(after)
    answer = pair.decode.complete(after, kv_transfer_params=pair.ticket(after))
    assert answer["choices"][0]["text"] == expected
