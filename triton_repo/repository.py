"""The model repository of a bundle: the folders beside this file, with a server's settings in their config files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from ssv.bundle.manifest import Manifest
from ssv.runtime.serving.config import ServerConfig

MODELS = ("preprocessing", "ssv", "postprocessing", "ensemble")
ROUTER = "ab_router"
"""Only where live traffic is to be split."""
DRAINING = "draining"
"""Not loaded before the server is to end."""

HERE = Path(__file__).parent


def disclosure(bundle: Path, manifest: Manifest) -> str:
    """What clients may learn of the tiers, as JSON: thresholds, whether each is lossless, its limit of divergence, and
    the bound that was measured, with its confidence and what it stands on.
    """
    tiers = {name: tier.model_dump() for name, tier in manifest.tiers.items()}
    path = bundle / "calibration.json"
    settings = json.loads(path.read_text())["settings"] if path.is_file() else {}
    calibration = manifest.calibration.model_dump() if manifest.calibration is not None else None
    return json.dumps(
        {
            "bundle": manifest.name,
            "tiers": tiers,
            "confidence": settings.get("confidence"),
            "calibration": calibration,
        }
    )


def write_repository(
    config: ServerConfig, folder: Path, disclosed: str = "", router: Mapping[str, str] | None = None
) -> None:
    """Copies the models to a folder that does not exist yet.

    Parameters that a model's config file has are set to the config's. `ensemble` has for a parameter what is disclosed.

    Args:
        router: parameters of `ab_router`; None for a server without it.

    Raises:
        FileExistsError: the folder exists.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    folder.mkdir(parents=True)
    values = config.model_dump() | {"ssv_disclosure": disclosed} | dict(router or {})
    for name in (*MODELS, DRAINING, ROUTER) if router is not None else (*MODELS, DRAINING):
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        path = folder / name / "config.pbtxt"
        model = text_format.Parse(path.read_text(), ModelConfig())
        for key in model.parameters:
            model.parameters[key].string_value = str(values[key])
        path.write_text(text_format.MessageToString(model))
