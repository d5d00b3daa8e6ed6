"""Settings of a server: one set of names for the command line, the models' config files and the container."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from ssv.bundle.manifest import Manifest
from ssv.bundle.policy import RESERVED_LENGTH
from ssv.runtime.threads import MAX_THREADS
from ssv.support.errors import UserError
from ssv.support.strict import Strict, problems

if TYPE_CHECKING:
    from ssv.runtime.serving.intake import Limits


class ConfigError(UserError):
    """Settings that cannot be; the message names them."""


class ServerConfig(Strict):
    """Settings of the models, each a parameter of the config.pbtxt of those that use it.

    Attributes:
        bundle: folder.
        engine, precision, device: see `LLM.load`; precision "" is the bundle's choice.
        threads: of the torch engine on a CPU; 0 for as many as there are cores that nobody else uses.
        tensor_parallel: GPUs that share the target, in TensorRT-LLM.
        gpu_memory_share: of the GPU's whole memory, that the torch engine may take there.
        max_rows: requests that are decoded side by side.
        max_waiting: requests that wait for a row; more are refused at once.
        max_length: tokens of prompt and output together.
        max_tokens: of an output, at most.
        max_prompt_bytes: of a prompt's text.
        prefill_chunk: tokens of a prompt between two rounds; 0 for what fits the device.
        prompt_cache_mb: memory for beginnings of prompts; 0 for none.
        stream_interval_ms: between two responses of a stream, at least.
        responses_per_s: of all streams together, at most; 0 for no bound. Where engines and server share a few cores,
            each response takes time from the engines.
        verified: files of the bundle that ssv-serve has checked, as JSON (see `verify_files`); "" for none.
        audit_share: share of the requests of lossy tiers that the target judges in full, which changes nothing of
            their output.
        chat_template: file with the template that conversations go through; "" for the bundle's.
        audit_state: file of what that has found; "" keeps it in the process.
    """

    bundle: Path
    engine: Literal["torch", "tensorrt", "tensorrt_llm"] = "torch"
    precision: str = ""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, Field(ge=0, le=MAX_THREADS)] = 0
    tensor_parallel: PositiveInt = 1
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_rows: PositiveInt = 8
    max_waiting: Annotated[int, Field(ge=0)] = 64
    max_length: PositiveInt = 2048
    max_tokens: PositiveInt = 1024
    max_prompt_bytes: PositiveInt = 65536
    prefill_chunk: Annotated[int, Field(ge=0)] = 0
    prompt_cache_mb: Annotated[int, Field(ge=0)] = 256
    stream_interval_ms: Annotated[int, Field(ge=0)] = 40
    responses_per_s: Annotated[int, Field(ge=0)] = 40
    verified: str = ""
    audit_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    audit_state: str = ""
    chat_template: str = ""

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any]) -> ServerConfig:
        """Settings of a model as Triton hands it its config.

        Raises:
            ConfigError: a parameter that is unknown, missing or out of range.
        """
        given = {name: entry["string_value"] for name, entry in model_config.get("parameters", {}).items()}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            wrong = problems(error, "all")
            raise ConfigError(f"parameters of model {model_config.get('name')}: {wrong}") from error

    def limits(self, manifest: Manifest) -> Limits:
        """What a request may ask for, with this bundle."""
        from ssv.runtime.serving.intake import Limits  # with what reads prompts, which ssv-serve does without

        most = int(manifest.target["max_positions"]) - RESERVED_LENGTH  # as `LLM.load` has it
        return Limits(min(self.max_length, most), self.max_tokens, self.max_prompt_bytes)
