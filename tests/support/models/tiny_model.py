"""A tiny random Llama for tests that need an engine but no English."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES: Final = (
    *(("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "t"), ("Ġ", "a"), ("Ġ", "s"), ("o", "n")),
    *(("i", "n"), ("in", "g"), ("a", "n"), ("an", "d"), ("e", "r"), ("o", "u"), ("r", "e")),
)
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MAX_TOKENS: Final = 8192


def make_tiny_model(folder: Path, seed: int = 0, kv_heads: int = 2) -> Path:
    """Writes a Llama of 2 layers (64 wide, 4 heads of size 32) and its tokenizer.

    A Hugging Face folder in float32, the same bytes for the same seed. The weights are spread
    widely enough that greedy decoding wanders through the vocabulary instead of repeating one
    token, so that comparing two engines' texts means something. ``<|im_end|>`` ends a text.

    Returns:
        ``folder``, which is made if needed.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokens = _write_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,  # vLLM's attention on CPU wants a multiple of 32
        max_position_embeddings=_MAX_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL_TOKENS.index("<|im_start|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                spread = 2 / weight.shape[1] ** 0.5
                weight.normal_(0.0, spread, generator=generator)
        # Readable text that seldom ends of itself: only printable ASCII gets large logits.
        for token_id, token in enumerate(tokens):
            if token_id < len(SPECIAL_TOKENS) or not token.replace("Ġ", " ").isascii():
                model.lm_head.weight[token_id].mul_(0.1)
    model.save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path) -> list[str]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [left + right for left, right in _MERGES]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": _MAX_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokens
