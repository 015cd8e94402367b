"""The proxy against servers that answer by a script; real engines are in e2e/test_mooncake_demo."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from deployments.handoff_state import RetryPolicy
from serve_app.body_limits import BodyLimits
from serve_app.proxy import BODY_LIMITS, HEAD_TIMEOUT_S, Proxy, ProxyOptions
from tests.support.scripted_servers import (
    DONE,
    EVENTS,
    TICKET,
    Server,
    Step,
    completes,
    dead,
    dies_of,
    empty,
    events_of,
    hangs,
    new_ticket,
    says,
    streams,
    streams_for_ever,
    stumbles,
    ticket,
)
from tests.support.stand_in_proxy import StandInProxy
from transfer.discovery import StaticDiscovery
from transfer.types import PeerId, WorkerRecord

BROKEN = pytest.mark.parametrize(
    "broken", [says(503), dead, empty, streams()], ids=["503", "dead", "empty", "no event"]
)


@dataclass
class Setup:
    """A proxy and its servers."""

    url: str
    client: aiohttp.ClientSession
    prefill: list[Server]
    decode: list[Server]

    async def ask(
        self, path: str = "/v1/completions", headers: dict[str, str] | None = None, **body: Any
    ) -> tuple[int, str, aiohttp.ClientResponse]:
        async with self.client.post(
            self.url + path, json={"model": "m", "prompt": "Hi", **body}, headers=headers
        ) as response:
            return response.status, await response.text(), response

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.01)
        pytest.fail("the condition did not come true in 10 s")


@asynccontextmanager
async def setup(
    prefill: list[Step],
    decode: list[Step],
    *,
    api_key: str = "",
    discovered: bool = False,
    limits: BodyLimits = BODY_LIMITS,
    head_timeout_s: float = HEAD_TIMEOUT_S,
    allowed_origins: tuple[str, ...] = (),
) -> AsyncIterator[Setup]:
    servers = [Server(step) for step in (*prefill, *decode)]
    running: list[TestServer] = []
    for server in servers:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.answer)
        stand_in = TestServer(app)
        await stand_in.start_server()  # cancels handlers of clients that leave
        server.url = str(stand_in.make_url("")).rstrip("/")
        running.append(stand_in)
    ours, theirs = servers[: len(prefill)], servers[len(prefill) :]
    records = [
        WorkerRecord(
            PeerId(f"e{number}", 0),
            incarnation="i",
            role="kv_producer" if server in ours else "kv_consumer",
            tp_size=1,
            addresses=("tcp://127.0.0.1:9",),
            layout_hash="l",
            started_at_s=0.0,
            http_url=server.url,
        )
        for number, server in enumerate(servers)
    ]
    named = ([], []) if discovered else (ours, theirs)
    options = ProxyOptions(
        {
            "prefill": tuple(server.url for server in named[0]),
            "decode": tuple(server.url for server in named[1]),
        },
        StaticDiscovery(records) if discovered else None,
        api_key,
        RetryPolicy(attempts=3, backoff_s=0.0),
        limits,
        allowed_origins,
    )
    proxy = TestServer(Proxy(options).application())
    # Cancels handlers of clients that leave.
    await proxy.start_server(keepalive_timeout=head_timeout_s)
    try:
        async with aiohttp.ClientSession() as client:
            yield Setup(str(proxy.make_url("")).rstrip("/"), client, ours, theirs)
    finally:
        for stand_in in (proxy, *running):
            await stand_in.close()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


# ---- what goes through ---------------------------------------------------------------------------


def test_a_request_goes_through_prefill_and_decode() -> None:
    async def main() -> None:
        async with setup([ticket()], [says(id="cmpl-1", choices=[{"text": "é"}])]) as it:
            status, text, _ = await it.ask(
                n=2,
                max_tokens=1000,
                min_tokens=5,
                temperature=0,
                headers={
                    "Authorization": "Bearer k",
                    "X-Request-Id": "r1",
                    "Cookie": "c",
                    "X-Vllm-Priority": "-3",
                },
            )
            assert (status, json.loads(text)) == (200, {"id": "cmpl-1", "choices": [{"text": "é"}]})
            (asked,) = it.prefill[0].bodies
            name = asked.pop("request_id")
            assert asked == {
                "model": "m",
                "prompt": "Hi",
                "temperature": 0,
                "stream": False,
                "max_tokens": 1,
                "kv_transfer_params": {
                    "do_remote_decode": True,
                    "do_remote_prefill": False,
                    "readers": 2,
                },
            }
            (decoded,) = it.decode[0].bodies
            # Servers know the request by a name of the proxy's own.
            assert decoded.pop("request_id") == name != "r1"
            assert decoded == {
                "model": "m",
                "prompt": "Hi",
                "n": 2,
                "max_tokens": 1000,
                "min_tokens": 5,
                "temperature": 0,
                "kv_transfer_params": TICKET,
            }
            for server in (*it.prefill, *it.decode):
                assert server.paths == ["/v1/completions"]
                assert server.headers[0]["Authorization"] == "Bearer k"
                assert server.headers[0]["X-Vllm-Priority"] == "-3"
                assert "X-Request-Id" not in server.headers[0]
                assert "Cookie" not in server.headers[0]

    run(main())


def test_chat_is_clamped_by_both_names() -> None:
    async def main() -> None:
        async with setup([ticket()], [says(choices=[])]) as it:
            path = "/v1/chat/completions"
            assert (await it.ask(path, messages=[], max_completion_tokens=9))[0] == 200
            assert it.prefill[0].paths == it.decode[0].paths == [path]
            asked = it.prefill[0].bodies[0]
            assert (asked["max_tokens"], asked["max_completion_tokens"]) == (1, 1)

    run(main())


@pytest.mark.parametrize("name", ["mine", "n" * 600, 'a "quote"'])
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_has_the_clients_name_for_it(name: str, stream: bool) -> None:
    async def main() -> None:
        async with setup([ticket()], [completes]) as it:
            _, text, _ = await it.ask(stream=stream, headers={"X-Request-Id": name})
            assert json.dumps(f"cmpl-{name}") in text
            _, text, _ = await it.ask(stream=stream, request_id="in the body")
            assert '"cmpl-in the body"' in text
            assert len({body["request_id"] for body in it.decode[0].bodies}) == 2

    run(main())


@pytest.mark.parametrize("prompt", [["a", "b"], [[1, 2], [3]], ["same", "same"]])
@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_is_a_handoff_of_its_own(prompt: Any, stream: bool) -> None:
    async def main() -> None:
        async with setup([new_ticket], [completes]) as it:
            status, text, _ = await it.ask(prompt=prompt, stream=stream, n=2)
            assert status == 200
            checked, *asked = it.prefill[0].bodies
            assert it.prefill[0].paths[0] == "/v1/completions/render"
            assert checked["prompt"] == prompt
            assert sorted(body["prompt"] for body in asked) == sorted(prompt)
            decoded = it.decode[0].bodies
            assert sorted(body["prompt"] for body in decoded) == sorted(prompt)
            assert len({body["kv_transfer_params"]["handoff_id"] for body in decoded}) == 2
            assert len({body["request_id"] for body in decoded}) == 2
            choices = (
                [choice for event in events_of(text) for choice in event["choices"]]
                if stream
                else json.loads(text)["choices"]
            )
            assert sorted(choice["index"] for choice in choices) == [0, 1, 2, 3]
            assert {choice["index"]: choice["text"] for choice in choices} == {
                index: f"{prompt[index // 2]}" for index in range(4)
            }
            assert not stream or text.count(DONE) == 1

    run(main())


@pytest.mark.parametrize("n", ["2", 2.0])
@pytest.mark.parametrize("stream", [False, True])
def test_numbers_given_as_text_are_numbers_to_all(n: Any, stream: bool) -> None:
    async def main() -> None:
        async with setup([new_ticket], [completes]) as it:
            for prompt, indexes in ((["a", "b"], [0, 1, 2, 3]), ("a", [0, 1])):
                status, text, _ = await it.ask(prompt=prompt, n=n, stream=stream)
                assert status == 200
                parts = events_of(text) if stream else [json.loads(text)]
                choices = [choice for part in parts for choice in part["choices"]]
                assert sorted(choice["index"] for choice in choices) == indexes
            asked = [body for body in it.prefill[0].bodies if "kv_transfer_params" in body]
            assert {body["kv_transfer_params"]["readers"] for body in asked} == {2}

    run(main())


def test_a_stream_of_two_samples_is_whole_when_both_have_ended() -> None:
    one = 'data: {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}\n\n'

    async def main() -> None:
        async with setup([ticket()], [streams(one.encode(), DONE.encode())]) as it:
            _, text, _ = await it.ask(stream=True, n="2")
            assert '"code": 503' in text

    run(main())


def test_a_prompt_of_tokens_is_one_prompt_however_they_are_written() -> None:
    async def main() -> None:
        good = streams(*(part.encode() for part in (*EVENTS, DONE)))
        async with setup([ticket()], [good]) as it:
            status, text, _ = await it.ask(prompt=[1.0, 2.0], stream=True)
            assert (status, text) == (200, "".join((*EVENTS, DONE)))

    run(main())


def test_one_wrong_prompt_refuses_all_before_any_is_computed() -> None:
    bad = says(400, error={"message": "prompt 2 is too long"})

    async def main() -> None:
        async with setup([bad], [hangs]) as it:
            status, text, _ = await it.ask(prompt=["a", "b", "c"], stream=True)
            assert (status, json.loads(text)["error"]["message"]) == (400, "prompt 2 is too long")
            assert len(it.prefill[0].bodies) == 1
            assert it.decode[0].bodies == []

    run(main())


def test_proxies_of_the_environment_are_not_asked() -> None:
    async def main() -> None:
        with StandInProxy() as stand_in, pytest.MonkeyPatch.context() as patch:
            for name, value in stand_in.environment.items():
                patch.setenv(name, value)
            async with setup([ticket()], [says(id="cmpl-1", choices=[])]) as it:
                assert (await it.ask())[0] == 200
                async with it.client.get(f"{it.url}/health") as answer:
                    assert answer.status == 200
            assert stand_in.contacts == []

    run(main())


def test_events_stream_through_whole_however_they_are_cut() -> None:
    everything = ("".join(EVENTS) + DONE).encode()

    async def main() -> None:
        pieces = [everything[at : at + 7] for at in range(0, len(everything), 7)]
        async with setup([ticket()], [streams(*pieces)]) as it:
            status, text, response = await it.ask(stream=True)
            assert status == 200
            assert response.content_type == "text/event-stream"
            assert text == everything.decode()
            assert "stream_options" not in it.prefill[0].bodies[0]

    run(main())


@pytest.mark.parametrize("reply", [ticket(None), ticket({"remote_block_ids": [1]})])
def test_without_a_ticket_decode_computes_the_prompt(reply: Step) -> None:
    async def main() -> None:
        async with setup([reply], [says(choices=[])]) as it:
            assert (await it.ask())[0] == 200
            assert "kv_transfer_params" not in it.decode[0].bodies[0]

    run(main())


@pytest.mark.parametrize(
    "asked", [{"prompt_logprobs": 1}, {"prompt_embeds": "AAAA"}, {"prompt_embeds": ["AAAA"]}]
)
def test_what_prefill_cannot_serve_goes_to_decode_alone(asked: dict[str, Any]) -> None:
    async def main() -> None:
        async with setup([hangs], [says(choices=[])]) as it:
            assert (await it.ask(**asked))[0] == 200
            assert it.prefill[0].bodies == []

    run(main())


@pytest.mark.parametrize(
    ("headers", "sent"),
    [({}, "Bearer ours"), ({"Authorization": "Bearer theirs"}, "Bearer theirs")],
)
def test_our_key_is_for_those_who_bring_none(headers: dict[str, str], sent: str) -> None:
    async def main() -> None:
        async with setup([ticket()], [says(choices=[])], api_key="ours") as it:
            await it.ask(headers=headers)
            async with it.client.get(f"{it.url}/v1/models", headers=headers) as response:
                assert response.status == 200
            for server in (*it.prefill, *it.decode):
                assert {headers["Authorization"] for headers in server.headers} == {sent}

    run(main())


def test_servers_are_found_in_records() -> None:
    async def main() -> None:
        async with setup([ticket(), ticket()], [says(choices=[])], discovered=True) as it:
            for _ in range(20):
                assert (await it.ask())[0] == 200
            assert len(it.decode[0].bodies) == 20
            assert all(server.bodies for server in it.prefill)
            async with it.client.get(f"{it.url}/health") as response:
                assert await response.json() == {"status": "ok", "prefill": "ok", "decode": "ok"}

    run(main())


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
def test_errors_pass_through_as_they_were_given(status: int, side: str, stream: bool) -> None:
    bad = says(status, error={"message": "no", "param": "x"})

    async def main() -> None:
        # What prefill finds wrong with a body, decode is asked about, too.
        asked = side == "decode" or status in (400, 422)
        prefill = bad if side == "prefill" else ticket()
        async with setup([prefill], [bad if asked else hangs]) as it:
            got, text, response = await it.ask(stream=stream)
            assert (got, json.loads(text)) == (status, {"error": {"message": "no", "param": "x"}})
            assert response.headers["Retry-After"] == "7"
            assert sum(len(server.bodies) for server in it.decode) == asked

    run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 422])
def test_decode_decides_on_what_prefill_refuses(status: int, stream: bool) -> None:
    """A prefill server sees another body than the client's, and may be wrong about it."""
    good = streams(*(part.encode() for part in (*EVENTS, DONE))) if stream else says(choices=[])

    async def main() -> None:
        async with setup([says(status, error={"message": "no"})], [good]) as it:
            got, _, _ = await it.ask(stream=stream, top_k=3)
            assert got == 200
            (body,) = it.decode[0].bodies
            assert "kv_transfer_params" not in body
            assert {
                "model": "m",
                "prompt": "Hi",
                "stream": stream,
                "top_k": 3,
            }.items() <= body.items()

    run(main())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"truncate_prompt_tokens": -1, "max_tokens": 200}),
        ("/v1/completions", {"truncate_prompt_tokens": "-1", "max_tokens": 200}),
        ("/v1/completions", {"prompt_logprobs": 0}),
        ("/v1/completions", {"echo": True, "logprobs": 0}),
        ("/v1/chat/completions", {"truncate_prompt_tokens": -1, "messages": []}),
        ("/v1/chat/completions", {"echo": True, "messages": []}),
    ],
)
def test_what_prefill_would_compute_otherwise_goes_to_decode_alone(
    path: str, body: dict[str, Any]
) -> None:
    async def main() -> None:
        async with setup([hangs], [says(choices=[])]) as it:
            assert (await it.ask(path, **body))[0] == 200
            assert it.prefill[0].bodies == []

    run(main())


def test_an_error_of_decodes_own_passes_through() -> None:
    async def main() -> None:
        async with setup([ticket()], [stumbles]) as it:
            got, text, _ = await it.ask()
            assert (got, json.loads(text)) == (500, {"error": {"message": "engine"}})

    run(main())


def test_a_prompt_that_kills_servers_costs_two_and_nobody_else_is_refused() -> None:
    async def main() -> None:
        async with setup([dies_of("killer", ticket())] * 3, [says(choices=[])]) as it:
            for _ in range(3):
                status, text, _ = await it.ask(prompt="killer")
                assert (status, json.loads(text)["error"]["code"]) == (500, 500)
                assert (await it.ask(prompt="fine"))[0] == 200
            assert sum(server.is_dead for server in it.prefill) == 2
            assert [body["prompt"] for body in it.decode[0].bodies] == ["fine"] * 3

    run(main())


def test_a_server_that_came_back_unseen_can_die_again() -> None:
    async def main() -> None:
        async with setup([dies_of("killer", ticket())] * 2, [says(choices=[])]) as it:
            for prompt in ("killer", "killer of the next start"):
                status, text, _ = await it.ask(prompt=prompt)
                assert (status, json.loads(text)["error"]["code"]) == (500, 500)
                assert all(server.is_dead for server in it.prefill)
                for server in it.prefill:
                    server.is_dead = False
            assert it.decode[0].bodies == []

    run(main())


def test_a_suspect_is_no_risk_for_the_only_decode_server() -> None:
    async def main() -> None:
        async with setup([dies_of("killer", ticket())], [says(choices=[])]) as it:
            status, _, response = await it.ask(prompt="killer")
            assert (status, response.headers["Retry-After"]) == (503, "1")
            assert it.decode[0].bodies == []
            # Whoever comes afterwards is not suspected of what was before.
            assert (await it.ask(prompt="fine"))[0] == 200

    run(main())


@pytest.mark.parametrize("broken", [says(500), says(503), empty])
def test_broken_prefill_servers_cost_time_and_nothing_else(broken: Step) -> None:
    async def main() -> None:
        async with setup([broken, broken], [says(choices=[])] * 2) as it:
            assert (await it.ask())[0] == 200
            # A suspect's second server is asked first whether it is well.
            assert all(server.paths for server in it.prefill)
            assert max(len(server.bodies) for server in it.prefill) == 1

    run(main())


@pytest.mark.parametrize("stream", [False, True])
@BROKEN
def test_broken_decode_server_is_replaced(broken: Step, stream: bool) -> None:
    good = streams(*(part.encode() for part in (*EVENTS, DONE))) if stream else says(choices=[])

    async def main() -> None:
        async with setup([ticket()], [broken, good]) as it:
            for _ in range(64):  # servers are picked by chance
                status, text, _ = await it.ask(stream=stream)
                assert status == 200
                assert text == ("".join((*EVENTS, DONE)) if stream else '{"choices": []}')
                if it.decode[0].bodies:
                    break
            assert it.decode[0].bodies

    run(main())


@pytest.mark.parametrize("in_body", [False, True])
def test_a_name_of_a_client_is_in_the_log_on_one_line_and_short(
    in_body: bool, caplog: pytest.LogCaptureFixture
) -> None:
    name = "n" * 200 if not in_body else "n\n2026-01-01 WARNING forged " + "n" * 200
    given: dict[str, Any] = {"request_id": name} if in_body else {"headers": {"X-Request-Id": name}}

    async def main() -> None:
        async with setup([dead], [says(choices=[])]) as it:
            await it.ask(**given)

    with caplog.at_level("WARNING", logger="ray.serve"):
        run(main())
    lines = [record.getMessage() for record in caplog.records if "n'" in record.getMessage()]
    assert lines
    for line in lines:
        assert line.startswith("request 'n")
        assert "\n" not in line
        assert "n" * 101 not in line


@BROKEN
@pytest.mark.parametrize("stream", [False, True])
def test_never_an_empty_200(broken: Step, stream: bool) -> None:
    async def main() -> None:
        async with setup([ticket()], [broken]) as it:
            status, text, response = await it.ask(stream=stream)
            assert status == 503
            assert json.loads(text)["error"]["type"] == "server_error"
            assert response.headers["Retry-After"] == "1"

    run(main())


@pytest.mark.parametrize("cut", [True, False], ids=["connection breaks", "ends early"])
def test_a_stream_that_breaks_off_ends_with_an_error(cut: bool) -> None:
    async def main() -> None:
        async with setup([ticket()], [streams(EVENTS[0].encode(), cut=cut)]) as it:
            status, text, _ = await it.ask(stream=True)
            assert status == 200
            first, last, done, rest = text.split("\n\n")
            assert first + "\n\n" == EVENTS[0]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
            assert (done + "\n\n", rest) == (DONE, "")

    run(main())


def test_a_stream_that_is_only_done_was_never_answered() -> None:
    good = streams(*(part.encode() for part in (*EVENTS, DONE)))

    async def main() -> None:
        async with setup([ticket()], [streams(DONE.encode()), good]) as it:
            for _ in range(40):  # whichever is picked first
                status, text, _ = await it.ask(stream=True)
                assert (status, text) == (200, "".join((*EVENTS, DONE)))
            assert it.decode[0].bodies

    run(main())


ROLE = 'data: {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}\n\n'


@pytest.mark.parametrize(
    ("path", "events"),
    [("/v1/completions", [DONE]), ("/v1/chat/completions", [ROLE, DONE])],
    ids=["only done", "a chat's role and done"],
)
def test_what_servers_should_be_started_with_is_told_where_kv_did_not_load(
    path: str, events: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        broken = streams(*(event.encode() for event in events))
        async with setup([ticket()], [broken]) as it:
            status, text, _ = await it.ask(path, stream=True, messages=[])
            if ROLE not in events:
                assert status == 503
                return
            assert status == 200
            role, last, done, rest = text.split("\n\n")
            assert role + "\n\n" == ROLE
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
            assert (done + "\n\n", rest) == (DONE, "")

    with caplog.at_level("WARNING", logger="ray.serve"):
        run(main())
    assert "kv_load_failure_policy: recompute" in caplog.text


def test_a_stream_that_ends_without_a_reason_ends_with_an_error() -> None:
    async def main() -> None:
        async with setup([ticket()], [streams(EVENTS[0].encode(), DONE.encode())]) as it:
            status, text, _ = await it.ask(stream=True)
            assert status == 200
            first, last, done, rest = text.split("\n\n")
            assert first + "\n\n" == EVENTS[0]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
            assert (done + "\n\n", rest) == (DONE, "")

    run(main())


def test_health_says_which_side_is_missing() -> None:
    async def main() -> None:
        async with setup([says(503)], [says()]) as it:
            async with it.client.get(f"{it.url}/health") as response:
                assert response.status == 503
                state = await response.json()
            assert state["decode"] == "ok"
            assert state["prefill"] == f"{it.prefill[0].url} answered 503"
        async with setup([], [], discovered=True) as it:
            assert (await it.ask())[0] == 503
            async with it.client.get(f"{it.url}/v1/models") as response:
                assert response.status == 503

    run(main())


def test_a_list_of_models_is_no_sign_of_health() -> None:
    """Some servers give it long before their engine is up."""

    async def starting(server: Server, request: web.Request) -> web.StreamResponse:
        return await says(200 if request.path == "/v1/models" else 503)(server, request)

    async def main() -> None:
        async with setup([starting], [starting]) as it:
            async with it.client.get(f"{it.url}/v1/models") as response:
                assert response.status == 200
            async with it.client.get(f"{it.url}/health") as response:
                assert response.status == 503
                assert (await response.json())["decode"] == f"{it.decode[0].url} answered 503"
            assert [server.paths for server in it.prefill] == [["/health"]]

    run(main())


# ---- clients that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_client_that_leaves_ends_the_call(side: str) -> None:
    async def main() -> None:
        steps = ([hangs], [hangs]) if side == "prefill" else ([ticket()], [hangs])
        async with setup(*steps) as it:
            (server,) = getattr(it, side)
            asking = asyncio.ensure_future(it.ask())
            await it.until(lambda: server.working == 1)
            asking.cancel()
            await it.until(lambda: server.left == 1)
            assert sum(one.working for one in (*it.prefill, *it.decode)) == 0

    run(main())


def test_a_client_that_leaves_in_mid_stream_ends_the_call() -> None:
    async def main() -> None:
        async with setup([ticket()], [streams_for_ever]) as it:
            async with it.client.post(
                f"{it.url}/v1/completions", json={"prompt": "Hi", "stream": True}
            ) as response:
                await response.content.readany()
                assert it.decode[0].working == 1
            await it.until(lambda: it.decode[0].working == 0)

    run(main())


# ---- requests that no server sees ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"{", 400, "the body is not valid JSON"),
        (b"[" * 2000 + b"]" * 2000, 400, "the body is not valid JSON"),
        (b"[]", 400, "the body is not a JSON object"),
        (b'{"prompt": "x", "kv_transfer_params": {}}', 400, "kv_transfer_params: only Baton"),
        (
            b'{"vllm_xargs": {"kv_transfer_params": "x"}}',
            *(400, "vllm_xargs.kv_transfer_params: only Baton"),
        ),
        (b'{"prompt": "\\ud800"}', 400, "prompt: the character 0 is half of a surrogate pair"),
        (b'{"prompt": "x", "top_k": 1' + b"0" * 40 + b"}", 400, "top_k: it must be between"),
        (b'{"prompt": [' + b'"x",' * 1024 + b'"x"]}', 400, "prompt: 1025 prompts with 1 samples"),
        (b'{"request_id": "' + b"n" * 257 + b'"}', 400, "request_id: it must be a text of at"),
        (b'{"prompt": "x", "n": "16384"}', 400, "n: 1 prompts with 16384 samples"),
        (
            b'{"prompt": "x", "use_beam_search": true, "length_penalty": "-5000"}',
            *(400, "length_penalty: with use_beam_search it must be"),
        ),
        (b'{"prompt": "x", "temperature": NaN}', 400, "temperature: it must be a finite"),
        (b" " * (BODY_LIMITS.max_body_bytes + 1), 413, "the body is longer than 16777216"),
    ],
    ids=[
        *("no JSON", "too deep", "no object", "brings a ticket", "hides a ticket", "no text"),
        *("beyond the wire",),
        *(
            "too many prompts",
            "too long a name",
            "too many samples",
            "beyond beam search",
            "not finite",
            "too long",
        ),
    ],
)
def test_requests_that_cannot_be_meant(content: bytes, status: int, said: str) -> None:
    headers = {"Content-Type": "application/json"}

    async def main() -> None:
        async with setup([ticket()], [says()]) as it:
            async with it.client.post(
                f"{it.url}/v1/completions", data=io.BytesIO(content), headers=headers
            ) as response:
                assert response.status == status
                error = (await response.json())["error"]
            assert error["message"].startswith(said)
            assert (error["code"], error["type"]) == (status, "invalid_request_error")
            assert it.prefill[0].paths == it.decode[0].paths == []
            async with it.client.get(f"{it.url}/v1/else") as response:
                assert (response.status, response.content_type) == (404, "application/json")

    run(main())


@pytest.mark.parametrize("said", ["text/plain", "application/x-www-form-urlencoded"])
def test_what_is_not_said_to_be_json_is_not_read(said: str) -> None:
    async def main() -> None:
        async with setup([ticket()], [says()]) as it:
            status, text, _ = await it.ask(headers={"Content-Type": said})
            assert (status, json.loads(text)["error"]["param"]) == (400, "Content-Type")
            assert it.prefill[0].paths == it.decode[0].paths == []

    run(main())


def test_a_chat_of_too_many_samples_is_told_by_their_number() -> None:
    async def main() -> None:
        async with setup([ticket()], [says()]) as it:
            for prompt in ("x", ["x", "y"]):
                path = "/v1/chat/completions"
                status, text, _ = await it.ask(path, messages=[], prompt=prompt, n=2000)
                assert (status, json.loads(text)["error"]["param"]) == (400, "n")
            assert it.prefill[0].paths == it.decode[0].paths == []

    run(main())


def test_several_prompts_carry_no_more_than_a_body_has() -> None:
    limits = BodyLimits(max_body_bytes=3000, max_bytes_in_flight=3000, timeout_s=30.0)

    async def main() -> None:
        async with setup([new_ticket], [completes], limits=limits) as it:
            assert (await it.ask(prompt=["a", "b"], junk="j" * 1000))[0] == 200
            assert (await it.ask(prompt="a", junk="j" * 2000))[0] == 200
            asked = len(it.prefill[0].paths)
            status, text, _ = await it.ask(prompt=["a", "b", "c"], junk="j" * 1000)
            assert (status, json.loads(text)["error"]["param"]) == (400, "prompt")
            assert len(it.prefill[0].paths) == asked

    run(main())


# ---- slow and many bodies ------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_head_that_does_not_come_is_not_waited_for(asked_before: bool) -> None:
    async def main() -> None:
        async with setup([ticket()], [says()], head_timeout_s=0.5) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", URL(it.url).port)
            if asked_before:
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            async with asyncio.timeout(5):
                for part in (b"POST /v1/completions HTTP/1.1\r\n", b"Host: ", b"x", b"y"):
                    writer.write(part)
                    await asyncio.sleep(0.1)
                await reader.read()  # to its end
            writer.close()

    run(main())


def half_a_body() -> tuple[AsyncIterator[bytes], asyncio.Event]:
    """What a client sends that stops in the middle, and what makes it go on."""
    go_on = asyncio.Event()

    async def parts() -> AsyncIterator[bytes]:
        yield b'{"prompt": "x"' + b" " * 600
        await go_on.wait()
        yield b"}"

    return parts(), go_on


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def main() -> None:
        limits = BodyLimits(max_body_bytes=1000, max_bytes_in_flight=1000, timeout_s=0.2)
        async with setup([ticket()], [says()], limits=limits) as it:
            parts, go_on = half_a_body()
            async with it.client.post(
                f"{it.url}/v1/completions", data=parts, headers=JSON
            ) as response:
                assert response.status == 408
                assert (await response.json())["error"]["param"] == "body"
            go_on.set()
            assert it.prefill[0].paths == it.decode[0].paths == []

    run(main())


def test_bodies_in_flight_are_bounded() -> None:
    async def main() -> None:
        limits = BodyLimits(max_body_bytes=1000, max_bytes_in_flight=1000, timeout_s=30.0)
        async with setup([ticket()] * 3, [says()] * 3, limits=limits) as it:
            url = f"{it.url}/v1/completions"
            parts, go_on = half_a_body()
            first = asyncio.ensure_future(it.client.post(url, data=parts, headers=JSON))
            await asyncio.sleep(0.1)
            content = b'{"prompt": "x"}' + b" " * 600
            async with it.client.post(url, data=content, headers=JSON) as second:
                assert (second.status, second.headers["Retry-After"]) == (429, "1")
            go_on.set()
            async with await first as answered:
                assert answered.status == 200
            async with it.client.post(url, data=content, headers=JSON) as third:
                assert third.status == 200

    run(main())


# ---- pages in browsers ---------------------------------------------------------------------------

PAGE = {"Origin": "https://chat.example.com"}
PREFLIGHT = {
    **PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.mark.parametrize(
    ("allowed", "told"),
    [
        (("*",), "*"),
        (("https://chat.example.com",), "https://chat.example.com"),
        (("https://other.example.com",), None),
        ((), None),
    ],
)
def test_only_pages_of_allowed_origins_may(allowed: tuple[str, ...], told: str | None) -> None:
    async def main() -> None:
        good = streams(*(part.encode() for part in (*EVENTS, DONE)))
        async with setup([ticket()], [good], allowed_origins=allowed) as it:
            url = f"{it.url}/v1/completions"
            async with it.client.options(url, headers=PREFLIGHT) as preflight:
                assert preflight.status == (400 if told is None else 200)
                assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
            answers = [preflight]
            for body, status in (({"stream": True}, 200), ({"n": 2000}, 400)):
                got, _, answer = await it.ask(headers=PAGE, **body)
                assert got == status
                answers.append(answer)
            async with it.client.get(f"{it.url}/v1/else", headers=PAGE) as missing:
                assert missing.status == 404
            for one in (*answers, missing):
                assert one.headers.get("Access-Control-Allow-Origin") == told
            async with it.client.options(url) as bare:  # no preflight
                assert bare.status == 405

    run(main())
