"""The model repository of a bundle: the folders beside this file, with a server's settings put into their config files.

May import: ssv.runtime.server_config.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ssv.runtime.server_config import ServerConfig

MODELS = ("preprocessing", "ssv", "postprocessing", "ensemble")
HERE = Path(__file__).parent


def write_repository(config: ServerConfig, folder: Path) -> None:
    """Copies the models to a folder that does not exist yet.

    Parameters that a model's config file has are set to the config's; the bound of the queue before `preprocessing` is what rows and queue
    of `ssv` can take.

    Raises:
        FileExistsError: the folder exists.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    folder.mkdir(parents=True)
    values = config.model_dump()
    for name in MODELS:
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        path = folder / name / "config.pbtxt"
        model = text_format.Parse(path.read_text(), ModelConfig())
        for key in model.parameters:
            model.parameters[key].string_value = str(values[key])
        if name == "preprocessing":
            model.dynamic_batching.default_queue_policy.max_queue_size = config.max_rows + config.max_waiting
        path.write_text(text_format.MessageToString(model))
