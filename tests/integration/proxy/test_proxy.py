"""The proxy against servers that answer by a script; real engines are in e2e/test_mooncake_demo."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.network.stand_in_proxy import StandInProxy
from tests.support.scripted.servers import (
    DONE,
    EVENTS,
    TICKET,
    Step,
    completes,
    events_of,
    hangs,
    new_ticket,
    says,
    streams,
    ticket,
)
from tests.support.servers.proxy_setup import run, setup


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
