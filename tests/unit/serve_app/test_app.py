"""What of the settings reaches the engines."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.app import llm_config
from serve_app.config import parse_settings

# The application is imported here, and with it vLLM.
pytestmark = pytest.mark.timeout(90)

GPU = {"resources": {"gpus_per_worker": 1}}
STEP = "max_num_batched_tokens"


def steps(**args: Any) -> tuple[Any, Any]:
    """Tokens in a step of prefill and of decode at most; None: as vLLM does."""
    settings = parse_settings(
        {"model": {"id": "m", "source": "m"}, "discovery": {"kind": "static"}, **args}
    )
    prefill, decode = (llm_config(settings, role).engine_kwargs for role in ("prefill", "decode"))
    return prefill.get(STEP), decode.get(STEP)


@pytest.mark.parametrize(
    ("args", "decode"),
    [
        ({}, 256),
        ({"decode": {"tensor_parallel_size": 2}}, 512),
        ({"decode": {"engine": {STEP: 2048}}}, 2048),
        # vLLM refuses the combination.
        ({"engine": {"max_num_seqs": 300}}, 300),
        ({"engine": {"max_num_seqs": 30}}, 256),
        ({"engine": {"enable_chunked_prefill": False}}, None),
        ({"prefill": GPU, "decode": GPU}, None),
    ],
)
def test_decode_on_cpu_takes_short_steps_and_prefill_long_ones(
    args: dict[str, Any], decode: int | None
) -> None:
    assert steps(**args) == (None, decode)


def test_steps_of_both_engines_can_be_set() -> None:
    assert steps(engine={STEP: 300}) == (300, 300)
