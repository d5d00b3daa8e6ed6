"""Triton's view of `ssv.runtime.intake`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ssv.builder.manifest import read_manifest
from ssv.runtime.intake import Intake, declared_inputs
from ssv.runtime.pieces import error_text
from ssv.runtime.request import RequestError
from ssv.runtime.server_config import ServerConfig
from ssv.runtime.tokenizer import BundleTokenizer


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = ServerConfig.from_model_config(json.loads(args["model_config"]))
        manifest = read_manifest(config.bundle, verify=False)  # `ssv` does
        self._intake = Intake(manifest, BundleTokenizer.load(config.bundle), config.limits(manifest))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in declared_inputs()}
        try:
            tensors = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
            prompt_ids, settings = self._intake.prepare(tensors, json.loads(request.parameters()))
        except RequestError as error:
            text = error_text("INVALID_ARGUMENT", error)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("prompt_ids", np.array([prompt_ids], dtype=np.int32)),
                pb_utils.Tensor("settings", np.array([[settings.to_json().encode()]], dtype=np.object_)),
            ]
        )
