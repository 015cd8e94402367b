"""What one colocated vLLM engine answers: the truth that a hand-off is compared with.

Run as a program, so that the engine's memory is gone when it is done::

    python -m tests.support.load.reference MODEL REQUESTS.json ANSWERS.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.servers.vllm_server import CPU_ENV

ROOT = Path(__file__).resolve().parents[3]


def reference_texts(
    model: str,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    max_model_len: int,
    folder: Path,
    timeout_s: float = 600.0,
) -> list[str]:
    """Greedy float32 answers of one engine, one prompt at a time.

    Args:
        prompts: token ids.
        max_tokens: of each answer.
        folder: for the files that carry requests and answers.
    """
    requests, answers = folder / "requests.json", folder / "answers.json"
    requests.write_text(
        json.dumps({"prompts": prompts, "max_tokens": max_tokens, "max_model_len": max_model_len})
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.load.reference", model, str(requests), str(answers)],
        cwd=ROOT,
        env={**os.environ, **CPU_ENV},
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the reference engine failed:\n{done.stderr.decode()[-4000:]}")
    return list(json.loads(answers.read_text()))


def main(model: str, requests: str, answers: str) -> None:
    """Computes the answers; see :func:`reference_texts`."""
    from vllm import LLM, SamplingParams

    job: dict[str, Any] = json.loads(Path(requests).read_text())
    engine = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=job["max_model_len"],
        block_size=32,
        max_num_seqs=1,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=512 << 20,
        distributed_executor_backend="uni",
    )
    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]], params, use_tqdm=False
    )
    Path(answers).write_text(json.dumps([output.outputs[0].text for output in outputs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
