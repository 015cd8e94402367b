"""vLLM's KV tensors, as layouts describe them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from transfer.connector.kv.layout import LayerView
from transfer.connector.kv.packing import Packing, cpu_packing, token_major
from transfer.errors import ConfigurationError, Phase

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

_CPU_BACKEND = "CPU_ATTN"


def distinct(kv_caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of all layers, ``[B, H, N, C]``; layers that share one count once.

    Raises:
        ConfigurationError: one has another shape.
    """
    tensors = list({tensor.data_ptr(): tensor for tensor in kv_caches.values()}.values())
    for tensor in tensors:
        if tensor.dim() != 4:
            raise ConfigurationError(
                f"BatonConnector does not support KV tensors of shape {tuple(tensor.shape)}; "
                "it expects [blocks, heads, tokens, content]",
                phase=Phase.REGISTER,
            )
    return tensors


def view_of(tensor: torch.Tensor) -> LayerView:
    """Where it is, in bytes."""
    size = tensor.element_size()
    blocks, heads, tokens, content = tensor.shape
    strides = [stride * size for stride in tensor.stride()]
    return LayerView(
        address=tensor.data_ptr(),
        shape=(blocks, heads, tokens, content),
        strides=(strides[0], strides[1], strides[2], strides[3]),
        itemsize=size,
    )


def axis_order(tensor: torch.Tensor) -> str:
    """Its axes as they lie in memory, outermost first: ``BHNC`` and the like."""
    strides = tensor.stride()
    order = sorted(range(4), key=lambda axis: (-strides[axis], axis))
    return "".join("BHNC"[axis] for axis in order)


def backend_names(vllm_config: VllmConfig) -> list[str]:
    """The attention backends that the model uses, by vLLM's names."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return sorted({layer.get_attn_backend().get_name() for layer in layers.values()})


def packing_of(vllm_config: VllmConfig, tensor: torch.Tensor) -> Packing:
    """How the attention backend packs keys and values into ``[N, C]``."""
    _, _, tokens, content = tensor.shape
    if _CPU_BACKEND not in backend_names(vllm_config):
        return token_major(content * tensor.element_size())
    # Imported here because the module is there on CPU only.
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache_dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    isa = _get_attn_isa(model.dtype, tokens, content // 2, cache_dtype)
    return cpu_packing(isa, content // 2, tensor.element_size())


def storages(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Address and length in bytes of every distinct allocation behind ``tensors``."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
    }
    return sorted(storages.items())
