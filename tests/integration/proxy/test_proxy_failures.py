"""What the proxy does when servers fail and clients leave; servers answer by a script."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from tests.support.scripted.servers import (
    DONE,
    EVENTS,
    Server,
    Step,
    dead,
    dies_of,
    empty,
    hangs,
    says,
    streams,
    streams_for_ever,
    stumbles,
    ticket,
)
from tests.support.servers.proxy_setup import run, setup

BROKEN = pytest.mark.parametrize(
    "broken", [says(503), dead, empty, streams()], ids=["503", "dead", "empty", "no event"]
)


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
