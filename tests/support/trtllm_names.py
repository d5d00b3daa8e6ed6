"""Names of TensorRT-LLM's settings as they are published, to compare with what an export writes.

`Eagle3DecodingConfig`: the signature on its reference page of 1.4.0rc1, whole. The others: what stands in
tensorrt_llm/llmapi/llm_args.py at commit 0004396. Most of that was also seen in
tensorrt_llm/usage/llm_args_golden_manifest.json at commit 92e3075, or on a reference page of 1.4.0rc4, which has the
classes' first fields; not each name was looked up there.
"""

from __future__ import annotations

_DRAFTING = {
    "max_draft_len",
    "max_total_draft_tokens",
    "speculative_model",
    "max_concurrency",
    "draft_len_schedule",
    "load_format",
    "acceptance_rate_window_size",
    "acceptance_rate_threshold",
    "use_rejection_sampling",
    "allow_advanced_sampling",
    "advanced_sampling_mode",
    "enable_penalty",
    "decoding_type",
}
PUBLISHED: dict[str, set[str]] = {
    "LlmArgs": {
        "model",
        "tokenizer",
        "tokenizer_mode",
        "skip_tokenizer_init",
        "trust_remote_code",
        "tensor_parallel_size",
        "dtype",
        "revision",
        "pipeline_parallel_size",
        "context_parallel_size",
        "gpus_per_node",
        "enable_attention_dp",
        "kv_cache_config",
        "enable_chunked_prefill",
        "guided_decoding_backend",
        "speculative_config",
        "max_batch_size",
        "max_input_len",
        "max_seq_len",
        "max_beam_width",
        "max_num_tokens",
        "cuda_graph_config",
        "disable_overlap_scheduler",
        "attn_backend",
    },
    "KvCacheConfig": {
        "enable_block_reuse",
        "max_tokens",
        "max_attention_window",
        "free_gpu_memory_fraction",
        "host_cache_size",
        "enable_partial_reuse",
        "copy_on_partial_reuse",
        "use_uvm",
        "dtype",
    },
    "CudaGraphConfig": {"batch_sizes", "max_batch_size", "enable_padding", "mode"},
    "DraftTargetDecodingConfig": _DRAFTING,
    "Eagle3DecodingConfig": _DRAFTING
    | {
        "moe_backend",
        "spec_dec_variant",
        "use_dynamic_tree",
        "dynamic_tree_max_topK",
        "num_eagle_layers",
        "max_non_leaves_per_layer",
        "eagle3_layers_to_capture",
        "eagle3_model_arch",
        "sa_config",
    },
    "TritonConfig": {"max_batch_size", "decoupled", "cancellation_check_period_ms"},
}
PUBLISHED["TritonModel"] = PUBLISHED["LlmArgs"] | {"triton_config"}
