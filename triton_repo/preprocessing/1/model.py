"""Triton's view of `ssv.runtime.serving.intake`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ssv.bundle.manifest import read_manifest
from ssv.runtime.request import RequestError
from ssv.runtime.serving.config import ServerConfig
from ssv.runtime.serving.intake import Intake, declared_inputs
from ssv.runtime.serving.log import log_event, log_to_stderr
from ssv.runtime.serving.metrics import Admission, Metrics, Refusal, boards_folder
from ssv.runtime.serving.pieces import error_text
from ssv.runtime.tokenizer import BundleTokenizer

log = logging.getLogger("ssv.server")


class TritonPythonModel:
    """The model that checks requests and makes tokens of them."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the tokenizer and the limits of the bundle that the model's config names."""
        log_to_stderr()
        config = ServerConfig.from_model_config(json.loads(args["model_config"]))
        manifest = read_manifest(config.bundle, verify=False)  # `ssv` does
        template = Path(config.chat_template) if config.chat_template else None
        tokenizer = BundleTokenizer.load(config.bundle, manifest.eos_token_ids, template)
        self._intake = Intake(manifest, tokenizer, config.limits(manifest))
        self._metrics = Metrics(boards_folder(), "preprocessing")
        self._admission = Admission(boards_folder(), config.max_rows, config.max_waiting)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers each request with its token ids and its checked settings, or with the error why it is refused."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        # A storm of requests is refused here, before any work.
        try:
            self._admission.check()
        except Refusal as refusal:
            self._metrics.refused(refusal.reason)
            self._log(request, "refused", refusal)
            return _error("UNAVAILABLE", pb_utils.TritonError.UNAVAILABLE, refusal)
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in declared_inputs()}
        try:
            tensors = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
            prompt_ids, settings = self._intake.prepare(tensors, json.loads(request.parameters()))
        except RequestError as error:
            self._metrics.invalid()
            self._log(request, "invalid", error)
            return _error("INVALID_ARGUMENT", pb_utils.TritonError.INVALID_ARG, error)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("prompt_ids", np.array([prompt_ids], dtype=np.int32)),
                pb_utils.Tensor("settings", np.array([[settings.to_json().encode()]], dtype=np.object_)),
            ]
        )

    @staticmethod
    def _log(request: Any, reason: str, error: Exception) -> None:
        log_event(log, "request", level=logging.WARNING, id=request.request_id(), reason=reason, error=error)


def _error(status: str, code: int, error: Exception) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error_text(status, error), code))
