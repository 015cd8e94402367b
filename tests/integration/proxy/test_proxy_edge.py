"""What the proxy answers itself, so that no server sees it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator

import pytest
from yarl import URL

from serve_app.edge.body_limits import BodyLimits
from serve_app.proxy.endpoint import BODY_LIMITS
from tests.support.scripted.servers import (
    DONE,
    EVENTS,
    completes,
    new_ticket,
    says,
    streams,
    ticket,
)
from tests.support.servers.proxy_setup import run, setup

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
