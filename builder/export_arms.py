"""What an export says to other engines: commands, settings, and a script that compares all arms.

Three arms: `plain`, the engine alone; `speculation`, the engine with the bundle's draft; `ssv`, this project's. They
have the same target, the same limits and the same share of memory. Each is a script `serve-ARM.sh` in the folder of the
export; `compare.sh` starts them, waits until they answer, and hands them to `ssv-ab`.

Where options were read: vLLM, docs/features/speculative_decoding/draft_model.md at commit 04329df and the page "EAGLE
Draft Models"; SGLang, the pages "Server Arguments" and "Speculative Decoding"; for both, public tests that start them.
TensorRT-LLM, tensorrt_llm/commands/serve.py at commit 00209af and the page of trtllm-bench of 1.3.0rc26.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ssv.builder.trtllm_settings import (
    CudaGraphConfig,
    DraftTargetDecodingConfig,
    Eagle3DecodingConfig,
    KvCacheConfig,
    LlmArgs,
    TritonModel,
    settings_yaml,
)

Host = Literal["trtllm", "vllm", "sglang"]

ARMS = ("plain", "speculation", "ssv")
PROGRAMS: dict[Host, str] = {"trtllm": "trtllm-serve", "vllm": "vllm serve", "sglang": "sglang.launch_server"}
FIRST_PORT = 8010
READY_SECONDS = 1800
"""That an arm may take to start, unless the variable of that name says otherwise."""
STOP_SECONDS = 60
"""The same of its end."""
LEAST_PASS = 8192
"""Tokens of a pass that a prompt's are cut to, TensorRT-LLM's own default."""


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What all arms are started with.

    Attributes:
        place: where the exported folder will lie on the machine that serves.
        bundle: what the arm `ssv` serves.
        name: that the model is asked for by.
        taps: layers of the target whose outputs the draft sees, from 0; none of a standalone draft.
        tensor_parallel: GPUs of an arm.
        num_draft_tokens: of a chain.
        max_rows, max_length: requests at a time, and tokens of prompt and output together.
        memory_share: of a GPU's memory for an arm; of what is free, with TensorRT-LLM.
    """

    host: Host
    place: Path
    bundle: Path
    name: str
    taps: tuple[int, ...]
    tensor_parallel: int
    num_draft_tokens: int
    max_rows: int
    max_length: int
    memory_share: float

    @property
    def target(self) -> str:
        """Folder of the exported target."""
        return str(self.place / "target")

    @property
    def draft(self) -> str:
        """Folder of the exported draft."""
        return str(self.place / "draft")

    @property
    def without_ssv(self) -> str | None:
        """Why there is no arm of this project; None if there is one."""
        if self.tensor_parallel == 1 or (self.host == "trtllm" and not self.taps):
            return None
        if self.host == "trtllm":
            return (
                "the draft sees hidden states of the target, which TensorRT-LLM hands to no drafter but its own, and "
                "this project's engines run on one GPU"
            )
        return f"this project's engines run on one GPU, and it has no drafter for {self.host}"

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms that are compared; without ssv's own where it cannot run."""
        return ARMS if self.without_ssv is None else ARMS[:2]


def arm_files(settings: HostSettings) -> dict[str, str]:
    """Contents of the scripts and settings of an export, by their names; those that end with .sh are programs."""
    files = {f"serve-{arm}.sh": _script(_command(settings, arm)) for arm in settings.arms}
    if settings.host == "trtllm":
        for arm in ARMS[:2]:
            files[f"{arm}.yaml"] = settings_yaml(_llm_args(settings, arm))
            triton = TritonModel(model=settings.target, **_llm_args(settings, arm).model_dump())
            files[f"triton-{arm}/tensorrt_llm/1/model.yaml"] = settings_yaml(triton)
            files[f"bench-{arm}.sh"] = _script(
                ["trtllm-bench", "--model", settings.name, "--model_path", settings.target, "throughput"],
                ["--config", str(settings.place / f"{arm}.yaml"), "--dataset"],
                takes='"${1:?usage: $0 DATASET, as trtllm-bench prepare-dataset writes it}"',
            )
    return {**files, "compare.sh": _compare(settings)}


# --- commands -------------------------------------------------------------------------------------------------------


def _command(settings: HostSettings, arm: str) -> list[str]:
    """What starts an arm but for its port, whose option stands last."""
    if arm == "ssv":
        return _ssv(settings)
    return {"trtllm": _trtllm, "vllm": _vllm, "sglang": _sglang}[settings.host](settings, arm == "speculation")


def _trtllm(settings: HostSettings, speculates: bool) -> list[str]:
    config = settings.place / ("speculation.yaml" if speculates else "plain.yaml")
    return ["trtllm-serve", settings.target, "--config", str(config), "--host", "127.0.0.1", "--port"]


def _vllm(settings: HostSettings, speculates: bool) -> list[str]:
    command = ["vllm", "serve", settings.target, "--served-model-name", "target"]
    command += ["--tensor-parallel-size", str(settings.tensor_parallel), "--max-model-len", str(settings.max_length)]
    command += ["--max-num-seqs", str(settings.max_rows), "--gpu-memory-utilization", str(settings.memory_share)]
    if speculates:
        config = {
            "method": "eagle3" if settings.taps else "draft_model",
            "model": settings.draft,
            "num_speculative_tokens": settings.num_draft_tokens,
            "draft_tensor_parallel_size": settings.tensor_parallel,
        }
        command += ["--speculative-config", json.dumps(config)]
    return [*command, "--host", "127.0.0.1", "--port"]


def _sglang(settings: HostSettings, speculates: bool) -> list[str]:
    command = ["python3", "-m", "sglang.launch_server", "--model-path", settings.target]
    command += ["--served-model-name", "target", "--tp-size", str(settings.tensor_parallel)]
    command += ["--context-length", str(settings.max_length), "--max-running-requests", str(settings.max_rows)]
    command += ["--mem-fraction-static", str(settings.memory_share)]
    if speculates:
        command += ["--speculative-algorithm", "EAGLE3" if settings.taps else "STANDALONE"]
        command += ["--speculative-draft-model-path", settings.draft]
        command += ["--speculative-num-steps", str(settings.num_draft_tokens), "--speculative-eagle-topk", "1"]
        # The token that is judged with them counts here.
        command += ["--speculative-num-draft-tokens", str(settings.num_draft_tokens + 1)]
    return [*command, "--host", "127.0.0.1", "--port"]


def _ssv(settings: HostSettings) -> list[str]:
    command = ["ssv-serve", "--bundle", str(settings.bundle)]
    if settings.host == "trtllm" and not settings.taps:
        command += ["--engine", "tensorrt_llm", "--tensor-parallel", str(settings.tensor_parallel)]
    else:
        command += ["--engine", "torch", "--device", "cuda"]
    command += ["--max-rows", str(settings.max_rows), "--max-length", str(settings.max_length)]
    command += ["--ready-timeout", str(READY_SECONDS)]
    # Beside the port that answers, of Triton, which nobody asks here.
    for index, option in enumerate(("--http-port", "--grpc-port", "--metrics-port")):
        command += [option, str(FIRST_PORT + 10 + index)]
    return [*command, "--openai-port"]


def _llm_args(settings: HostSettings, arm: str) -> LlmArgs:
    drafted = settings.num_draft_tokens if arm == "speculation" else 0
    speculation: Eagle3DecodingConfig | DraftTargetDecodingConfig | None = None
    if drafted and settings.taps:
        speculation = Eagle3DecodingConfig(
            max_draft_len=drafted,
            speculative_model=settings.draft,
            eagle3_layers_to_capture=list(settings.taps),
        )
    elif drafted:
        speculation = DraftTargetDecodingConfig(max_draft_len=drafted, speculative_model=settings.draft)
    return LlmArgs(
        tensor_parallel_size=settings.tensor_parallel,
        max_batch_size=settings.max_rows,
        max_seq_len=settings.max_length,
        max_num_tokens=max(LEAST_PASS, settings.max_rows * (1 + drafted)),
        kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=settings.memory_share),
        cuda_graph_config=CudaGraphConfig(max_batch_size=settings.max_rows),
        speculative_config=speculation,
    )


# --- scripts --------------------------------------------------------------------------------------------------------


def _script(*parts: list[str], takes: str = '"${1:?usage: $0 PORT [more options]}" "${@:2}"') -> str:
    """A script that becomes a command, with arguments of its own at the end."""
    command = " ".join(shlex.quote(word) for part in parts for word in part)
    return f"#!/usr/bin/env bash\nset -euo pipefail\nexec {command} {takes}\n"


_COMPARE = """#!/usr/bin/env bash
# Starts the arms, waits until each answers, and compares them: compare.sh PROMPTS.jsonl OUT [options of `ssv-ab run`]
# ARMS: which of them, such as "plain speculation". GPUs of each arm: PLAIN_GPUS and so on, a comma between.
# ENGINE_OPTIONS: more options for {program}, in the arms plain and speculation alike.
# LOGS: folder for what the arms print, and for their /metrics at the end.
# READY_SECONDS, STOP_SECONDS: how long they may take to start, and to end; whole numbers.
{missing}set -euo pipefail
set -m  # each arm in a process group of its own, so that its workers end with it
here=$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)
prompts=${{1:?usage: $0 PROMPTS.jsonl OUT [options of ssv-ab run]}} out=${{2:?OUT, the folder of the report}}
shift 2
read -ra arms <<<"${{ARMS:-{arms}}}"
read -ra engine_options <<<"${{ENGINE_OPTIONS:-}}"
READY_SECONDS=${{READY_SECONDS:-{ready}}} STOP_SECONDS=${{STOP_SECONDS:-{stops}}}
for name in READY_SECONDS STOP_SECONDS; do
  if [[ ! ${{!name}} =~ ^[0-9]{{1,9}}$ ]]; then
    echo "error: $name is '${{!name}}', which is no whole number of seconds" >&2
    exit 2
  fi
done
ready=$((10#$READY_SECONDS)) stops=$((10#$STOP_SECONDS))  # or 010 would be eight
logs=${{LOGS:-$(mktemp -d)}}
mkdir -p "$logs"
groups=() addresses=()

{table}
for arm in "${{arms[@]}}"; do
  if [[ -z ${{port[$arm]:-}} ]]; then echo "error: there is no arm $arm, but {arms}" >&2; exit 2; fi
done
if ((${{#arms[@]}} < 2)); then echo "error: ARMS names one arm, and two are compared" >&2; exit 2; fi
twice=$(printf '%s\n' "${{arms[@]}}" | sort | uniq -d)
if [[ -n $twice ]]; then echo "error: ARMS names an arm twice:" $twice >&2; exit 2; fi
# What would otherwise be found when all arms have been loaded, or never.
for program in curl ssv-ab; do
  if ! type -P "$program" >/dev/null; then echo "error: $program is not installed here" >&2; exit 2; fi
done
if [[ ! -r $prompts ]]; then echo "error: $prompts cannot be read" >&2; exit 2; fi
for arm in "${{arms[@]}}"; do
  status=0
  curl -sS -m 10 -o /dev/null "http://127.0.0.1:${{port[$arm]}}/v1/models" 2>/dev/null || status=$?
  if ((status != 7)); then  # 7: nobody listens there; another server would be compared in the arm's place
    echo "error: port ${{port[$arm]}}, which is for $arm, is in use" >&2
    exit 2
  fi
done

stop() {{
  trap '' INT TERM
  exec 2>/dev/null  # what the shell says of each arm that it ends, with the line of this script
  for group in ${{groups[@]+"${{groups[@]}}"}}; do kill -TERM -- "-$group" || true; done
  for ((left = 10 * stops; left > 0; left--)); do
    if [[ -z $(jobs -r) ]]; then break; fi
    sleep 0.1
  done
  for group in ${{groups[@]+"${{groups[@]}}"}}; do kill -KILL -- "-$group" || true; done
  wait || true
}}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() {{  # ARM
  local options=()
  if [[ $1 != ssv ]]; then options=(${{engine_options[@]+"${{engine_options[@]}}"}}); fi
  CUDA_VISIBLE_DEVICES=${{gpus[$1]}} "$here/serve-$1.sh" "${{port[$1]}}" ${{options[@]+"${{options[@]}}"}} \\
    >"$logs/$1.log" 2>&1 &
  groups+=("$!")
}}

await() {{  # ARM PROCESS
  until curl -fsS -o /dev/null "http://127.0.0.1:${{port[$1]}}/v1/models" 2>/dev/null; do
    if ! kill -0 "$2" 2>/dev/null; then echo "error: $1 ended, see $logs/$1.log" >&2; exit 1; fi
    if ((SECONDS > ready)); then echo "error: $1 is not ready, see $logs/$1.log" >&2; exit 1; fi
    sleep 0.5
  done
}}

for arm in "${{arms[@]}}"; do start "$arm"; done
for index in "${{!arms[@]}}"; do
  arm=${{arms[index]}}
  await "$arm" "${{groups[index]}}"
  options=(--a --b)
  addresses+=("${{options[index]:---arm}}" "$arm=http://127.0.0.1:${{port[$arm]}}/v1?${{query[$arm]}}")
done
ssv-ab run "${{addresses[@]}}" --prompts "$prompts" --out "$out" "$@" &
groups+=("$!")
status=0
wait "${{groups[-1]}}" || status=$?  # and not in the foreground, where a signal would wait for it
for arm in "${{arms[@]}}"; do
  curl -fsS -m 10 -o "$logs/$arm.metrics" "http://127.0.0.1:${{port[$arm]}}/metrics" 2>/dev/null || true
done
exit "$status"
"""


def _compare(settings: HostSettings) -> str:
    size, arms = settings.tensor_parallel, settings.arms
    port, gpus, query = [], [], []
    for index, arm in enumerate(arms):
        taken = ",".join(str(index * size + gpu) for gpu in range(size))
        model = quote(settings.name) if arm == "ssv" else "target"
        port.append(f"[{arm}]={FIRST_PORT + index}")
        gpus.append(f'[{arm}]="${{{arm.upper()}_GPUS:-{taken}}}"')
        query.append(f"[{arm}]={shlex.quote(f'model={model}&gpus={size}')}")
    why = settings.without_ssv
    named = (("port", port), ("gpus", gpus), ("query", query))
    return _COMPARE.format(
        ready=READY_SECONDS,
        stops=STOP_SECONDS,
        program=PROGRAMS[settings.host],
        missing=f"# There is no arm `ssv`: {why}.\n" if why is not None else "",
        arms=" ".join(arms),
        table="\n".join(f"declare -A {name}=({' '.join(values)})" for name, values in named),
    )
