"""config.json of models that people pair, as far as they could be looked up: facts of others, not files of theirs.

The files themselves are gated, or were not to be had: what stands here is quoted by others.

* Llama-3.3-70B-Instruct: its sizes, in an article that quotes the file. Its rope scaling is Llama-3.1-70B's.
* Llama-3.1-8B-Instruct: the base model's file, whole (citsjtu2020/LLM-Prof, sglang/Model_Config.md).
* Llama-3.2-1B-Instruct: two reimplementations that agree; the model card for the shared embedding.
* Qwen3-32B, Qwen3-8B: quoted whole. Qwen3-0.6B: its sizes.
* Heads: sgl-project/SpecForge, configs/llama3-70B-ealge3.json and tests of `LlamaForCausalLMEagle3`. Of Qwen3-8B's head
  its width and its single layer were found; the number of rows of its LM head is the other heads'.
"""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "hidden_act": "silu",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


def _sizes(layers: int, hidden: int, inner: int, heads: int, *, is_tied: bool) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "tie_word_embeddings": is_tied,
    }


MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.3-70B-Instruct": {
        **_LLAMA,
        **_sizes(80, 8192, 28672, 64, is_tied=False),
        "head_dim": 128,
        "rope_scaling": _llama3_rope(8.0),
    },
    "Llama-3.1-8B-Instruct": {
        **_LLAMA,
        **_sizes(32, 4096, 14336, 32, is_tied=False),
        "rope_scaling": _llama3_rope(8.0),
    },
    "Llama-3.2-1B-Instruct": {
        **_LLAMA,
        **_sizes(16, 2048, 8192, 32, is_tied=True),
        "head_dim": 64,
        "rope_scaling": _llama3_rope(32.0),
    },
    "Qwen3-32B": {**_QWEN3, **_sizes(64, 5120, 25600, 64, is_tied=False)},
    "Qwen3-8B": {**_QWEN3, **_sizes(36, 4096, 12288, 32, is_tied=False)},
    "Qwen3-0.6B": {**_QWEN3, **_sizes(28, 1024, 3072, 16, is_tied=True)},
}
_HEAD = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": 32000}
HEADS: dict[str, dict[str, Any]] = {
    "EAGLE3-LLaMA3.3-Instruct-70B": {
        **MODELS["Llama-3.3-70B-Instruct"],
        **_HEAD,
        "num_hidden_layers": 1,
        "max_position_embeddings": 4096,
        "rope_scaling": {**_llama3_rope(8.0), "original_max_position_embeddings": 4096},
    },
    "EAGLE3-LLaMA3.1-Instruct-8B": {
        **MODELS["Llama-3.1-8B-Instruct"],
        **_HEAD,
        "num_hidden_layers": 1,
        "max_position_embeddings": 2048,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "Qwen3-8B_eagle3": {**MODELS["Qwen3-8B"], **_HEAD, "num_hidden_layers": 1},
}
