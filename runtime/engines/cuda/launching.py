"""The kernels of `ssv.plugins.cuda`: compiled for a GPU and a model, and launched."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ssv.model.spec import DecoderSpec
from ssv.plugins.cuda.compiler import compile_source, source_of, version
from ssv.plugins.cuda.driver import Kernel, Module
from ssv.runtime.engines.cuda import places
from ssv.runtime.engines.cuda.weights import FEW_TILES, KEYS, Buffers, Linear
from ssv.support.files import write_whole

WIDTHS = (8, 16, 32, 64)
"""Tokens that graphs have room for."""

MANY_WIDTHS = (128, 256, places.MANY_TOKENS)
"""Tokens that graphs of many have room for, as prompts have them."""

MOST_GATHERED = WIDTHS[0]
"""Of many tokens, those that get logits; and rows that they may be of."""

OVERLAPPING = (9, 0)
"""Compute capability from which a kernel may begin while the one before it runs."""

PRODUCTS = ("store", "add", "gate")
OTHERS = ("embed", "join", "attend", "largest", "sift", "judge", "grow")
SAMPLING = ("draw", "perturb")
MANY = ("turn", "attend_many", "join_shares")
"""What attention of many tokens consists of."""

RESIDENT = 2
"""Blocks of a product that a multiprocessor has, each with several tiles of channels, where these are many: the next
kernel's find room beside them, and have their weights on the way."""

TOGETHER = 4
"""Most tiles of a block whose sums are added up at once."""

FEW = 2
"""Tiles of eight tokens that a block with several tiles of channels reads again for each of them; more it holds."""

PARTS = 2
"""Blocks with one tile of channels share more than eight tokens: what counts is how long a block waits for its tokens,
and the weights come from the GPU's cache the second time."""

CHANNELS = 2
"""Tiles of channels that a warp multiplies at once with more than eight tokens, of a product whose blocks cannot hold
them: each of its tiles reads all tokens again, which would be several times the weights."""

MOST_TILES = 4
"""Of eight tokens, beside so many tiles of channels: what registers hold."""

# Of wide.cu.
_MANY_TOKENS, _MANY_SIDES, _MANY_THREADS = 64, 2, 256
"""Tokens of a block of a product, warps with channels of their own beside one another, and threads."""
_STAGES, _STAGE_PAIRS = 5, 2
"""Of its width, that it has in shared memory at once, and pairs of each."""
_MANY_QUERIES = 64
"""Of a block of attention."""
_STAGED_BYTES = 1 << 15
"""Of keys that are staged at a time: twice as many find room beside others on every GPU."""

TURN_WARPS, JOINED_HEADS = 8, 4
"""Vectors, and heads, that a block takes."""

# --- arguments --------------------------------------------------------------------------------------------------------


def structure(name: str, pointers: str, ints: str, floats: str = "") -> type[ctypes.Structure]:
    """A kernel's argument as decoder.cu declares it: pointers first, then integers and floats."""
    kinds: tuple[tuple[str, type], ...] = ((pointers, ctypes.c_void_p), (ints, ctypes.c_int), (floats, ctypes.c_float))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Embed = structure("Embed", "step table norm x scaled squares", "hidden")
Join = structure("Join", "step table features embed_norm feature_norm x joined", "hidden", "eps")
Product = structure(
    "Product",
    "step weight scale x squares bias out out_bf16 out_squares next_norm tapped from_ copied",
    "tiles together pairs share groups outputs num_squares tapped_width gathered",
    "eps",
)
Largest = structure("Largest", "step logits tokens token", "vocab")
Sift = structure("Sift", "step logits value column sums", "vocab count")
Judge = structure("Judge", "step value column sums hidden weight bias risk", "vocab hidden_size uses_hidden")
Grow = structure(
    "Grow",
    "step value column sums tokens extra weight bias hidden table embed_norm feature_norm x joined corrections "
    "settings found survival candidate path",
    "vocab hidden_size uses_hidden beam children most_found",
    "eps",
)
Attention = structure(
    "Attention",
    "step qkv keys values cosine sine q_norm k_norm factor out partial arrivals queries",
    "heads kv_heads slots most_blocks group_tokens",
    "eps",
)


# Of sample.cu.
Draw = structure("Draw", "step logits tokens settings token", "vocab gives_columns")
Perturb = structure("Perturb", "step logits tokens settings extra", "vocab")

# Of rounds.cu.
Plant = structure("Plant", "header rows found trees", "levels beam children nodes")
Lay = structure("Lay", "header rows trees step", "has_paths group_tokens plain")
Settle = structure("Settle", "header rows trees chosen step results", "is_chain group_tokens held ring")
Compact = structure("Compact", "header rows trees keys values features dest", "layers batch kv_heads slots dim hidden")


# --- launching ------------------------------------------------------------------------------------------------------


class Launcher:
    """Puts kernels on a stream, each overlapping the one before it."""

    def __init__(self, kernels: dict[str, Kernel], stream: int, tiles: int, buffers: Buffers, overlaps: bool) -> None:
        self._kernels, self._stream, self._tiles, self._buffers = kernels, stream, tiles, buffers
        self._overlaps, self._is_first = overlaps, True

    def __call__(
        self, name: str, grid: tuple[int, int, int], threads: int, argument: ctypes.Structure, shared: int = 0
    ) -> None:
        self._launch(self._kernels[name], grid, threads, argument, shared)

    def _launch(
        self, kernel: Kernel, grid: tuple[int, int, int], threads: int, argument: ctypes.Structure, shared: int
    ) -> None:
        kernel.launch(
            argument, grid, threads, self._stream, shared=shared, overlaps=self._overlaps and not self._is_first
        )
        self._is_first = False

    def store(
        self, linear: Linear, x: Tensor, out: Tensor, *, eps: float = 0.0, normed: bool = False, gathered: bool = False
    ) -> None:
        """out = the product, of x or of x over its root mean square; of the gathered tokens only, whose residuals are
        copied, or of all."""
        b = self._buffers
        self._product("store", linear, x, eps, normed, out=out.data_ptr(), gathered=int(gathered),
                      from_=b.x_MH.data_ptr() if gathered else 0, copied=b.hidden_RH.data_ptr())  # fmt: skip

    def add(self, linear: Linear, x: Tensor, next_norm: Tensor, tapped: int | None = None) -> None:
        """Adds the product to the residuals; `tapped`: the place of a copy among the tapped layers."""
        b = self._buffers
        width = b.tapped_MX.shape[1]
        at = 0 if tapped is None else b.tapped_MX.data_ptr() + tapped * linear.outputs * b.tapped_MX.element_size()
        self._product("add", linear, x, out=b.x_MH.data_ptr(), out_bf16=b.scaled_MH.data_ptr(),
                      out_squares=b.squares_MH.data_ptr(), next_norm=next_norm.data_ptr(), tapped=at,
                      tapped_width=width)  # fmt: skip

    def gate(self, linear: Linear, x: Tensor, out: Tensor, eps: float, factor: Tensor | None) -> None:
        """out = silu(gate) * up of x over its root mean square, times a factor of each channel if there is one."""
        self._product("gate", linear, x, eps, True, out_bf16=out.data_ptr(), next_norm=address(factor))

    def _product(
        self, kind: str, linear: Linear, x: Tensor, eps: float = 0.0, normed: bool = False, **rest: int
    ) -> None:
        b, device = self._buffers, self._buffers.step.device
        num, is_gathered = _num_multiprocessors(device), bool(rest.get("gathered"))
        source, of_many = "decoder", self._tiles > WIDTHS[-1] // 8
        if of_many and not is_gathered:
            plan, source = many_plan_of(linear, self._tiles, num), "wide"
            chosen = {"CHANNELS": plan.channels, "STAGES": _STAGES, "STAGE_PAIRS": _STAGE_PAIRS}
            chosen |= dict(linear.packed.macros)
        else:
            plan = plan_of(linear, MOST_GATHERED // 8 if of_many else self._tiles, num)
            chosen = product_macros(linear, plan)
        if of_many:
            chosen["TOKENS"] = places.MANY_TOKENS
        argument = Product(
            step=b.step.data_ptr(), weight=linear.packed.weight.data_ptr(), scale=address(linear.packed.scale),
            x=x.data_ptr(), bias=address(linear.bias_N), squares=b.squares_MH.data_ptr() if normed else 0,
            num_squares=b.squares_MH.shape[1], tiles=linear.tiles, together=plan.together, pairs=linear.pairs,
            share=linear.share, groups=linear.packed.groups, outputs=linear.outputs, eps=eps, **rest,
        )  # fmt: skip
        kernel = kernels_of(device, source, PRODUCTS, **chosen)[kind]
        self._launch(kernel, (plan.parts, plan.blocks, 1), plan.threads, argument, plan.shared)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut into blocks.

    Attributes:
        tiles: of eight tokens each, of a block.
        parts: blocks for the step's tokens.
        blocks: for the channels.
        together: tiles of channels whose sums are added up at once.
        channels: of these, multiplied at once by a warp.
        several: whether a block has several tiles of channels.
        holds: whether a block holds its tokens in shared memory.
        shared: bytes of shared memory of a block.
    """

    tiles: int
    parts: int
    blocks: int
    together: int
    channels: int
    several: bool
    holds: bool
    threads: int
    shared: int


def plan_of(linear: Linear, tiles: int, multiprocessors: int) -> Plan:
    """How a product of up to 8 * tiles tokens is cut: what a token gives does not depend on it."""
    sums, held = linear.warps * 32 * 16, linear.pairs * 32 * 16
    holds = tiles > FEW
    # Of few tokens two such blocks find room beside one another, and the next kernel's beside them. Of many there is
    # one, which holds them.
    if not holds:
        blocks = RESIDENT * multiprocessors
        together = min(TOGETHER, -(-linear.tiles // blocks))
        shared = 2 * together * sums * tiles
    else:
        blocks, together, shared = multiprocessors, 1, (2 * sums + held) * tiles
    is_wide = linear.tiles >= FEW_TILES
    if is_wide and tiles > 1 and (not holds or shared > _most_shared()):
        parts = max(tiles // MOST_TILES, 1)
        tiles //= parts
        threads, shared = 32 * max(linear.warps, tiles * CHANNELS), 2 * CHANNELS * sums * tiles
        blocks = min(-(-linear.tiles // CHANNELS), multiprocessors // parts)
        return Plan(tiles, parts, blocks, CHANNELS, CHANNELS, True, False, threads, shared)
    if linear.tiles > RESIDENT * multiprocessors and shared <= _most_shared():
        threads = 32 * max(linear.warps, tiles * together)
        return Plan(tiles, 1, blocks, together, 1, True, holds, threads, shared)
    parts = min(PARTS, tiles)
    tiles //= parts
    return Plan(tiles, parts, linear.tiles, 1, 1, False, False, 32 * max(linear.warps, tiles), sums * tiles)


def many_plan_of(linear: Linear, tiles: int, multiprocessors: int) -> Plan:
    """How a product of up to 8 * tiles tokens, more than `plan_of` has blocks for, is cut: what a token gives does not
    depend on it."""
    parts = -(-8 * tiles // _MANY_TOKENS)
    # Small blocks where large ones leave multiprocessors without any.
    channels = 2 if -(-linear.tiles // (2 * _MANY_SIDES)) * parts >= multiprocessors else 1
    blocks = -(-linear.tiles // (channels * _MANY_SIDES))
    weights = _MANY_SIDES * channels * _STAGE_PAIRS * dict(linear.packed.macros)["BITS"] // 8 * 512
    tokens = _STAGE_PAIRS * (4 * _MANY_TOKENS + 4) * 16
    shared = _STAGES * (weights + tokens) + 4 * _MANY_TOKENS
    return Plan(8, parts, blocks, 1, channels, False, True, _MANY_THREADS, shared)


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies on the device; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def width_for(num_tokens: int) -> int:
    """Tokens that the graph with room for so many has room for."""
    return next(width for width in (*WIDTHS, *MANY_WIDTHS) if num_tokens <= width)


def key_blocks_for(most_seen: int) -> int:
    """Blocks of keys of the graph that has room for a text."""
    return 1 << (-(-most_seen // KEYS) - 1).bit_length()


def group_tokens_for(spec: DecoderSpec, width: int) -> int:
    """Tokens of a row that share a block of the attention kernel: few where that fills the GPU, else as many as read
    their keys together without running out of the GPU's shared memory."""
    if width > WIDTHS[-1]:
        return _MANY_QUERIES * spec.num_kv_heads // spec.num_heads
    most = max(16 * spec.num_kv_heads // spec.num_heads, 1)
    wanted = min(max(width // 16, 1), 4, most)
    return next((n for n in range(wanted, 1, -1) if _attention_bytes(spec, width, n) <= _most_shared()), 1)


def attention_bytes(spec: DecoderSpec, width: int) -> int:
    """Shared memory of an attention block."""
    if width > WIDTHS[-1]:
        return 2 * staged_keys(spec) * 2 * (spec.head_dim + 8)
    return _attention_bytes(spec, width, group_tokens_for(spec, width))


def _attention_bytes(spec: DecoderSpec, width: int, group_tokens: int) -> int:
    queries, warps, dim = group_tokens * spec.num_heads // spec.num_kv_heads, KEYS // 32, spec.head_dim
    floats = warps * queries * (dim + 4 + 2)
    return 2 * (queries + 16 + 2 * width) * (dim + 8) + 4 * (floats + places.TOKENS + group_tokens * places.DEPTH)


def staged_keys(spec: DecoderSpec) -> int:
    """Keys, or values, that attention of many tokens has in shared memory at a time, and as many that are coming."""
    return next(num for num in (KEYS, KEYS // 2, KEYS // 4, KEYS // 8) if num * 2 * spec.head_dim <= _STAGED_BYTES)


@cache
def _most_shared() -> int:
    """Bytes of shared memory that a block may have, beside what its own declarations hold; the least of those of the
    kernels' GPUs where there is none."""
    if not torch.cuda.is_available():
        return 98 * 1024
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.shared_memory_per_block_optin) - 1024  # type: ignore[attr-defined]


# --- compiled code ----------------------------------------------------------------------------------------------------


def macros(spec: DecoderSpec) -> dict[str, int]:
    """What the kernels that are no products are specialised to."""
    return {
        "HEAD_DIM": spec.head_dim,
        "GROUP": spec.num_heads // spec.num_kv_heads,
        "QK_NORM": int(spec.qk_norm),
    }


def many_macros(spec: DecoderSpec) -> dict[str, int]:
    """The same of kernels for many tokens."""
    return macros(spec) | {"TOKENS": places.MANY_TOKENS, "STAGED": staged_keys(spec)}


def product_macros(linear: Linear, plan: Plan) -> dict[str, int]:
    """What the kernels of a product are specialised to."""
    most_threads = next(num for num in (256, 384, 512) if plan.threads <= num)
    formats = linear.packed.macros
    # INT4's scales need registers as well.
    ahead = 4 if formats["BITS"] == 4 and plan.channels > 1 and plan.tiles > FEW else linear.ahead
    chosen = {
        "TILES": plan.tiles, "AHEAD": ahead, "THREADS": most_threads, "SEVERAL": int(plan.several),
        "CHANNELS": plan.channels, "HOLDS": int(plan.holds),
    }  # fmt: skip
    # Where there are many blocks, two find room beside one another.
    chosen["BLOCKS"] = 2 if most_threads == 256 and plan.tiles <= FEW and plan.channels == 1 else 1
    return chosen | dict(formats)


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def kernels_of(device: torch.device, source: str, names: tuple[str, ...], **chosen: int) -> dict[str, Kernel]:
    """Kernels of a source of `ssv.plugins.cuda`, specialised to what is chosen."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    with torch.cuda.device(device):
        module = Module(_cubin(source, capability, chosen))
        return {name: module.kernel(name) for name in names}


def _cubin(name: str, capability: str, chosen: Mapping[str, int]) -> bytes:
    """Compiled for this GPU and model, once for all processes of a user."""
    source = source_of(name)
    key = hashlib.sha256(repr((source, capability, sorted(chosen.items()), version())).encode()).hexdigest()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache_home / "ssv" / f"{name}-{key[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = compile_source(source, capability, chosen)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, cubin)
    except OSError:  # a read-only home: compiled in every process
        pass
    return cubin
