"""`ssv-build export`: a bundle's draft alone, or all that another engine serves a bundle's models from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssv.support.console import positive
from ssv.support.errors import UserError

LAYOUTS = ("speculators", "eagle3")
HOSTS = ("trtllm", "vllm", "sglang")
_OF_HOSTS = ("tp", "num_draft_tokens", "max_length", "max_rows", "memory_share", "checkpoint", "place", "pad_heads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "what",
        choices=[*LAYOUTS, *HOSTS],
        help="the draft's layout (speculators for vLLM, eagle3 for SGLang), or the engine to serve all with",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("folder", type=Path, nargs="?", metavar="BUNDLE", help="whose models they are")
    which.add_argument("--bundle", type=Path, help="the same")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--verifier",
        help="with a layout: name or path of the target, for who starts from the draft (default: the bundle's own, by "
        "its path)",
    )

    def of_hosts(name: str, help: str, kind: type = int, default: object = None) -> None:
        said = f"with an engine: {help} (default: {default})"
        parser.add_argument(f"--{name}", type=positive if kind is int else kind, metavar="N", help=said)

    of_hosts("tp", "GPUs that share the target", default=1)
    of_hosts("num-draft-tokens", "tokens of a draft", default=5)
    of_hosts("max-length", "tokens of prompt and output together", default=4096)
    of_hosts("max-rows", "requests at a time", default=8)
    of_hosts("memory-share", "share of a GPU's memory for an arm", float, 0.85)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="with an engine: the target as `ssv-build quantize` wrote it (default: the bundle's own weights)",
    )
    parser.add_argument(
        "--place",
        type=Path,
        metavar="FOLDER",
        help="with an engine: where the folder will lie on the machine that serves (default: where it is written)",
    )
    parser.add_argument(
        "--pad-heads",
        action="store_true",
        default=None,
        help="with vllm: attention heads of zeros, where --tp GPUs cannot share the model's own (default: off)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes what was asked for; returns the exit status."""
    from ssv.builder.export import export_draft, export_for

    bundle = args.folder or args.bundle
    if args.what in LAYOUTS:
        if not_of_layouts := [name for name in _OF_HOSTS if getattr(args, name) is not None]:
            option = f"--{not_of_layouts[0].replace('_', '-')}"
            raise UserError(
                f"{option} is for an engine, and {args.what} is a layout", f"name one of {', '.join(HOSTS)}"
            )
        export_draft(bundle, args.what, args.out, args.verifier)
        print(f"draft written to {args.out}", file=sys.stderr)
        return 0
    if args.verifier is not None:
        raise UserError("--verifier is for a layout", "leave it out: an engine gets the target with the draft")
    given = {name: getattr(args, name) for name in _OF_HOSTS[1:] if getattr(args, name) is not None}
    left_out = export_for(args.what, bundle, args.out, tensor_parallel=args.tp or 1, **given)
    print(f"written to {args.out}; compare the arms with {args.out / 'compare.sh'}", file=sys.stderr)
    for each in left_out:
        print(f"note: not exported: {each}", file=sys.stderr)
    return 0
