"""The models' config files: one contract, said in four places."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from google.protobuf import text_format
from lettered import lettered
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc.model_config_pb2 import ModelConfig

from ssv.runtime.counters import Counters
from ssv.runtime.request import Chunk, SamplingParams
from ssv.runtime.serving import intake
from ssv.runtime.serving.config import ConfigError, ServerConfig
from ssv.runtime.serving.intake import Settings, declared_inputs
from ssv.runtime.serving.pieces import Answer
from ssv.triton_repo import ports as ports_module
from ssv.triton_repo.repository import DRAINING, HERE, MODELS, ROUTER, write_repository

PYTHON_MODELS = tuple(name for name in MODELS if name != "ensemble")


def read(name: str, folder: Path = HERE) -> ModelConfig:
    return text_format.Parse((folder / name / "config.pbtxt").read_text(), ModelConfig())


def wanted_type(name: str) -> tuple[int, list[int]]:
    if name in intake.STRINGS:
        return pb.TYPE_STRING, [1]
    if name in intake.STRING_LISTS:
        return pb.TYPE_STRING, [-1]
    if name in intake.TOKEN_LISTS:
        return pb.TYPE_INT32, [-1]
    if name in intake.FLAGS:
        return pb.TYPE_BOOL, [1]
    if name in ("seed", "random_seed"):
        return pb.TYPE_UINT64, [1]
    return (pb.TYPE_INT32 if name in intake.WHOLE_NUMBERS else pb.TYPE_FP32), [1]


def ports(config: ModelConfig, side: str) -> dict[str, tuple[int, list[int]]]:
    return {port.name: (port.data_type, list(port.dims)) for port in getattr(config, side)}


def settings_of(config: ModelConfig) -> ServerConfig:
    """The settings that a model finds in the config that Triton hands it."""
    parameters = {name: {"string_value": parameter.string_value} for name, parameter in config.parameters.items()}
    return ServerConfig.from_model_config({"name": config.name, "parameters": parameters})


def make(**given: object) -> ServerConfig:
    return ServerConfig(**{"bundle": Path("/a b/ü"), **given})


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_names_and_batches(name: str) -> None:
    config = read(name)
    assert config.name == name
    assert config.max_batch_size == 1
    assert (HERE / name / "1").is_dir()
    if name != "ensemble":
        assert config.backend == "python"
        assert [group.count for group in config.instance_group] == [1]
        assert (HERE / name / "1" / "model.py").is_file()


@pytest.mark.parametrize("name", ["ensemble", "preprocessing"])
def test_inputs_are_those_that_are_taken_in(name: str) -> None:
    config = read(name)
    assert ports(config, "input") == {each: wanted_type(each) for each in declared_inputs()}
    assert len(config.input) == len(declared_inputs())


@pytest.mark.parametrize("name", ["ensemble", "preprocessing", ROUTER])
def test_every_input_is_optional_or_an_ensemble_without_it_would_hang(name: str) -> None:
    assert [port.name for port in read(name).input if not port.optional] == []


@pytest.mark.parametrize("name", ports_module.ports())
def test_the_ports_in_the_files_are_current(name: str) -> None:
    text = (HERE / name / "config.pbtxt").read_text()
    assert text == ports_module.written(name, text), "write them anew: python -m ssv.triton_repo.ports"


def test_ports_are_written_between_their_marks_alone() -> None:
    text = f'name: "ssv"\n{ports_module.BEGIN}\nold\n{ports_module.END}\n# new\n'
    written = ports_module.written("ssv", text)
    assert written.startswith(f'name: "ssv"\n{ports_module.BEGIN}\ninput {{')
    assert written.endswith(f"}}\n{ports_module.END}\n# new\n") and "old" not in written
    with pytest.raises(ValueError, match=r"config.pbtxt of ssv has no part for its ports"):
        ports_module.written("ssv", 'name: "ssv"\n')


def test_outputs_of_the_ensemble_are_those_of_postprocessing() -> None:
    assert ports(read("ensemble"), "output") == ports(read("postprocessing"), "output")


def test_no_tensor_goes_in_and_comes_out_under_one_name() -> None:
    """In an ensemble they would be one tensor, and the server would not start."""
    assert not set(ports(read("ensemble"), "input")) & set(ports(read("ensemble"), "output"))


def test_outputs_are_the_fields_of_a_piece() -> None:
    answer = Answer("key", Settings("premium", SamplingParams(), stream=True, timeout=None), True)
    piece = answer.piece(Chunk(0, "", (1,), Counters()), 0.0, 0.0)
    assert piece is not None
    types = {str: pb.TYPE_STRING, bool: pb.TYPE_BOOL, int: pb.TYPE_INT32, float: pb.TYPE_FP32}
    wanted = {name: (types[type(value)], [1]) for name, value in piece.outputs("", lettered()).items()}
    assert ports(read("postprocessing"), "output") == wanted


def test_the_ensemble_passes_every_tensor_on() -> None:
    steps = {step.model_name: step for step in read("ensemble").ensemble_scheduling.step}
    assert tuple(steps) == PYTHON_MODELS
    for name, step in steps.items():
        config = read(name)
        assert set(step.input_map) == set(ports(config, "input"))
        assert set(step.output_map) == set(ports(config, "output"))
    assert all(key == value for key, value in steps["preprocessing"].input_map.items())
    assert all(key == value for key, value in steps["postprocessing"].output_map.items())
    for before, after in pairwise(PYTHON_MODELS):
        made = {steps[before].output_map[name]: kind for name, kind in ports(read(before), "output").items()}
        used = {steps[after].input_map[name]: kind for name, kind in ports(read(after), "input").items()}
        assert made == used


def test_who_sends_more_than_one_response() -> None:
    decoupled = {name: read(name).model_transaction_policy.decoupled for name in PYTHON_MODELS}
    assert decoupled == {"preprocessing": False, "ssv": True, "postprocessing": True}


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PYTHON_MODELS)
def test_files_are_taken_as_they_are(name: str) -> None:
    """With the defaults of the command line, but for the bundle: they are what a container starts from."""
    config = read(name)
    assert set(config.parameters) <= ServerConfig.model_fields.keys()
    assert settings_of(config) == ServerConfig(bundle=Path("/models/bundle"))


@pytest.mark.parametrize("name", PYTHON_MODELS)
def test_unknown_parameters_are_refused(name: str) -> None:
    config = read(name)
    config.parameters["max_row"].string_value = "3"
    with pytest.raises(ConfigError, match=f"parameters of model {name}: max_row"):
        settings_of(config)


def test_the_ensemble_tells_clients_of_its_tiers(tmp_path: Path) -> None:
    write_repository(make(), tmp_path / "models", '{"bundle": "pair"}')
    parameters = read("ensemble", tmp_path / "models").parameters
    assert {name: parameter.string_value for name, parameter in parameters.items()} == {
        "ssv_disclosure": '{"bundle": "pair"}'
    }


def test_the_engines_are_told_all_but_what_is_for_prompts() -> None:
    assert set(read("ssv").parameters) == ServerConfig.model_fields.keys() - {"max_prompt_bytes", "chat_template"}


# --- the router -----------------------------------------------------------------------------------------------------

ROUTING = {"routing": '{"salt": "ü\\"\\\\"}', "own_url": "grpcs://[::1]:8001", "certificate": "/a b/c.pem"}


def test_the_router_takes_and_gives_what_the_ensemble_does_and_takes_who_asks() -> None:
    router, ensemble = read(ROUTER), read("ensemble")
    text = (pb.TYPE_STRING, [1])
    assert ports(router, "input") == {**ports(ensemble, "input"), "ssv_user": text}
    assert ports(router, "output") == ports(ensemble, "output")
    assert (len(router.input), len(router.output)) == (len(ensemble.input) + 1, len(ensemble.output))


def test_the_router_is_one_model_that_streams() -> None:
    router = read(ROUTER)
    assert (router.name, router.backend, router.max_batch_size) == (ROUTER, "python", 1)
    assert router.model_transaction_policy.decoupled
    assert [group.count for group in router.instance_group] == [1]
    assert (HERE / ROUTER / "1" / "model.py").is_file()
    assert ROUTER not in MODELS


def test_the_router_is_not_copied_where_traffic_is_not_split(tmp_path: Path) -> None:
    write_repository(make(), tmp_path / "models")
    assert not (tmp_path / "models" / ROUTER).exists()


def test_the_router_is_told_its_arms(tmp_path: Path) -> None:
    write_repository(make(), tmp_path / "models", "disclosed", ROUTING)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted((*MODELS, DRAINING, ROUTER))
    written = read(ROUTER, tmp_path / "models")
    assert {name: parameter.string_value for name, parameter in written.parameters.items()} == ROUTING
    ours = read(ROUTER)
    assert set(ours.parameters) == set(ROUTING)
    for config in (ours, written):
        config.ClearField("parameters")
    assert ours == written
    path = Path("1") / "model.py"
    assert (tmp_path / "models" / ROUTER / path).read_bytes() == (HERE / ROUTER / path).read_bytes()
    # The other models are told what they are told without it.
    write_repository(make(), tmp_path / "without", "disclosed")
    for name in MODELS:
        assert read(name, tmp_path / "models") == read(name, tmp_path / "without")


def test_a_parameter_that_is_not_given_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="certificate"):
        write_repository(make(), tmp_path / "models", "", {"routing": json.dumps({}), "own_url": ""})


# --- writing --------------------------------------------------------------------------------------------------------


def test_settings_are_written(tmp_path: Path) -> None:
    config = make(max_rows=3, max_waiting=5, max_length=100, max_tokens=7, max_prompt_bytes=11, audit_share=0.125)
    write_repository(config, tmp_path / "models")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted((*MODELS, DRAINING))
    for name in PYTHON_MODELS:
        written = read(name, tmp_path / "models")
        found = settings_of(written)
        for parameter in written.parameters:
            assert getattr(found, parameter) == getattr(config, parameter)
        assert set(written.parameters) == set(read(name).parameters)


def test_nothing_else_is_changed(tmp_path: Path) -> None:
    write_repository(make(max_rows=3), tmp_path / "models")
    for name in MODELS:
        ours, written = read(name), read(name, tmp_path / "models")
        for config in (ours, written):
            config.ClearField("parameters")
        assert ours == written
        for path in (HERE / name / "1").iterdir():
            if path.is_file():
                assert (tmp_path / "models" / name / "1" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", [*MODELS, DRAINING, ROUTER])
def test_no_model_has_a_batcher_of_tritons(name: str) -> None:
    """Dynamic batching holds back requests that come together by up to 0.5 s, and `ssv` batches requests itself."""
    assert read(name).WhichOneof("scheduling_choice") == ("ensemble_scheduling" if name == "ensemble" else None)


def test_compiled_files_stay_behind(tmp_path: Path) -> None:
    write_repository(make(), tmp_path / "models")
    assert not list((tmp_path / "models").rglob("__pycache__"))


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        write_repository(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_model_that_ends_readiness_is_not_loaded_at_the_start() -> None:
    config = read(DRAINING)
    assert (config.name, config.backend) == (DRAINING, "python")
    assert DRAINING not in MODELS
    assert "raise RuntimeError" in (HERE / DRAINING / "1" / "model.py").read_text()
