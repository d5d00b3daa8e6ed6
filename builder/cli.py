"""ssv-build: the builder's steps from the command line.

A composition root: wires the builder's steps together and, for calibration, to the runtime.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssv.builder.config import RecipeError, load_recipe


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssv-build")
    commands = parser.add_subparsers(required=True)
    distill = commands.add_parser("distill", help="make a draft for a target")
    distill.add_argument("recipe", type=Path)
    distill.add_argument("--out", type=Path, required=True)
    distill.add_argument("--work", type=Path)
    distill.add_argument("--target", type=Path)
    distill.add_argument("--device", default="cpu")
    distill.set_defaults(run=_distill)
    return parser


def _distill(args: argparse.Namespace) -> int:
    import torch
    from transformers import AutoTokenizer
    from ssv.builder.checkpoint import load_checkpoint
    from ssv.builder.corpus import chat_pieces
    from ssv.builder.decoder import Decoder
    from ssv.builder.distill import distill
    from ssv.builder.draft import save_draft
    from ssv.builder.progress import terminal_report

    recipe = load_recipe(args.recipe)
    path = args.target or recipe.target.locate()
    spec, weights = load_checkpoint(path)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    target = Decoder.from_weights(spec, weights).to(args.device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = recipe.draft.distill
    openings = []
    if config.openings_file:
        lines = [line.replace("\\n", "\n") for line in config.openings_file.read_text().splitlines()]
        openings = [tokenizer.encode(line, add_special_tokens=False) for line in lines if line]
    with terminal_report() as report:
        result = distill(target, chat_pieces(tokenizer), openings, config, args.work or args.out.parent / "distill", report)
    save_draft(result.draft, args.out)
    print(result.agreement, result.tokens_written, result.tokens_trained)
    return 0


if __name__ == "__main__":
    sys.exit(main())
