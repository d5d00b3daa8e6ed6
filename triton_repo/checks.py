"""What can be known to fail before anything is started, so that it is said at once and by its name."""

from __future__ import annotations

import argparse
import ctypes
import errno
import importlib.metadata
import importlib.util
import os
import re
import socket
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ssv.bundle.manifest import Manifest
from ssv.runtime.request import RequestError
from ssv.runtime.serving.config import ServerConfig
from ssv.runtime.serving.live_audit import read_state
from ssv.runtime.serving.tls import certificate_name
from ssv.runtime.trtllm.install import installed_trtllm
from ssv.support.errors import UserError
from ssv.support.precisions import TORCH_PRECISIONS

_WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.625, "fp16": 2.0, "fp8": 1.0}
_CACHE_BYTES = {"fp32": 4, "int8": 4, "int4": 4}
"""Of a number in the cache on a CPU; 2 otherwise."""

_CONVERSATION = (
    {"role": "user", "content": "What a user says."},
    {"role": "assistant", "content": "What is answered."},
    {"role": "user", "content": "What is said then."},
)
"""What any chat template takes: some know no system message."""

# As browsers send them: without path, not even a slash, and what pages of no host have.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")

_LEAST_SHARED_MEMORY = 16 << 20

_CGROUP = Path("/sys/fs/cgroup")


class ServeError(UserError):
    """The server cannot be run; the message says why."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU is, as far as engines ask.

    Attributes:
        capability: such as "9.0".
        num_bytes: of its memory.
    """

    capability: str
    num_bytes: int


def check_options(args: argparse.Namespace) -> None:
    """Options that contradict each other or cannot be.

    Raises:
        ServeError.
    """
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ServeError("--tls-cert and --tls-key belong together", "give both")
    used = list(ports(args).values())
    if len(set(used)) < len(used) or not all(0 < port < 65536 for port in used):
        raise ServeError(f"ports {used} must be different, and between 1 and 65535", "choose others")
    for option, least in (("ready_timeout", 0.0), ("drain_timeout", 0.0), ("restarts", 0)):
        if not getattr(args, option) >= least:
            name = option.replace("_", "-")
            raise ServeError(f"--{name} {getattr(args, option)} must be {least:g} or more", "choose another")
    if args.engine == "torch" and args.precision not in (None, *TORCH_PRECISIONS):
        known = ", ".join(TORCH_PRECISIONS)
        raise ServeError(f"--precision {args.precision} is none of the torch engine's ({known})", "choose one of them")
    if args.engine != "tensorrt_llm" and args.tensor_parallel != 1:
        raise ServeError("--tensor-parallel is of TensorRT-LLM", "use --engine tensorrt_llm, or leave it out")
    if args.gpu_memory_share is not None and (args.device != "cuda" or args.engine != "torch"):
        raise ServeError("--gpu-memory-share is of --engine torch --device cuda", "leave it out")
    if args.engine == "tensorrt_llm":
        _check_trtllm(args)
    _check_openai(args)


def _check_openai(args: argparse.Namespace) -> None:
    """Raises ServeError: an option of the OpenAI API without it, or an origin that no browser names so."""
    for name in ("api_key_file", "allowed_origins"):
        if getattr(args, name) and args.openai_port is None:
            option = f"--{name.replace('_', '-')}"
            raise ServeError(f"{option} is of the OpenAI API, which is not served", "give --openai-port")
    for origin in args.allowed_origins or ():
        if not _ORIGIN.fullmatch(origin):
            raise ServeError(
                f"--allowed-origins {origin!r} is no origin that a browser sends",
                "give scheme and host, and the port where an address has one: https://app.example, or *",
            )


def _check_trtllm(args: argparse.Namespace) -> None:
    """Raises ServeError, TrtllmError: TensorRT-LLM is missing or another version, or an option is given that it has no
    use for."""
    installed_trtllm()
    unused = {
        "prefill_chunk": "it cuts prompts as it likes",
        "prompt_cache_mb": "it keeps beginnings of prompts in its own cache",
        "audit_share": "it judges every token, so that nothing is left to be audited",
        "threads": "it runs on GPUs",
    }
    for name, why in unused.items():
        if getattr(args, name) != ServerConfig.model_fields[name].default:
            option = f"--{name.replace('_', '-')}"
            raise ServeError(f"{option} means nothing to TensorRT-LLM: {why}", "leave it out")
    if args.precision not in (None, "bf16"):
        raise ServeError(f"--precision {args.precision}: TensorRT-LLM runs a bundle's target in bf16", "leave it out")


def ports(args: argparse.Namespace) -> dict[str, int]:
    """Ports by the option that says them."""
    given = {f"--{kind}-port": getattr(args, f"{kind}_port") for kind in ("http", "grpc", "metrics", "openai")}
    return {option: port for option, port in given.items() if port is not None}


def checked_chat_template(path: Path, bundle: Path) -> str:
    """The text of a chat template, tried on a small conversation with the bundle's tokenizer.

    Raises:
        ServeError: it cannot be read, is no UTF-8, does not compile, or refuses the conversation or leaves some of it
            out.
        UserError: the bundle's tokenizer cannot be read.
    """
    from jinja2 import TemplateSyntaxError  # with the libraries, which ssv-serve does without

    from ssv.runtime.tokenizer import BundleTokenizer
    from ssv.runtime.tokenizer_files import FileTokenizer

    cure = "mend it, or leave --chat-template out"
    try:
        source = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise ServeError(f"--chat-template {path} is not UTF-8 ({why})", "save it as UTF-8") from error
    except OSError as error:
        raise ServeError(f"--chat-template {path} cannot be read ({error.strerror})", "give a text file") from error
    own = FileTokenizer.load(bundle / "tokenizer")
    tokenizer = BundleTokenizer(FileTokenizer(own.backend, own.special_tokens, source))
    try:
        text = tokenizer.render(_CONVERSATION)
        tokenizer.chat_ids(_CONVERSATION)
    except RequestError as error:
        if isinstance(wrong := error.__cause__, TemplateSyntaxError):
            raise ServeError(f"--chat-template {path}, line {wrong.lineno}: {wrong.message}", cure) from error
        raise ServeError(f"--chat-template {path} fails on a small conversation ({wrong})", cure) from error
    if left_out := [message["role"] for message in _CONVERSATION if message["content"] not in text]:
        raise ServeError(f"--chat-template {path} leaves out what is said by: {', '.join(left_out)}", cure)
    return source


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Raises ServeError: files that cannot be read, are not PEM, do not belong together, or have no name."""
    if certificate is None or key is None:
        return
    for path in (certificate, key):
        if not path.is_file():
            raise ServeError(f"{path} is not a file", "give the path of a PEM file")
        try:
            path.open("rb").close()
        except OSError as error:
            raise ServeError(
                f"{path} cannot be read ({error.strerror})", "give a file that this user may read"
            ) from error
    try:
        certificate_name(certificate, key)
    except UserError as error:
        raise ServeError(f"--tls-cert and --tls-key: {error.what}", error.cure) from error


def check_audit_state(path: Path | None) -> None:
    """Raises ServeError, or what `read_state` does: a file that cannot be used, or that could not be written."""
    if path is None:
        return
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ServeError(f"--audit-state {path} cannot be written", "give a file in a folder that can be written to")
    read_state(path)


def listen(host: str, local: bool, args: argparse.Namespace) -> dict[str, socket.socket]:
    """Takes the ports that ssv-serve itself listens on, by kind (http, metrics), and makes sure that the others are
    free.

    Args:
        local: whether HTTP stays on this machine.

    Raises:
        ServeError: a port is taken, or the host is not this machine's.
    """
    if not host:
        raise ServeError("--host is empty", "give an address of this machine")
    found: dict[str, socket.socket] = {}
    with ExitStack() as stack:
        for option, port in ports(args).items():
            kind = option.removeprefix("--").removesuffix("-port")
            opened = _listen("127.0.0.1" if kind == "http" and local else host, port, option)
            if kind in ("http", "metrics"):
                found[kind] = opened
                stack.callback(opened.close)
            else:
                opened.close()
        stack.pop_all()
    return found


def _listen(host: str, port: int, option: str) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no name of a host at all
        why = error.strerror if isinstance(error, OSError) else error
        raise ServeError(f"--host {host} is not a name that is known here ({why})", "choose another") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"{option} {port} is taken on {host}", "choose another, or end what listens there"
            ) from error
        if error.errno == errno.EACCES:
            raise ServeError(f"{option} {port} is not for this user", "choose one above 1023") from error
        raise ServeError(
            f"--host {host} is not an address of this machine ({error.strerror})", "choose another"
        ) from error


def check_machine(config: ServerConfig, manifest: Manifest) -> None:
    """Whether this machine can run the bundle: device, engines, precision, memory.

    Raises:
        ServeError.
    """
    shared = Path("/dev/shm")  # noqa: S108
    if shared.is_dir() and psutil.disk_usage(str(shared)).free < _LEAST_SHARED_MEMORY:
        raise ServeError(
            f"{shared} has less than {_LEAST_SHARED_MEMORY >> 20} MiB free, which Triton's Python models need",
            "give it more (docker: --shm-size)",
        )
    on_gpu = config.device == "cuda" or config.engine != "torch"
    device = gpu() if on_gpu else None
    if on_gpu and device is None:
        why = f"--engine {config.engine}" if config.engine != "torch" else "--device cuda"
        raise ServeError(
            f"{why}: this machine has no NVIDIA GPU that a driver shows", "use --engine torch --device cpu"
        )
    if config.engine == "tensorrt":
        _check_engines(config, manifest, device)
    elif on_gpu and "+cpu" in (version := importlib.metadata.version("torch")):
        raise ServeError(f"--device cuda: torch {version} has no CUDA", "use a build of torch that has")
    needed = memory_needed(config, manifest) // config.tensor_parallel
    if device is None:
        there, whose = free_memory(), "this machine's free memory"
    elif config.engine == "torch":
        share = config.gpu_memory_share
        there, whose = int(share * device.num_bytes), f"--gpu-memory-share {share:g} of the GPU's memory"
    else:
        there, whose = device.num_bytes, "the GPU's memory"
    if needed > there:
        raise ServeError(
            f"{config.max_rows} rows of {config.max_length} tokens and the model's weights need {needed / 2**30:.1f} "
            f"GiB, {whose} is {there / 2**30:.1f} GiB",
            _what_fits(config, manifest, there),
        )


def _what_fits(config: ServerConfig, manifest: Manifest, num_bytes: int) -> str:
    """What there is memory for instead."""

    def most(name: str, value: int) -> int:
        def is_too_much(tried: int) -> bool:
            return memory_needed(config.model_copy(update={name: tried}), manifest) > num_bytes * config.tensor_parallel

        return bisect_left(range(1, value + 1), True, key=is_too_much)

    found = {"--max-rows": most("max_rows", config.max_rows), "--max-length": most("max_length", config.max_length)}
    sizes = [f"{option} {value}" for option, value in found.items() if value]
    return f"give at most {' or '.join(sizes)}, or a smaller --prompt-cache-mb" if sizes else "serve a smaller model"


def _check_engines(config: ServerConfig, manifest: Manifest, device: Gpu | None) -> None:
    for role in ("target", "draft"):
        entries = [entry for entry in manifest.engines.values() if entry.role == role]
        if not entries:
            raise ServeError(
                f"--engine tensorrt: the bundle has no engine of the {role}", "build one with `ssv-build compile`"
            )
        entries = [entry for entry in entries if config.precision in ("", entry.precision)]
        if not entries:
            known = ", ".join(sorted({entry.precision for entry in manifest.engines.values() if entry.role == role}))
            raise ServeError(
                f"--precision {config.precision}: engines of the {role} are in {known}", "choose one of these"
            )
        if device is not None and not any(device.capability in entry.compute_capabilities for entry in entries):
            built = ", ".join(sorted({one for entry in entries for one in entry.compute_capabilities}))
            raise ServeError(
                f"engines of the {role} are for compute capability {built}, this GPU has {device.capability}",
                "build them for it",
            )
        modules = {"tensorrt_rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
        if not any(importlib.util.find_spec(modules[entry.flavor]) for entry in entries):
            raise ServeError(f"--engine tensorrt: {entries[0].flavor} is not installed", "pip install 'ssv[engines]'")
        most = max(entry.max_batch for entry in entries)
        if config.max_rows > most:
            raise ServeError(
                f"--max-rows {config.max_rows}: engines of the {role} take {most}", "choose at most that many"
            )


def memory_needed(config: ServerConfig, manifest: Manifest) -> int:
    """Bytes that the weights, the caches of all rows and the prompts kept take: what is needed at least."""
    on_cpu = config.device == "cpu" and config.engine == "torch"
    precision = config.precision or (manifest.default_precision if on_cpu else "bf16")
    per_number = _CACHE_BYTES.get(precision, 2) if on_cpu else 2
    total = config.prompt_cache_mb << 20
    for spec in (manifest.target, manifest.draft["decoder"]):
        length = min(config.max_length, int(spec["max_positions"]))
        numbers = 2 * spec["num_layers"] * spec["num_kv_heads"] * spec["head_dim"] * length * config.max_rows
        total += int(numbers * per_number + _num_weights(spec) * _WEIGHT_BYTES[precision])
    if manifest.heads is not None and config.engine == "torch":  # not there before they are asked, but then
        total += int(_num_head_weights(manifest.heads) * _WEIGHT_BYTES[precision])
    return total


def _num_weights(spec: Mapping[str, Any]) -> int:
    hidden, head_dim = spec["hidden_size"], spec["head_dim"]
    attention = 2 * hidden * head_dim * (spec["num_heads"] + spec["num_kv_heads"])
    return int(spec["num_layers"] * (attention + 3 * hidden * spec["intermediate_size"]))


def _num_head_weights(spec: Mapping[str, Any]) -> int:
    hidden, num_lm_heads = spec["hidden_size"], spec["num_heads"] if spec["own_lm_heads"] else 1
    return int(hidden * (spec["num_heads"] * spec["num_layers"] * hidden + num_lm_heads * spec["head_size"]))


def free_memory() -> int:
    """Bytes that processes can still take here, also where a container has less than its machine."""
    found = [psutil.virtual_memory().available]
    try:
        limit, used = (_CGROUP / "memory.max").read_text().strip(), int((_CGROUP / "memory.current").read_text())
        if limit != "max":
            reclaimable = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            found.append(int(limit) - used + int(reclaimable.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # not version 2, or not to be seen
    return min(found)


def gpu() -> Gpu | None:
    """The first GPU, as the driver shows it without making a context; None if there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor, num_bytes = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(num_bytes), device)
    return Gpu(f"{major.value}.{minor.value}", num_bytes.value)
