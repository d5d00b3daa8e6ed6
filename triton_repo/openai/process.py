"""The process that serves the OpenAI API: its command line, its socket, and its connection to the server."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

import uvicorn

from ssv.client.triton import Prompt, Reply, ServerError, Settings, split_url
from ssv.client.triton_aio import AsyncClient
from ssv.runtime.serving.access_keys import VARIABLE, access_keys
from ssv.runtime.serving.log import log_event, log_to_stderr
from ssv.runtime.serving.metrics import Metrics, Reader, boards_folder
from ssv.runtime.serving.tls import certificate_name
from ssv.support.console import add_version, run_command
from ssv.support.errors import UserError
from ssv.triton_repo.openai.app import DEFAULT_MAX_BODY_BYTES, Backend, create_app
from ssv.triton_repo.openai.tokens import Tokens
from ssv.triton_repo.openai.translation import Models

log = logging.getLogger("ssv.openai")

DEFAULT_MAX_CONNECTIONS = 1024

GRACE_SECONDS = 4
"""For requests that run when it is told to stop: ssv-serve, which lets them finish before, waits five seconds."""

KEEP_ALIVE_SECONDS = 30
"""Longer than clients keep idle connections, or one is closed while they send."""


class _Counted:
    """A backend whose refusals are counted where there is no server that could."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend, self._metrics = backend, metrics
        self.is_ready, self.aclose = backend.is_ready, backend.aclose

    async def stream(
        self, prompt: Prompt, settings: Settings, *, request_id: str, stream: bool
    ) -> AsyncGenerator[Reply, None]:
        try:
            async with aclosing(
                self._backend.stream(prompt, settings, request_id=request_id, stream=stream)
            ) as replies:
                async for reply in replies:
                    yield reply
        except ServerError as error:
            if error.is_unreachable:
                self._metrics.refused("starting")
            raise


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    description = "Serve the OpenAI API before a running ssv-serve."
    parser = argparse.ArgumentParser(
        prog="python -m ssv.triton_repo.openai.process", description=description, allow_abbrev=False
    )
    add_version(parser)
    parser.add_argument("--url", required=True, help="of the server: grpc://host:port, or grpcs:// for TLS")
    parser.add_argument("--bundle", type=Path, required=True, help="for the names of its tiers")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, required=True, help="to listen on")
    parser.add_argument("--tls-cert", type=Path, help="PEM; also of the server at grpcs:// (default: no TLS)")
    parser.add_argument("--tls-key", type=Path, help="PEM of its key (default: no TLS)")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help=f"has a key a line, of which a request needs one (default: the key of {VARIABLE}, or none is asked for)",
    )
    parser.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="whose pages browsers let ask, or * (default: none)",
    )
    parser.add_argument(
        "--no-page", action="store_true", help="no page at / that shows answers token by token (default: off)"
    )
    parser.add_argument(
        "--routed",
        action="store_true",
        help="requests that name no tier go through the server's A/B router (default: off)",
    )
    parser.add_argument(
        "--premium-only", action="store_true", help="the engine refuses all tiers but premium (default: off)"
    )
    parser.add_argument(
        "--max-length", type=int, help="of the server, which /v1/models then says (default: it does not)"
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="that conversations go through (default: the bundle's)"
    )
    parser.add_argument(
        "--max-body-bytes",
        type=int,
        default=DEFAULT_MAX_BODY_BYTES,
        help="of a request, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--max-connections",
        type=int,
        default=DEFAULT_MAX_CONNECTIONS,
        help="more are refused at once (default: %(default)s)",
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    log_to_stderr()
    _log_warnings_of_uvicorn()
    _check(args)
    name = certificate_name(args.tls_cert, args.tls_key) if args.tls_cert else None
    models = Models.of_bundle(args.bundle, args.max_length, args.chat_template, is_premium_only=args.premium_only)
    with _listen(args.host, args.port) as listener:
        return asyncio.run(_serve(args, models, listener, name))


def _check(args: argparse.Namespace) -> None:
    _, secure = split_url(args.url)
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UserError("--tls-cert and --tls-key belong together", "give both")
    if args.tls_cert is not None and not secure:
        raise UserError(f"--tls-cert is also that of the server at {args.url}", "give grpcs://host:port")
    for option in ("max_body_bytes", "max_connections"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least 1")


async def _serve(args: argparse.Namespace, models: Models, listener: socket.socket, name: str | None) -> int:
    client = AsyncClient(args.url, certificate=args.tls_cert, name=name, is_routed=args.routed)
    boards = boards_folder()
    metrics = Metrics(boards, "openai")
    app = create_app(
        _Counted(client, metrics),
        models,
        max_body_bytes=args.max_body_bytes,
        num_connections=lambda: len(server.server_state.connections),
        max_connections=args.max_connections,
        on_refusal=lambda: metrics.refused("full"),
        keys=access_keys(args.api_key_file),
        allowed_origins=args.allowed_origins,
        tokens=Tokens(args.bundle, models.max_length, args.chat_template),
        reader=Reader(boards) if boards is not None else None,
        has_page=not args.no_page,
    )
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        ssl_certfile=args.tls_cert,
        ssl_keyfile=args.tls_key,
    )
    server = uvicorn.Server(config)
    log_event(log, "serving", host=args.host, port=args.port, url=args.url, model=models.name)
    await server.serve(sockets=[listener])
    return 0


def _log_warnings_of_uvicorn() -> None:
    logger = logging.getLogger("uvicorn")
    logger.handlers = logging.getLogger("ssv").handlers
    logger.setLevel(logging.WARNING)
    logger.propagate = False


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket: uvicorn itself would start first and then end in its own way.

    Raises:
        UserError: the address is taken, or not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, TypeError) as error:  # TypeError: of what is no name of a host
        raise UserError(f"cannot listen on {host}:{port} ({error})", "choose another --host or --port") from error


if __name__ == "__main__":
    sys.exit(main())
