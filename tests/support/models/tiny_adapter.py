"""Random LoRA adapters of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path


def make_tiny_adapter(folder: Path, seed: int, *, alpha: int = 16) -> Path:
    """Writes a LoRA of rank 8 for queries, keys, values and outputs of the tiny model.

    Strong enough that greedy texts with different seeds differ; the same bytes for the same seed.

    Returns:
        ``folder``, which is made.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    widths = {"q_proj": (64, 128), "k_proj": (64, 64), "v_proj": (64, 64), "o_proj": (128, 64)}
    weights = {}
    for layer in range(2):
        for name, (inputs, outputs) in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (8, inputs)), ("lora_B", (outputs, 8))):
                weights[f"{prefix}.{part}.weight"] = torch.randn(shape, generator=generator) / 8
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": f"made-at-{folder}",
        "r": 8,
        "lora_alpha": alpha,
        "target_modules": sorted(widths),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
