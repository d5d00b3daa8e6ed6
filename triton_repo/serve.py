"""ssv-serve: a Triton Inference Server over a bundle, watched over while it runs.

Its options, and what they come to: checks (`checks.py`), a model repository made for the bundle (`repository.py`), and
the processes (`supervisor.py`). SIGTERM and SIGINT drain: no more requests are taken, those that run are finished. Exit
status 2 is for what cannot be started, 70 for what has died too often.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ssv.bundle.manifest import read_manifest, unused_files, verify_files
from ssv.bundle.policy import Policy
from ssv.runtime.methods import policy_for
from ssv.runtime.request import RequestError
from ssv.runtime.serving.access_keys import access_keys
from ssv.runtime.serving.config import ServerConfig
from ssv.runtime.serving.log import log_to_stderr
from ssv.support.background import begun
from ssv.support.console import add_device, add_engine, add_precision, add_version, run_command
from ssv.support.waiting import waiting
from ssv.triton_repo.admin_key import admin_key, hide_or_say
from ssv.triton_repo.checks import (
    ServeError,
    check_audit_state,
    check_machine,
    check_options,
    check_tls,
    checked_chat_template,
    listen,
)
from ssv.triton_repo.installation import bundled, given
from ssv.triton_repo.repository import disclosure, write_repository


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssv-serve", description="Serve a bundle from a Triton Inference Server.", allow_abbrev=False
    )
    add_version(parser)
    parser.add_argument("--bundle", type=Path, required=True, help="what to serve")
    add_engine(parser, hosted=True)
    add_precision(parser)
    add_device(parser)

    def setting(name: str, kind: type, help: str) -> None:
        """An option of the name and the default that the models' setting has."""
        default = ServerConfig.model_fields[name].default
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=default, help=f"{help} (default: {default})")

    setting("threads", int, "of a CPU engine; 0 for as many as there are cores that nobody else uses")
    setting("tensor_parallel", int, "GPUs that share the target, with --engine tensorrt_llm")
    parser.add_argument(
        "--gpu-memory-share",
        type=float,
        metavar="SHARE",
        help="of the GPU's whole memory, that weights, caches and buffers may take, with --device cuda "
        f"(default: {ServerConfig.model_fields['gpu_memory_share'].default})",
    )
    setting("max_rows", int, "requests decoded side by side")
    setting("max_waiting", int, "requests that wait for a row; more are refused at once")
    setting("max_length", int, "tokens of prompt and output together")
    setting("max_tokens", int, "of an output, at most")
    setting("max_prompt_bytes", int, "of a prompt's text, at most")
    setting("prefill_chunk", int, "tokens of a prompt between two rounds; 0 for what fits the device")
    setting("prompt_cache_mb", int, "for beginnings of prompts")
    setting("stream_interval_ms", int, "between two responses of a stream, at least")
    parser.add_argument(
        "--responses-per-s",
        type=int,
        help="of all streams together, at most; 0 for no bound "
        "(default: 40 on a CPU, which the engines need, and 0 on a GPU)",
    )
    setting("audit_share", float, "share of lossy requests that the target judges in full, to watch what was promised")
    parser.add_argument(
        "--audit-state",
        type=Path,
        metavar="FILE",
        help="keeps what that has found, and which tiers were withdrawn, for the next start (default: it ends with "
        "ssv-serve)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of all ports (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--http-port", type=int, default=8000, help="of Triton's HTTP API (default: 8000)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="of Triton's gRPC API (default: 8001)")
    parser.add_argument("--metrics-port", type=int, default=8002, help="of what Prometheus reads (default: 8002)")
    parser.add_argument("--openai-port", type=int, help="of the OpenAI API (default: it is not served)")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="has a key a line; the OpenAI API asks for one of them (default: the key of SSV_API_KEY, or none is asked "
        "for)",
    )
    parser.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="whose pages browsers let ask the OpenAI API, or * (default: none)",
    )
    parser.add_argument(
        "--no-page",
        action="store_true",
        help="no page at / of the OpenAI port that shows answers token by token (default: off)",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="jinja2 template that conversations go through (default: the bundle's)",
    )
    parser.add_argument(
        "--ab",
        type=Path,
        metavar="FILE.yaml",
        help="arms that the model `ab_router` splits its requests between (default: no such model)",
    )
    parser.add_argument(
        "--tls-cert",
        type=Path,
        help="PEM; gRPC and the OpenAI API speak TLS, HTTP stays on this machine (default: no TLS)",
    )
    parser.add_argument("--tls-key", type=Path, help="PEM of its key (default: no TLS)")
    parser.add_argument(
        "--admin-key",
        metavar="NAME=VALUE",
        help="header that the administrative protocols ask for; without it they are shut to all "
        "(default: that of SSV_ADMIN_KEY, or none)",
    )
    parser.add_argument(
        "--admin-key-file", type=Path, metavar="FILE", help="has NAME=VALUE; other users do not see it (default: none)"
    )
    parser.add_argument(
        "--tritonserver", type=Path, help="a server, such as the container's (default: nvidia-pytriton's)"
    )
    parser.add_argument("--ready-timeout", type=float, default=300.0, help="seconds to start (default: %(default)s)")
    parser.add_argument(
        "--drain-timeout", type=float, default=30.0, help="seconds to finish requests (default: %(default)s)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="of a server that died, in ten minutes; then exit status 70 (default: %(default)s)",
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    log_to_stderr()
    key = admin_key(args.admin_key, args.admin_key_file)
    if args.admin_key is not None:
        hide_or_say(os.getpid(), args.admin_key)
    args.admin_key = key
    # Before anything is started, and what takes long last.
    check_options(args)
    if args.responses_per_s is None:
        on_cpu = args.device == "cpu" and args.engine == "torch"
        args.responses_per_s = ServerConfig.model_fields["responses_per_s"].default if on_cpu else 0
    manifest = read_manifest(args.bundle, verify=False)
    verified = begun(lambda: verify_files(args.bundle, manifest, unused=unused_files(manifest, args.engine)))
    # Meanwhile: its HTTP server takes as long to import as a small bundle to hash.
    from ssv.triton_repo.supervisor import Place, Supervisor

    check_tls(args.tls_cert, args.tls_key)
    access_keys(args.api_key_file)
    check_audit_state(args.audit_state)
    template = None if args.chat_template is None else checked_chat_template(args.chat_template, args.bundle)
    router = _router(args, manifest.policies) if args.ab is not None else None
    with tempfile.TemporaryDirectory(prefix="ssv-serve-") as folder:
        work = Path(folder)
        place = Place(work)
        place.boards.mkdir()
        if template is not None:  # what was tried is what is used, after restarts too
            args.chat_template = place.chat_template
            args.chat_template.write_text(template, encoding="utf-8")
        config = _config(args, work)
        check_machine(config, manifest)
        args.max_model_len = config.limits(manifest).max_length
        installation = given(args.tritonserver) if args.tritonserver else bundled(work)
        sockets = listen(args.host, args.tls_cert is not None, args)
        with waiting(f"checking {args.bundle}"):
            config = config.model_copy(update={"verified": json.dumps(verified())})
        write_repository(config, place.models, disclosure(args.bundle, manifest), router)
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        return Supervisor(args, installation, place, sockets, stopping).run()


def _config(args: argparse.Namespace, work: Path) -> ServerConfig:
    """The models' settings.

    Args:
        work: the server's own folder.

    Raises:
        ServeError: one that cannot be.
    """
    own: dict[str, Any] = {
        "bundle": args.bundle.resolve(),
        "precision": args.precision or "",
        "chat_template": str(args.chat_template or ""),
        "audit_state": str((args.audit_state or work / "audits.json").absolute()),
    }
    if args.gpu_memory_share is not None:
        own["gpu_memory_share"] = args.gpu_memory_share
    elsewhere = (*own, "verified", "gpu_memory_share")
    try:
        return ServerConfig(
            **own, **{name: getattr(args, name) for name in ServerConfig.model_fields if name not in elsewhere}
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise ServeError(f"{option} {first['input']} cannot be ({first['msg']})", "choose another") from error


def _router(args: argparse.Namespace, tiers: Mapping[str, Policy]) -> dict[str, str]:
    """Parameters of `ab_router`.

    Args:
        tiers: of the bundle.

    Raises:
        ServeError: its log cannot be used, or an arm of this server has a tier that it has not.
        RoutingError: its file is none of arms.
    """
    from ssv.ab.routing import read_routing
    from ssv.triton_repo.supervisor import in_url, reachable

    routing = read_routing(args.ab)
    for name, arm in routing.arms.items():
        if arm.url is None and arm.tier is not None:
            try:
                policy_for(arm.tier, tiers)
            except RequestError as error:
                raise ServeError(f"{args.ab}: arms.{name}.tier: {error.what}", error.cure) from error
    log_path = routing.log.absolute()
    if log_path.is_dir():
        raise ServeError(f"{args.ab}: log {log_path} is a folder", "choose a file")
    if not log_path.parent.is_dir():
        raise ServeError(f"{args.ab}: the folder of log {log_path} does not exist", "choose one that does")
    return {
        "routing": routing.model_copy(update={"log": log_path}).model_dump_json(),
        "own_url": f"grpc{'s' if args.tls_cert else ''}://{in_url(reachable(args.host))}:{args.grpc_port}",
        "certificate": str(args.tls_cert.absolute()) if args.tls_cert else "",
    }


if __name__ == "__main__":
    sys.exit(main())
