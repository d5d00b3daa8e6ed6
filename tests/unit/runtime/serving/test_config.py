"""Settings of a server, as Triton hands them to its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ssv.bundle.manifest import Manifest, TierEntry
from ssv.bundle.policy import Policy
from ssv.runtime.serving.config import ConfigError, ServerConfig
from ssv.runtime.serving.intake import Limits
from ssv.triton_repo.serve import _parser


def model_config(**given: str) -> dict[str, Any]:
    return {"name": "ssv", "parameters": {name: {"string_value": value} for name, value in given.items()}}


def manifest(max_positions: int) -> Manifest:
    policy = Policy(accept_below=0.0, verify_above=0.5, risk_budget=0.6, max_pending=6)
    return Manifest(
        name="m",
        target={"max_positions": max_positions},
        draft={},
        eos_token_ids=[0],
        default_precision="fp32",
        tiers={"premium": TierEntry(policy=policy, lossless=True)},
        files={},
        sources={},
        versions={},
    )


def test_texts_become_what_they_say() -> None:
    given = {
        "bundle": "/b",
        "engine": "tensorrt",
        "precision": "fp8",
        "device": "cuda",
        "threads": "3",
        "max_rows": "2",
    }
    given |= {"max_waiting": "0", "max_length": "100", "max_tokens": "50", "max_prompt_bytes": "10"}
    given |= {"prefill_chunk": "32", "prompt_cache_mb": "0", "audit_share": "0.25"}
    given |= {"audit_state": "/c/state"}
    assert ServerConfig.from_model_config(model_config(**given)) == ServerConfig(
        bundle=Path("/b"),
        engine="tensorrt",
        precision="fp8",
        device="cuda",
        threads=3,
        max_rows=2,
        max_waiting=0,
        max_length=100,
        max_tokens=50,
        max_prompt_bytes=10,
        prefill_chunk=32,
        prompt_cache_mb=0,
        audit_share=0.25,
        audit_state="/c/state",
    )


def test_defaults() -> None:
    assert ServerConfig.from_model_config(model_config(bundle="/b")) == ServerConfig(bundle=Path("/b"))


def test_all_settings_survive_text() -> None:
    config = ServerConfig(bundle=Path("/a b/ü"), audit_share=1e-05, max_rows=3)
    texts = {name: str(value) for name, value in config.model_dump().items()}
    assert ServerConfig.from_model_config(model_config(**texts)) == config


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "bundle: Field required"),
        ({"bundle": "/b", "rows": "8"}, "rows: Extra inputs"),
        ({"bundle": "/b", "engine": "onnx"}, "engine: "),
        ({"bundle": "/b", "device": "tpu"}, "device: "),
        ({"bundle": "/b", "threads": "-1"}, "threads: "),
        ({"bundle": "/b", "max_rows": "0"}, "max_rows: "),
        ({"bundle": "/b", "max_rows": "many"}, "max_rows: "),
        ({"bundle": "/b", "max_rows": "1.5"}, "max_rows: "),
        ({"bundle": "/b", "max_waiting": "-1"}, "max_waiting: "),
        ({"bundle": "/b", "max_length": "0"}, "max_length: "),
        ({"bundle": "/b", "max_tokens": ""}, "max_tokens: "),
        ({"bundle": "/b", "audit_share": "1.5"}, "audit_share: "),
        ({"bundle": "/b", "audit_share": "nan"}, "audit_share: "),
        ({"bundle": "/b", "max_rows": "0", "max_tokens": "x"}, "max_rows: .*; max_tokens: "),
    ],
)
def test_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=f"parameters of model ssv: .*{says}"):
        ServerConfig.from_model_config(model_config(**given))


def test_no_parameters_at_all() -> None:
    with pytest.raises(ConfigError, match="bundle"):
        ServerConfig.from_model_config({"name": "ssv"})


def test_it_does_not_change() -> None:
    with pytest.raises(ValidationError):
        ServerConfig(bundle=Path("/b")).max_rows = 4  # type: ignore[misc]


def test_limits() -> None:
    config = ServerConfig(bundle=Path("/b"), max_length=500, max_tokens=20, max_prompt_bytes=30)
    assert config.limits(manifest(8192)) == Limits(500, 20, 30)
    assert config.limits(manifest(400)) == Limits(272, 20, 30)


def test_command_line_has_every_setting_with_its_default() -> None:
    args = vars(_parser().parse_args(["--bundle", "/b"]))
    args["precision"] = args["precision"] or ""
    assert args["audit_state"] is None, "the server's own folder has it"
    args["audit_state"] = ""
    assert args["chat_template"] is None, "the bundle has it"
    args["chat_template"] = ""
    assert args["responses_per_s"] is None, "ssv-serve chooses by device"
    args["responses_per_s"] = ServerConfig.model_fields["responses_per_s"].default
    assert args["gpu_memory_share"] is None, "it is refused where there is no GPU to share"
    settings = {name: args[name] for name in ServerConfig.model_fields.keys() - {"verified", "gpu_memory_share"}}
    assert ServerConfig(**settings) == ServerConfig(bundle=Path("/b"))
