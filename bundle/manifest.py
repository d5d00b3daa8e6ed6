"""The bundle's manifest: what is in it, checked before anything of it is used."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from ssv.bundle.policy import Policy
from ssv.bundle.profile import Costs
from ssv.bundle.survival import Survival
from ssv.bundle.tensorrt_api import Capability, Flavor
from ssv.support.errors import UserError
from ssv.support.files import write_json
from ssv.support.json_text import parse_json
from ssv.support.precisions import EnginePrecision, TorchPrecision
from ssv.support.strict import Strict
from ssv.support.waiting import Say, say_nothing

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
SCORER = "scorer.safetensors"
"""The scorer's file, which a bundle may lack."""


class BundleError(UserError):
    """A bundle that cannot be used; the message names the file and the cure."""


class FileEntry(Strict):
    """A file of the bundle: size in bytes, and SHA-256 in hexadecimal."""

    size: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


BoundKind = Literal["finite-sample", "asymptotic"]


class CalibrationEntry(Strict):
    """What the bounds of the lossy tiers stand on.

    Attributes:
        prompts, prompts_sha256, num_prompts, max_tokens: what was decoded: the file, how many of its prompts, and
            tokens of each output at the most.
        confidence: with which a tier's divergence, on such prompts, is below its limit.
        bound_kind: "finite-sample": of calibrations on that many prompts no more than 1 - confidence break their
            promise. "asymptotic": of a bootstrap over prompts, which holds that often for very many of them, and less
            often for few.
        bound_method: in words.
        date: YYYY-MM-DD, UTC; None of a calibration that was made before that was noted.
    """

    prompts: str
    prompts_sha256: str
    num_prompts: PositiveInt
    max_tokens: PositiveInt
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]
    bound_kind: BoundKind
    bound_method: str
    date: str | None = None


class TierEntry(Strict):
    """A tier: its policy, whether it is lossless, and, if not, what was measured when it was calibrated.

    Attributes:
        divergence: share of emitted tokens that the target would not have chosen, at most.
        divergence_bound: upper confidence bound of the divergence measured.
        bound_kind: see `CalibrationEntry`; a bundle without it has an asymptotic one.
    """

    policy: Policy
    lossless: bool
    divergence: float | None = None
    divergence_bound: float | None = None
    bound_kind: BoundKind | None = None

    @model_validator(mode="after")
    def _says_what_its_policy_is(self) -> TierEntry:
        if self.lossless != self.policy.lossless:
            raise ValueError(f"lossless {self.lossless} contradicts the policy: {self.policy}")
        return self


class EngineEntry(Strict):
    """A TensorRT engine of the bundle.

    Attributes:
        file: the plan, relative to the bundle.
        tensorrt: version that built it, and the only one that runs it.
        compute_capabilities: GPUs that it runs on, such as "8.9".
        compute_type: of products, attention and cache: "float16" or "bfloat16".
        max_batch, max_length, max_pending, prefill_chunk: what it was built for, see `ssv.bundle.shapes.Limits`.
        source: SHA-256 of what it was compiled from: an engine of other weights than the bundle's is refused.
        checkpoint: SHA-256 of the quantized checkpoint, if it was compiled from one.
        plugins: whether it holds kernels of ours (`ssv.plugins`); what it computes is the same.
        build_seconds, peak_memory_bytes: of compiling it.
    """

    role: Literal["target", "draft"]
    precision: EnginePrecision
    flavor: Flavor
    tensorrt: str
    compute_capabilities: Annotated[list[Capability], Field(min_length=1)]
    file: str
    compute_type: Literal["float16", "bfloat16"]
    max_batch: PositiveInt
    max_length: PositiveInt
    max_pending: PositiveInt
    prefill_chunk: PositiveInt
    source: str
    checkpoint: str | None = None
    plugins: bool = False
    build_seconds: float
    peak_memory_bytes: int


class Manifest(Strict):
    """Facts about a bundle.

    Attributes:
        target, draft: specs of the networks, as `DecoderSpec.to_dict` and `DraftSpec.to_dict` give them.
        heads: spec of Medusa's heads, as `HeadsSpec.to_dict` gives it; None for a bundle without them.
        eos_token_ids: tokens that end an output.
        default_precision: what the torch engine runs in on a CPU unless told otherwise.
        engines: TensorRT engines by name.
        methods: policies of further methods, where they are not as published.
        calibration: what the lossy tiers' bounds stand on; None for a bundle that is not calibrated, or was before
            that was kept here.
        survival: how far the draft's shares are to be trusted; None for a bundle that was calibrated before that was
            known.
        profiles: what steps cost, by place (`ssv.runtime.decode.costs.place`); of places where somebody measured.
        sources: what each part was made from, by SHA-256: a step whose sources have not changed is not repeated.
        versions: of the packages that built it.
    """

    schema_version: Literal[2] = 2
    name: str
    target: dict[str, Any]
    draft: dict[str, Any]
    heads: dict[str, Any] | None = None
    eos_token_ids: Annotated[list[int], Field(min_length=1)]
    default_precision: TorchPrecision
    tiers: dict[str, TierEntry]
    methods: dict[str, Policy] = Field(default_factory=dict)
    files: dict[str, FileEntry]
    engines: dict[str, EngineEntry] = Field(default_factory=dict)
    calibration: CalibrationEntry | None = None
    survival: Survival | None = None
    profiles: dict[str, Costs] = Field(default_factory=dict)
    sources: dict[str, str]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _holds_its_engines(self) -> Manifest:
        for name, engine in self.engines.items():
            if engine.file not in self.files:
                raise ValueError(f"engine {name}: its plan {engine.file} is not among the files")
        return self

    @model_validator(mode="after")
    def _trusts_nothing_but_by_a_tier(self) -> Manifest:
        if wrong := [name for name, policy in self.methods.items() if not policy.lossless_for(greedy=True)]:
            raise ValueError(f"methods.{wrong[0]} trusts tokens, and only tiers have a bound on that")
        return self

    @property
    def has_scorer(self) -> bool:
        """Whether drafted tokens are scored; without, no tier trusts any."""
        return SCORER in self.files

    @property
    def policies(self) -> dict[str, Policy]:
        """What the bundle says of tiers and of other methods, by name."""
        return {**self.methods, **{name: tier.policy for name, tier in self.tiers.items()}}

    @property
    def divergence_limits(self) -> dict[str, float]:
        """The bound on divergence of each lossy tier that was calibrated."""
        return {name: tier.divergence for name, tier in self.tiers.items() if tier.divergence is not None}


def engine_source(manifest: Manifest, role: str) -> str:
    """SHA-256 over what an engine of this role depends on in its bundle."""
    names = ["target/model.safetensors", "draft/draft.safetensors"]
    if role == "draft" and manifest.has_scorer:
        names.append(SCORER)
    return digest(manifest.files[name].sha256 for name in names)


def digest(parts: Iterable[str]) -> str:
    """SHA-256 over texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file."""
    with path.open("rb") as file:
        return FileEntry(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Writes the manifest in one step: a reader sees the old one or the new one."""
    write_json(bundle / MANIFEST_NAME, manifest.model_dump(mode="json"))


def lock_file(descriptor: int, operation: int) -> None:
    """`fcntl.flock`, which does nothing on a file system without locks.

    Raises:
        BlockingIOError: another process has it, and the operation is not to wait.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def locked_file(path: Path) -> int:
    """Descriptor of a file, made if it is not there, that is this process's until it is closed or the process dies.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock_file(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):  # whoever had it may have removed it meanwhile
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


@contextmanager
def manifest_lock(bundle: Path) -> Iterator[None]:
    """Keeps others who ask for this lock from changing the manifest while the block runs; waits for one who has it."""
    while True:
        descriptor = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            lock_file(descriptor, fcntl.LOCK_EX)
            # Another folder may have been put in its place meanwhile.
            if os.path.samestat(os.fstat(descriptor), bundle.stat()):
                yield
                return
        finally:
            os.close(descriptor)


def retired_place(bundle: Path) -> Path:
    """Where a bundle lies between the two steps of being replaced, on a file system that cannot exchange folders."""
    return bundle.with_name(f".{bundle.name}.retired")


def read_manifest(bundle: Path, verify: bool = True, say: Say = say_nothing) -> Manifest:
    """Reads a bundle's manifest.

    Args:
        verify: hash every file of the bundle and compare, see `verify_files`.

    Raises:
        BundleError: no bundle, another schema version, damaged, or a file missing or changed.
    """
    path = bundle / MANIFEST_NAME
    if not path.is_file():
        if not bundle.exists() and bundle.name and retired_place(bundle).is_dir():
            raise BundleError(
                f"{bundle} was being replaced when that was interrupted, the old bundle lies at "
                f"{retired_place(bundle)}",
                "run the same `ssv-build pair` again, or rename it",
            )
        raise BundleError(f"{bundle} is not a bundle (no {MANIFEST_NAME})", "make one with `ssv-build pair`")
    try:
        data = parse_json(path.read_text())
    except ValueError as error:
        raise BundleError(f"{path} is damaged ({error})", "build the bundle again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this ssv reads {SCHEMA_VERSION}", "build the bundle again"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path} is damaged ({where}: {first['msg']})", "build the bundle again") from error
    if verify:
        verify_files(bundle, manifest, say=say)
    return manifest


Verified = dict[str, str]
"""By the name of a file in its bundle: what it was when its hash was found right (see `verify_files`)."""


def verify_files(
    bundle: Path,
    manifest: Manifest,
    *,
    verified: Mapping[str, str] = {},
    unused: Container[str] = (),
    say: Say = say_nothing,
) -> Verified:
    """Hashes a bundle's files and compares.

    Args:
        verified: what another process, of the same machine, got from this function: files that have not been touched
            since are not hashed again.
        unused: files that only have to be there, with the right size.
        say: called with what is being checked.

    Returns:
        What a further process need not hash again.

    Raises:
        BundleError: a file missing, changed, or outside the bundle.
    """
    root = bundle.resolve()
    found_right: Verified = {}
    for name, expected in manifest.files.items():
        path = (bundle / name).resolve()
        if not path.is_relative_to(root):
            raise BundleError(f"{bundle / MANIFEST_NAME} names {name}, which lies outside the bundle")
        if not path.is_file():
            raise BundleError(f"{bundle} lacks {name}", "build the bundle again")
        # Before it is read: what changes while it is read shows the next time.
        state = _state(path.stat(), expected)
        if name in unused or verified.get(name) == state:
            found = expected.model_copy(update={"size": path.stat().st_size})
        else:
            say(f"checking {path}, {expected.size / 1e6:.0f} MB")
            found = file_entry(path)
        if found != expected:
            what = f"size {found.size}, expected {expected.size}" if found.size != expected.size else "another SHA-256"
            raise BundleError(f"{path} does not match the manifest ({what}): it was changed or damaged, build again")
        if name not in unused:
            found_right[name] = state
    return found_right


def unused_files(manifest: Manifest, engine: str) -> set[str]:
    """Files of a bundle that an engine does not read: the torch engine reads no compiled ones."""
    return {entry.file for entry in manifest.engines.values()} if engine == "torch" else set()


def _state(status: os.stat_result, expected: FileEntry) -> str:
    """What stays the same as long as a file has the content that was hashed.

    The time of the last change (ctime) cannot be set back. The hash is part of it, since the manifest may be another
    one.
    """
    facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, expected.sha256)
    return " ".join(map(str, facts))
