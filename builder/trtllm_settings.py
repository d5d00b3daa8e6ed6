"""TensorRT-LLM's settings, as far as an export writes them: names, types and what its own checks ask for.

All names were read in tensorrt_llm/llmapi/llm_args.py of NVIDIA/TensorRT-LLM at commit 0004396 of 2026, which by what
it still has is older than 1.4.0rc1 (`TorchLlmArgs`, `KvCacheConfig`, `DecodeCudaGraphConfig`, `Eagle3DecodingConfig`,
`DraftTargetDecodingConfig`). They were compared with reference pages as far as those were to be had:
`Eagle3DecodingConfig` of 1.3.0rc27 and 1.4.0rc1, whole; `DecodeCudaGraphConfig` of 1.3.0rc27, whole; of 1.4.0rc4 the
first fields of `KvCacheConfig` and `TorchLlmArgs`. What is gone in one of them is left out, such as `eagle3_one_model`
and `eagle_choices`, which 1.4.0rc1 has no more.

TensorRT-LLM refuses unknown names. Here they cannot be written: what is not a field of these models is an
error.

`TritonModel` is the model.yaml of triton_backend/all_models/llmapi in the same repository.
"""

from __future__ import annotations

from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from ssv.support.strict import Strict

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class KvCacheConfig(Strict):
    """The cache of keys and values.

    Attributes:
        free_gpu_memory_fraction: of what is free when the weights are loaded.
    """

    enable_block_reuse: bool = True
    free_gpu_memory_fraction: Share
    dtype: Literal["auto"] = "auto"


class CudaGraphConfig(Strict):
    """Batches that CUDA graphs are captured for."""

    enable_padding: bool = True
    max_batch_size: PositiveInt


class Eagle3DecodingConfig(Strict):
    """A head that sees hidden states of the target.

    Attributes:
        eagle3_layers_to_capture: layers whose outputs it sees, counted from 0. Always written: what a checkpoint says
            of them is not read, and a default of three layers is taken instead.
    """

    decoding_type: Literal["Eagle3"] = "Eagle3"
    max_draft_len: PositiveInt
    speculative_model: str
    eagle3_layers_to_capture: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]


class DraftTargetDecodingConfig(Strict):
    """A language model with the target's tokens."""

    decoding_type: Literal["Draft_Target"] = "Draft_Target"
    max_draft_len: PositiveInt
    speculative_model: str


SpeculativeConfig = Annotated[Eagle3DecodingConfig | DraftTargetDecodingConfig, Field(discriminator="decoding_type")]


class LlmArgs(Strict):
    """What `trtllm-serve --config` and `trtllm-bench --config` take; the model is named on their command lines.

    Attributes:
        max_seq_len: tokens of prompt and output together.
        max_num_tokens: of all requests in a pass.
    """

    tensor_parallel_size: PositiveInt
    pipeline_parallel_size: PositiveInt = 1
    dtype: Literal["auto"] = "auto"
    trust_remote_code: Literal[False] = False
    max_batch_size: PositiveInt
    max_seq_len: PositiveInt
    max_num_tokens: PositiveInt
    enable_chunked_prefill: bool = True
    disable_overlap_scheduler: bool = False
    kv_cache_config: KvCacheConfig
    cuda_graph_config: CudaGraphConfig
    speculative_config: SpeculativeConfig | None = None

    @model_validator(mode="after")
    def _has_room_for_a_pass(self) -> LlmArgs:
        drafted = 0 if self.speculative_config is None else self.speculative_config.max_draft_len
        if self.max_num_tokens < self.max_batch_size * (1 + drafted):
            raise ValueError("max_num_tokens is less than a pass of all requests has")
        return self


class TritonConfig(Strict):
    """What Triton is told of the model.

    Attributes:
        max_batch_size: 0, as its backend takes requests one by one and batches them itself.
        decoupled: whether answers may stream.
    """

    max_batch_size: Literal[0] = 0
    decoupled: bool = True


class TritonModel(LlmArgs):
    """model.yaml of Triton's `llmapi` model."""

    model: str
    triton_config: TritonConfig = TritonConfig()


def settings_yaml(settings: LlmArgs) -> str:
    """The settings as YAML, every default written out."""
    return yaml.safe_dump(settings.model_dump(exclude_none=True), sort_keys=False)
