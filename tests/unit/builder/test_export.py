"""What other engines are given to serve a bundle's models: that it comes back, says nothing that they do not know, and
compares its arms."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from eagle3_heads import published
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import relative_error, tiny_ids, whole_window
from tiny_bundle import HEADS, RECIPE, build, built_with, write_recipe
from trtllm_names import PUBLISHED

from ssv.ab import cli as ab_cli
from ssv.ab.arms import parse_arm
from ssv.builder import trtllm_settings
from ssv.builder.cli import main
from ssv.builder.export import HOSTS, export_for
from ssv.builder.export_arms import HostSettings, arm_files
from ssv.builder.training.passes import CausalAttend
from ssv.builder.training.quantize import quantize_target, save_quantized_target
from ssv.bundle.manifest import MANIFEST_NAME, file_entry, read_manifest
from ssv.model.checkpoint import load_checkpoint
from ssv.model.decoder import Decoder
from ssv.model.draft import DraftSpec, load_draft, write_draft
from ssv.model.eagle3 import read_eagle3
from ssv.model.unified import load_any
from ssv.support.errors import UserError
from ssv.support.strict import Strict
from ssv.triton_repo import serve

PATIENCE = 600.0
"""Seconds until a process that hangs is taken to hang."""

any_host = pytest.mark.parametrize("host", HOSTS)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_with(tmp_path_factory.mktemp("conditioned"), "join: eagle3", HEADS)


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole_head = RECIPE.replace("head_size: 48", "head_size: null")
    return built_with(tmp_path_factory.mktemp("standalone"), "kind: standalone", recipe=whole_head)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- models ---------------------------------------------------------------------------------------------------------


@any_host
def test_the_target_is_a_folder_with_its_tokenizer(host: Any, conditioned: Path, tmp_path: Path) -> None:
    export_for(host, conditioned, tmp_path / "out", tensor_parallel=1)
    target = tmp_path / "out" / "target"
    assert load_checkpoint(target)[0] == load_checkpoint(conditioned / "target")[0]
    assert {file.name for file in (conditioned / "tokenizer").iterdir()} < {file.name for file in target.iterdir()}
    # Weights take no room twice; what a person may edit is a copy, or the bundle would not be what its manifest says.
    for name, is_shared in (("model.safetensors", True), ("config.json", False)):
        assert (target / name).samefile(conditioned / "target" / name) == is_shared
    read_manifest(conditioned)


@pytest.mark.parametrize(("host", "layout"), [("trtllm", "eagle3"), ("vllm", "speculators"), ("sglang", "eagle3")])
def test_a_conditioned_draft_comes_back(host: Any, layout: str, conditioned: Path, tmp_path: Path) -> None:
    export_for(host, conditioned, tmp_path / "out", tensor_parallel=2)
    target = Decoder.from_weights(*load_checkpoint(conditioned / "target"))
    draft = load_draft(conditioned / "draft" / "draft.safetensors", target)
    back = read_eagle3(tmp_path / "out" / "draft", target)
    assert back.spec == replace(draft.spec, own_lm_head=True)
    config = json.loads((tmp_path / "out" / "draft" / "config.json").read_text())
    assert ("speculators_config" in config) == (layout == "speculators")


@torch.no_grad()
def test_the_correction_of_a_head_is_added_up(conditioned: Path, tmp_path: Path) -> None:
    """No layout has words for it: a product of two matrices, added to rows of the target's."""
    target = Decoder.from_weights(*load_checkpoint(conditioned / "target"))
    file = conditioned / "draft" / "draft.safetensors"
    plain = load_draft(file, target, for_training=True)
    spec = replace(plain.spec, head_rank=3)
    made_of = {name: value for name, value in plain.own_state().items()}
    low, high = torch.randn(3, 64), torch.randn(48, 3)
    bundle = tmp_path / "bundle"
    copy_bundle(conditioned, bundle)
    write_draft(
        DraftSpec.from_dict(spec.to_dict()),
        {**made_of, "head_in.weight": low, "head_out.weight": high},
        bundle / "draft" / "draft.safetensors",
    )
    sign(bundle, "draft/draft.safetensors", draft=spec.to_dict())
    export_for("trtllm", bundle, tmp_path / "out", tensor_parallel=1)
    rows = load_file(tmp_path / "out" / "draft" / "model.safetensors")["lm_head.weight"].float()
    order = plain.token_ids.argsort()
    expected = (plain.decoder.lm_head.weight + high @ low)[order]
    assert relative_error(rows, expected) < 1e-2  # bf16
    assert relative_error(rows, plain.decoder.lm_head.weight[order]) > 0.5


def test_five_tapped_layers_are_named_in_the_settings(tmp_path: Path) -> None:
    """TensorRT-LLM does not read them in the checkpoint."""
    files = arm_files(settings("trtllm", taps=(2, 8, 14, 21, 27)))
    assert yaml.safe_load(files["speculation.yaml"])["speculative_config"] == {
        "decoding_type": "Eagle3",
        "max_draft_len": 5,
        "speculative_model": "/srv/out/draft",
        "eagle3_layers_to_capture": [2, 8, 14, 21, 27],
    }


@torch.no_grad()
@any_host
def test_a_standalone_draft_comes_back_as_a_language_model(host: Any, standalone: Path, tmp_path: Path) -> None:
    export_for(host, standalone, tmp_path / "out", tensor_parallel=1)
    model = Decoder.from_weights(*load_checkpoint(tmp_path / "out" / "draft"))
    target = Decoder.from_weights(*load_checkpoint(standalone / "target"))
    draft = load_draft(standalone / "draft" / "draft.safetensors", target)
    ids_T = tiny_ids(9)
    expected = draft.logits(draft.run_layers(ids_T, None, torch.arange(9), CausalAttend(1)))
    found = whole_window(model, ids_T[None])[1][0]
    assert relative_error(found[:, draft.token_ids], expected) < 3e-2  # bf16
    assert (found[:, draft.token_ids].argmax(1) == expected.argmax(1)).all()


def test_a_quantized_target(conditioned: Path, tmp_path: Path) -> None:
    decoder = Decoder.from_weights(*load_checkpoint(conditioned / "target"))
    made = quantize_target(decoder, torch.randint(0, 112, (2, 32)), "fp8")
    save_quantized_target(made, tmp_path / "fp8", [1], torch.bfloat16, lambda folder: None)
    left_out = export_for("trtllm", conditioned, tmp_path / "out", tensor_parallel=1, checkpoint=tmp_path / "fp8")
    target = tmp_path / "out" / "target"
    assert load_any(target)[1].keys() == load_any(tmp_path / "fp8")[1].keys()
    assert (target / "hf_quant_config.json").is_file() and (target / "tokenizer.json").is_file()
    assert any("fp8 weights, in the arm ssv alone" in each for each in left_out)
    with pytest.raises(UserError, match="is not quantized"):
        export_for("vllm", conditioned, tmp_path / "b", tensor_parallel=1, checkpoint=conditioned / "target")
    other = quantize_target(Decoder(replace(decoder.spec, num_layers=1)), torch.randint(0, 112, (2, 32)), "fp8")
    save_quantized_target(other, tmp_path / "other", [1], torch.bfloat16, lambda folder: None)
    with pytest.raises(UserError, match="another model than the bundle's target"):
        export_for("vllm", conditioned, tmp_path / "b", tensor_parallel=1, checkpoint=tmp_path / "other")


# --- settings -------------------------------------------------------------------------------------------------------


def settings(host: Any, **changes: Any) -> HostSettings:
    place, bundle = Path("/srv/out"), Path("/srv/bundle")
    facts = HostSettings(host, place, bundle, "tiny", (0, 1), 2, 5, 8, 4096, 0.4)
    return replace(facts, **changes)


def models() -> dict[str, type[Strict]]:
    found = {name: each for name, each in vars(trtllm_settings).items() if isinstance(each, type)}
    return {name: each for name, each in found.items() if issubclass(each, Strict) and each is not Strict}


def test_every_setting_is_one_that_tensorrt_llm_has() -> None:
    assert models().keys() == PUBLISHED.keys()
    for name, model in models().items():
        assert set(model.model_fields) <= PUBLISHED[name], name


@pytest.mark.parametrize("where", [(), ("kv_cache_config",), ("cuda_graph_config",), ("speculative_config",)])
def test_a_setting_of_another_name_cannot_be_written(where: tuple[str, ...]) -> None:
    document = yaml.safe_load(arm_files(settings("trtllm"))["speculation.yaml"])
    trtllm_settings.LlmArgs.model_validate(document)
    inner = document
    for key in where:
        inner = inner[key]
    inner["eagle3_one_model"] = True
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        trtllm_settings.LlmArgs.model_validate(document)


def test_values_that_tensorrt_llm_refuses_cannot_be_written() -> None:
    document = yaml.safe_load(arm_files(settings("trtllm"))["speculation.yaml"])
    for wrong in (
        {"max_num_tokens": 8},  # a pass of 8 requests has 48
        {"tensor_parallel_size": 0},
        {"kv_cache_config": {"free_gpu_memory_fraction": 1.5}},
        {"speculative_config": {"decoding_type": "Eagle", "max_draft_len": 5, "speculative_model": "x"}},
        {"speculative_config": {"decoding_type": "Eagle3", "max_draft_len": 5, "speculative_model": "x"}},
    ):
        with pytest.raises(ValidationError):
            trtllm_settings.LlmArgs.model_validate({**document, **wrong})


def test_settings_for_tensorrt_llm(conditioned: Path, standalone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_for("trtllm", conditioned, out, tensor_parallel=2, max_rows=3, max_length=90, place=Path("/srv/export"))
    plain, speculation = read(out / "plain.yaml"), read(out / "speculation.yaml")
    config = speculation.pop("speculative_config")
    assert plain == speculation  # the arms differ in nothing else
    assert config["speculative_model"] == "/srv/export/draft" and config["eagle3_layers_to_capture"] == [0, 1]
    assert (plain["tensor_parallel_size"], plain["max_batch_size"], plain["max_seq_len"]) == (2, 3, 90)
    triton = read(out / "triton-speculation" / "tensorrt_llm" / "1" / "model.yaml")
    assert triton.pop("triton_config") == {"max_batch_size": 0, "decoupled": True}
    assert triton.pop("model") == "/srv/export/target"
    assert triton == {**plain, "speculative_config": config}
    export_for("trtllm", standalone, tmp_path / "two", tensor_parallel=1)
    config = read(tmp_path / "two" / "speculation.yaml")["speculative_config"]
    place = str(tmp_path / "two" / "draft")
    assert config == {"decoding_type": "Draft_Target", "max_draft_len": 5, "speculative_model": place}
    assert read(tmp_path / "two" / "plain.yaml")["max_seq_len"] == 512 - 6  # there are no more positions


def test_links_of_this_machine_are_not_followed_on_another(
    standalone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "srv").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate((tmp_path / "srv" / "export", Path("here/../srv/export"))):
        out = tmp_path / f"out{number}"
        export_for("vllm", standalone, out, tensor_parallel=1, place=place)
        assert f" vllm serve {tmp_path}/srv/export/target " in (out / "serve-plain.sh").read_text()


def command(files: dict[str, str], arm: str) -> list[str]:
    return shlex.split(files[f"serve-{arm}.sh"].split("exec ")[1])[:-2]


def test_commands_for_vllm() -> None:
    files = arm_files(settings("vllm"))
    plain, speculation = command(files, "plain"), command(files, "speculation")
    at = speculation.index("--speculative-config")
    assert plain == speculation[:at] + speculation[at + 2 :]
    assert plain == shlex.split(
        "vllm serve /srv/out/target --served-model-name target --tensor-parallel-size 2 --max-model-len 4096 "
        "--max-num-seqs 8 --gpu-memory-utilization 0.4 --host 127.0.0.1 --port"
    )
    head = {"method": "eagle3", "model": "/srv/out/draft", "num_speculative_tokens": 5, "draft_tensor_parallel_size": 2}
    assert json.loads(speculation[at + 1]) == head
    alone = command(arm_files(settings("vllm", taps=())), "speculation")
    assert json.loads(alone[alone.index("--speculative-config") + 1]) == {**head, "method": "draft_model"}


def test_commands_for_sglang() -> None:
    files = arm_files(settings("sglang"))
    plain, speculation = command(files, "plain"), command(files, "speculation")
    assert plain == shlex.split(
        "python3 -m sglang.launch_server --model-path /srv/out/target --served-model-name target --tp-size 2 "
        "--context-length 4096 --max-running-requests 8 --mem-fraction-static 0.4 --host 127.0.0.1 --port"
    )
    assert [word for word in speculation if word not in plain] == shlex.split(
        "--speculative-algorithm EAGLE3 --speculative-draft-model-path /srv/out/draft --speculative-num-steps 5 "
        "--speculative-eagle-topk 1 --speculative-num-draft-tokens 6"
    )
    assert "STANDALONE" in command(arm_files(settings("sglang", taps=())), "speculation")


@pytest.mark.parametrize(
    ("host", "changes", "engine"),
    [
        ("trtllm", {"taps": ()}, "--engine tensorrt_llm --tensor-parallel 2"),
        ("trtllm", {"tensor_parallel": 1}, "--engine torch --device cuda"),
        ("vllm", {"tensor_parallel": 1}, "--engine torch --device cuda"),
        ("trtllm", {}, None),
        ("vllm", {"taps": ()}, None),
        ("sglang", {}, None),
    ],
)
def test_the_arm_of_this_project(host: Any, changes: dict[str, Any], engine: str | None) -> None:
    facts = settings(host, **changes)
    files = arm_files(facts)
    assert ("serve-ssv.sh" in files) == (engine is not None) == (facts.without_ssv is None)
    if engine is None:
        assert f"There is no arm `ssv`: {facts.without_ssv}" in files["compare.sh"]
        assert "start ssv" not in files["compare.sh"]
    else:
        assert engine in files["serve-ssv.sh"]
        given = serve._parser().parse_args([*command(files, "ssv")[1:], "8012"])
        assert (given.bundle, given.openai_port, given.max_rows, given.max_length) == (facts.bundle, 8012, 8, 4096)


# --- the scripts, run with programs that stand for the engines --------------------------------------------------------

PROMPTS = __file__  # nobody reads it
PROGRAM = """#!/usr/bin/env bash
echo "$(basename "$0") $CUDA_VISIBLE_DEVICES $*" >> {log}
{does}
"""


def stand_ins(folder: Path, **does: str) -> dict[str, str]:
    """Environment in which programs of these names do something else; at no port does anybody answer yet."""
    folder.mkdir()
    if "curl" in does:
        does["curl"] = f"grep -qv '^curl ' {folder / 'log'} || exit 7\n{does['curl']}"
    for name, body in does.items():
        path = folder / name.replace("_", "-")
        path.write_text(PROGRAM.format(log=folder / "log", does=body))
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "-"}


def is_running(pid: int) -> bool:
    """Whether a process has not ended; that nobody has collected it yet is another matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def are_gone(pids: list[int]) -> bool:
    """Whether processes end, of which the last may have been told to just now."""
    patience = time.monotonic() + PATIENCE
    while any(map(is_running, pids)) and time.monotonic() < patience:
        time.sleep(0.01)
    return not any(map(is_running, pids))


# A worker of its own, as engines have: it must not outlive them.
SERVES = "sleep 3600 & echo $! >> {pids}; echo $$ >> {pids}; wait"


def test_all_arms_are_started_compared_and_ended(standalone: Path, tmp_path: Path) -> None:
    export_for("trtllm", standalone, tmp_path / "out", tensor_parallel=2)
    pids = tmp_path / "pids"
    serves = SERVES.format(pids=pids)
    programs = tmp_path / "bin"
    # An arm answers at the second asking.
    curl = f'port=${{@: -1}}; seen={tmp_path}/asked-${{port//[^0-9]/}}; [ -e "$seen" ] || {{ touch "$seen"; exit 7; }}'
    env = stand_ins(programs, trtllm_serve=serves, ssv_serve=serves, curl=curl, ssv_ab=f"cat {pids} | wc -l")
    done = subprocess.run(
        [tmp_path / "out" / "compare.sh", PROMPTS, "report", "--concurrency", "1,4"],
        env=env | {"SSV_GPUS": "6,7", "READY_SECONDS": "0900"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # nor what the shell has to say of arms that it ends
    log = [line.split(" ", 2) for line in (programs / "log").read_text().splitlines()]
    started = sorted((gpus, rest) for program, gpus, rest in log if program in ("trtllm-serve", "ssv-serve"))
    assert [gpus for gpus, _ in started] == ["0,1", "2,3", "6,7"]
    assert [rest.split()[-1] for _, rest in started] == ["8010", "8011", "8012"]
    (asked,) = [shlex.split(rest) for program, _, rest in log if program == "ssv-ab"]
    arms = [parse_arm(asked[i + 1]) for i, word in enumerate(asked) if word in ("--a", "--b", "--arm")]
    assert [(arm.name, arm.model, arm.gpus) for arm in arms] == [
        ("plain", "target", 2), ("speculation", "target", 2), ("ssv", "tiny", 2)
    ]  # fmt: skip
    ab_cli._parser().parse_args(asked)
    assert asked[-6:] == ["--prompts", PROMPTS, "--out", "report", "--concurrency", "1,4"]
    assert are_gone([int(pid) for pid in pids.read_text().split()])


def test_an_arm_that_ends_ends_the_comparison(standalone: Path, tmp_path: Path) -> None:
    export_for("trtllm", standalone, tmp_path / "out", tensor_parallel=1)
    pids = tmp_path / "pids"
    serves = SERVES.format(pids=pids)
    # Not before the two others run.
    dies = f'until [ "$(cat {pids} 2>/dev/null | wc -l)" = 4 ]; do sleep 0.01; done; exit 3'
    dies = f'case "$*" in *speculation.yaml*) {dies};; *) {serves};; esac'
    env = stand_ins(tmp_path / "bin", trtllm_serve=dies, ssv_serve=serves, curl='[[ "$*" == *8010* ]]', ssv_ab="exit 9")
    done = subprocess.run(
        [tmp_path / "out" / "compare.sh", PROMPTS, "o"], env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and done.stderr.startswith("error: speculation ended, see ")
    assert done.stderr.count("\n") == 1
    assert are_gone([int(pid) for pid in pids.read_text().split()])


def test_a_comparison_that_is_ended_ends_its_arms(standalone: Path, tmp_path: Path) -> None:
    export_for("trtllm", standalone, tmp_path / "out", tensor_parallel=1)
    pids, fifo = tmp_path / "pids", tmp_path / "compares"
    os.mkfifo(fifo)
    serves = SERVES.format(pids=pids)
    compares = f"echo $$ >> {pids}; echo > {fifo}; sleep 3600"
    env = stand_ins(tmp_path / "bin", trtllm_serve=serves, ssv_serve=serves, curl="exit 0", ssv_ab=compares)
    process = subprocess.Popen([tmp_path / "out" / "compare.sh", PROMPTS, "o"], env=env, stderr=subprocess.DEVNULL)
    fifo.read_text()  # ssv-ab has begun
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 143
    assert are_gone([int(pid) for pid in pids.read_text().split()])


def test_some_arms_with_further_options(standalone: Path, tmp_path: Path) -> None:
    """Also: what they counted is kept, and one that does not end when told to is ended."""
    export_for("vllm", standalone, tmp_path / "out", tensor_parallel=1)
    pids, logs = tmp_path / "pids", tmp_path / "logs"
    stays = f"trap '' TERM; echo $$ >> {pids}; echo serving; while :; do sleep 0.1; done"
    curl = """while [ "$1" != -o ]; do shift; done; [ "$2" = /dev/null ] || echo "of ${@: -1}" > "$2" """
    env = stand_ins(tmp_path / "bin", vllm=stays, curl=curl, ssv_ab=f'until [ "$(wc -l < {pids})" = 2 ]; do :; done')
    env |= {"ARMS": "speculation plain", "ENGINE_OPTIONS": "--kv-cache-memory-bytes 8G", "LOGS": str(logs)}
    done = subprocess.run(
        [tmp_path / "out" / "compare.sh", PROMPTS, "o"],
        env=env | {"STOP_SECONDS": "0", "PLAIN_GPUS": "5"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    log = [line.split(" ", 2) for line in (tmp_path / "bin" / "log").read_text().splitlines()]
    served = {rest.split("--port ")[1]: gpus for program, gpus, rest in log if program == "vllm"}
    assert served == {"8010 --kv-cache-memory-bytes 8G": "5", "8011 --kv-cache-memory-bytes 8G": "1"}
    (asked,) = [shlex.split(rest) for program, _, rest in log if program == "ssv-ab"]
    assert [parse_arm(asked[i + 1]).name for i, word in enumerate(asked) if word in ("--a", "--b")] == [
        "speculation", "plain"
    ]  # fmt: skip
    assert (logs / "plain.metrics").read_text() == "of http://127.0.0.1:8010/metrics\n"
    assert (logs / "speculation.metrics").read_text() == "of http://127.0.0.1:8011/metrics\n"
    assert (logs / "plain.log").read_text() == "serving\n"
    assert are_gone([int(pid) for pid in pids.read_text().split()])


@pytest.mark.parametrize(
    ("arms", "named"),
    [
        ("plain other", "there is no arm other, but plain speculation ssv"),
        ("plain", "names one arm"),
        ("plain ssv plain ssv", "error: ARMS names an arm twice: plain ssv\n"),
    ],
)
def test_arms_that_cannot_be_compared(arms: str, named: str, standalone: Path, tmp_path: Path) -> None:
    export_for("vllm", standalone, tmp_path / "out", tensor_parallel=1)
    env = stand_ins(tmp_path / "bin", vllm="exit 9", ssv_serve="exit 9") | {"ARMS": arms}
    done = subprocess.run([tmp_path / "out" / "compare.sh", PROMPTS, "o"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr
    assert not (tmp_path / "bin" / "log").exists()


@pytest.mark.parametrize("name", ["READY_SECONDS", "STOP_SECONDS"])
@pytest.mark.parametrize("seconds", ["10m", "1.5", "-1", "soon", "ready", "1e3", " 5", "9" * 20])
def test_how_long_arms_may_take_is_a_whole_number(name: str, seconds: str, standalone: Path, tmp_path: Path) -> None:
    export_for("vllm", standalone, tmp_path / "out", tensor_parallel=1)
    env = stand_ins(tmp_path / "bin", vllm="exit 9", ssv_serve="exit 9") | {name: seconds}
    done = subprocess.run(
        [tmp_path / "out" / "compare.sh", PROMPTS, "o"], env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {name} is '{seconds}', which is no whole number of seconds\n"
    assert not (tmp_path / "bin" / "log").exists()


def test_an_arm_that_is_not_ready_in_time_ends_the_comparison(standalone: Path, tmp_path: Path) -> None:
    export_for("vllm", standalone, tmp_path / "out", tensor_parallel=1)
    env = stand_ins(tmp_path / "bin", vllm="sleep 3600", ssv_serve="sleep 3600", curl="exit 7", ssv_ab="exit 9")
    done = subprocess.run(
        [tmp_path / "out" / "compare.sh", PROMPTS, "o"],
        env=env | {"READY_SECONDS": "00"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: plain is not ready, see ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("missing", "curl", "prompts", "named"),
    [
        ("curl", "exit 7", PROMPTS, "curl is not installed here"),
        ("ssv-ab", "exit 7", PROMPTS, "ssv-ab is not installed here"),
        ("", "exit 7", "/nowhere/prompts.jsonl", "/nowhere/prompts.jsonl cannot be read"),
        ("", '[[ "$*" == *8011* ]] || exit 7', PROMPTS, "port 8011, which is for speculation, is in use"),
        ("", '[[ "$*" != *8010* ]] || exit 28', PROMPTS, "port 8010, which is for plain, is in use"),  # but is silent
    ],
)
def test_no_arm_is_started_in_vain(
    missing: str, curl: str, prompts: str, named: str, standalone: Path, tmp_path: Path
) -> None:
    export_for("vllm", standalone, tmp_path / "out", tensor_parallel=1)
    programs = tmp_path / "bin"
    env = stand_ins(programs, vllm="exit 9", ssv_serve="exit 9", ssv_ab="exit 9", curl="")
    (programs / "curl").write_text(f"#!/usr/bin/env bash\n{curl}\n")
    for name in ("bash", "dirname", "mktemp", "mkdir", "sort", "uniq"):
        (programs / name).symlink_to(Path(shutil.which(name) or name).resolve())
    if missing:
        (programs / missing).unlink()
    done = subprocess.run(
        [tmp_path / "out" / "compare.sh", prompts, "o"],
        env=env | {"PATH": str(programs), "LOGS": str(tmp_path)}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2 and named in done.stderr
    assert not (programs / "log").exists()


def test_benchmarks_of_tensorrt_llm(conditioned: Path, tmp_path: Path) -> None:
    export_for("trtllm", conditioned, tmp_path / "out", tensor_parallel=1)
    env = stand_ins(tmp_path / "bin", trtllm_bench="exit 0")
    subprocess.run([tmp_path / "out" / "bench-speculation.sh", "data set.txt"], env=env, check=True)
    out = tmp_path / "out"
    assert (tmp_path / "bin" / "log").read_text() == (
        f"trtllm-bench - --model tiny --model_path {out}/target throughput --config {out}/speculation.yaml --dataset "
        "data set.txt\n"
    )


# --- the command, and what is refused -------------------------------------------------------------------------------


def test_the_command_says_what_is_left_out(
    conditioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "vllm", str(conditioned), "--tp", "2", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    document = json.loads((tmp_path / "out" / "export.json").read_text())
    assert document["engine"] == "vLLM" and document["arms"] == ["plain", "speculation"]
    for each, begins in zip(
        document["left_out"],
        ("the scorer", "the tiers balanced and turbo", "Medusa's heads", "the arm ssv"),
        strict=True,
    ):
        assert each.startswith(begins) and f"note: not exported: {each}" in said
    assert main(["export", "vllm", str(conditioned), "--out", str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_comparison_says_what_ssv_ab_says(standalone: Path, tmp_path: Path) -> None:
    export_for("vllm", standalone, tmp_path / "out", tensor_parallel=2)
    env = stand_ins(tmp_path / "bin", vllm="sleep 3600", curl="exit 0", ssv_ab="exit 4")
    assert subprocess.run([tmp_path / "out" / "compare.sh", PROMPTS, "o"], env=env, timeout=PATIENCE).returncode == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["eagle3", "--tp", "2"], "--tp is for an engine, and eagle3 is a layout"),
        (["speculators", "--memory-share", "0.5"], "--memory-share is for an engine"),
        (["vllm", "--verifier", "me"], "--verifier is for a layout"),
        (["vllm", "--memory-share", "1.5"], "a share of memory of 1.5"),
        (["vllm", "--num-draft-tokens", "512"], "give fewer than 511 with --num-draft-tokens"),
        (["sglang", "--tp", "3"], "choose --tp from 1, 2, 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], named: str, conditioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *arguments, "--bundle", str(conditioned), "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_draft_that_joins_in_our_way_is_for_vllm_alone(tmp_path: Path) -> None:
    """It takes a layer more, and the others run one."""
    bundle = built_with(tmp_path, "join: input")
    for host in ("trtllm", "sglang"):
        with pytest.raises(UserError, match="joins token and features before its first layer"):
            export_for(host, bundle, tmp_path / "out", tensor_parallel=1)
    assert not (tmp_path / "out").exists()
    export_for("vllm", bundle, tmp_path / "out", tensor_parallel=2)
    target = Decoder.from_weights(*load_checkpoint(bundle / "target"))
    draft = load_draft(bundle / "draft" / "draft.safetensors", target)
    layers = read_eagle3(tmp_path / "out" / "draft", target).spec.decoder
    assert layers.num_layers == draft.spec.decoder.num_layers + 1 and layers.num_kv_heads == layers.num_heads


def test_a_head_that_covers_a_part_of_the_vocabulary_is_refused_of_a_language_model(tmp_path: Path) -> None:
    bundle = built_with(tmp_path, "kind: standalone")
    with pytest.raises(UserError, match=r"covers 48 of 112 tokens.*head_size: null"):
        export_for("vllm", bundle, tmp_path / "out", tensor_parallel=1)


@pytest.mark.parametrize(
    ("taps", "options", "named"),
    [
        (1, {}, "a single tapped layer, which TensorRT-LLM leaves out"),
        (2, {"embedding": torch.randn(112, 64)}, "an embedding of its own, which TensorRT-LLM leaves out"),
        (2, {"norm_before_residual": True}, "norm_before_residual, which is not exported for TensorRT-LLM"),
    ],
)
def test_what_tensorrt_llm_leaves_out_is_refused(
    taps: int, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    head = published("eagle3", num_taps=taps, **options)
    head.config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(range(taps))}
    head.write(tmp_path / "head")
    recipe = write_recipe(tmp_path)
    recipe.write_text(
        "name: tiny\ntarget: {path: target}\ndraft: {folder: head}\nscorer: null\n"
        "calibration: {make: {prompts_file: prompts.jsonl, limits: {}}}\nprecision: fp32\n"
    )
    build(recipe, tmp_path / "bundle")
    with pytest.raises(UserError, match=named):
        export_for("trtllm", tmp_path / "bundle", tmp_path / "out", tensor_parallel=1)
    export_for("vllm", tmp_path / "bundle", tmp_path / "out", tensor_parallel=1)


def test_a_disk_that_fills_leaves_nothing(conditioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssv.builder.export.save_whole", full)
    with pytest.raises(OSError, match="No space left"):
        export_for("vllm", conditioned, tmp_path / "out", tensor_parallel=1)
    assert not list(tmp_path.iterdir())


# --- bundles that are changed -----------------------------------------------------------------------------------------


def copy_bundle(source: Path, place: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            to = place / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())


def sign(bundle: Path, name: str, **facts: Any) -> None:
    """Has the manifest say what a file is now."""
    document = json.loads((bundle / MANIFEST_NAME).read_text())
    document["files"][name] = file_entry(bundle / name).model_dump()
    (bundle / MANIFEST_NAME).write_text(json.dumps({**document, **facts}))
