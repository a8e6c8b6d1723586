"""Schema of `itune train`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from itune_ray.config.adaptation import CACHED, SUPPORT, refusal
from itune_ray.config.adaptation import FullConfig as FullConfig
from itune_ray.config.adaptation import LoraConfig as LoraConfig
from itune_ray.config.adaptation import PeftConfig as PeftConfig
from itune_ray.config.base import Schema, Tree
from itune_ray.config.course import Curriculum, Replay, Reptile
from itune_ray.config.gate import GateConfig
from itune_ray.config.images import ImagesConfig, terms_refusal
from itune_ray.config.images import refusal as images_refusal
from itune_ray.config.objectives import ObjectiveConfig, SftConfig
from itune_ray.config.optimizer import AdamwConfig, OptimizerConfig, ScheduleConfig
from itune_ray.config.shared import Job, MixturePart, ModelRef, Positive, Thinking
from itune_ray.config.strategies import Fsdp2Config, StrategyConfig, TrainWorkers
from itune_ray.config.trackers import TrackerConfig


class InitConfig(Schema):
    """A fresh model instead of a pretrained one: the `transformers` config class and its arguments."""

    config: dict[str, Any]
    """`model_type` and the architecture's own fields, e.g. {model_type: llama, hidden_size: 128, ...}; the vocabulary
    and special token ids come from the tokenizer."""
    tokenizer: str
    """A folder, Hub id, URI or `playground://tokenizer`."""


class TrainedModel(Schema):
    """The model to train: a pretrained one by `path`, or a fresh one by `init`."""

    silent_at_default = frozenset({"thinking", "added_tokens"})

    path: str | None = None
    """See `ModelRef.path`; excludes `init`."""
    init: InitConfig | None = None
    revision: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    thinking: Thinking = "keep"
    """What becomes of thoughts (`<think>...</think>`) in the rows: keep; strip; or {budget: N}, by which they end
    after N tokens. The same key of a served model treats its prompts and replies alike."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """`auto`: flash on GPU when installed, else sdpa. Tiny models on CPU are fastest with eager."""
    peft: PeftConfig = FullConfig()
    added_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that become tokens of their own, e.g. the `added_tokens` of a task_tokens artifact; the export has them.
    Their embeddings start as the mean of all others; with LoRA they belong in `peft.train_tokens` too."""
    adapter: str | None = None
    """A LoRA adapter folder or URI to train on, e.g. `step://sft/adapter`; `peft` must ask for the same rank, scale,
    matrices and trained tokens. The adapter that is written replaces it: it holds both trainings."""

    @model_validator(mode="after")
    def _one_origin(self) -> "TrainedModel":
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of model.path (a pretrained model) and model.init (a fresh one)")
        if self.adapter is not None and (self.peft.type != "lora" or self.path is None):
            raise ValueError(
                "model.adapter continues a LoRA adapter: set model.peft.type=lora and model.path to its base"
            )
        self._check_added_tokens()
        return self

    def _check_added_tokens(self) -> None:
        added = self.added_tokens
        if len(set(added)) < len(added):
            raise ValueError(f"model.added_tokens names a token twice: {', '.join(added)}")
        if added and self.peft.type not in ("full", "lora"):
            raise ValueError(
                f"{self.peft.type} would leave the embeddings of model.added_tokens as they start: set model.peft.type "
                "to full, or to lora with train_tokens"
            )
        left = [t for t in added if isinstance(self.peft, LoraConfig) and t not in self.peft.train_tokens]
        if left:
            raise ValueError(
                f"LoRA would leave the embeddings of added tokens as they start: add {', '.join(left)} to "
                "model.peft.train_tokens"
            )

    def reference(self) -> ModelRef:
        """The pretrained model as a `ModelRef`."""
        assert self.path is not None
        return ModelRef(
            path=self.path,
            revision=self.revision,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
            thinking=self.thinking,
        )


class CheckpointConfig(Schema):
    """Sharded checkpoints with everything an exact resume needs."""

    every_steps: Positive = 100
    keep: Positive = 2
    background: bool = False
    """Copy the state to host memory and write it while training goes on: the run stands still for the copy alone."""


class DivergenceConfig(Schema):
    """A run has diverged when its mean loss over `steps` steps is above `factor` times the lowest such mean, by more
    than `slack`. It then ends with an error; its checkpoints stay."""

    factor: Annotated[float, Field(gt=1)] = 3.0
    slack: Annotated[float, Field(ge=0)] = 1.0
    """In the loss's own unit, so that a loss near 0 may rise."""
    steps: Positive = 50


class ValidationConfig(Schema):
    """Held-out rows, scored by the objective without training on them; writes validation.jsonl."""

    silent_at_default = frozenset({"replayed"})

    data: Annotated[tuple[MixturePart, ...], Field(min_length=1)]
    """Each row is scored once, whatever weight it has."""
    replayed: tuple[MixturePart, ...] = ()
    """Held-out rows of what was learned before, as those of `replay` are: for objective domain, the general ones."""
    every_steps: Positive | None = None
    """Score so often; the start and the end are always scored."""


COMPILED = ("full", "lora", "rslora", "dora")
"""Methods whose layers can be compiled."""
_UNSET_BY_DEFAULT = frozenset({"router_loss", "images"})
"""Fields of `TrainJob` that are no part of its identity while they are unset."""


class TrainJob(Job):
    """Tune a model on a weighted union of rows; writes checkpoint/, model/ and, for adapters, adapter/."""

    beside_identity = Job.beside_identity | {
        "workers",
        "micro_batch",
        "checkpoint",
        "log_every",
        "gradient_checkpointing",
        "compile",
        "gate",
        "trackers",
        "divergence",
    }

    silent_at_default = frozenset({"curriculum", "replay", "reptile"})

    model: TrainedModel
    data: Annotated[tuple[MixturePart, ...], Field(min_length=1)]
    replay: Replay | None = None
    """Rows of earlier stages to train on again."""
    objective: ObjectiveConfig = SftConfig()
    optimizer: OptimizerConfig = AdamwConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    strategy: StrategyConfig = Fsdp2Config()
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: compute in bfloat16 with fp32 master weights and fp32 gradient reduction."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    """Optimizer steps; exactly one of `epochs` and `steps`."""
    batch: Positive = 64
    """Documents (chats or texts) per optimizer step, over all workers."""
    max_length: Positive = 2048
    """Longest chat or text in tokens; a longer one is quarantined with reason `too_long`."""
    curriculum: Curriculum | None = None
    """Rows by difficulty; default: epochs of shuffled rows."""
    reptile: Reptile | None = None
    """Tasks by turns with outer steps between them, instead of all rows mixed."""
    packing: bool = True
    """Put several documents in one row, each isolated from the others (best fit, within one optimizer step)."""
    pack_length: Positive | None = None
    """Tokens of one packed row; default: `max_length`, for objectives over several answers that times their number."""
    micro_batch: Positive = 8
    """Packed rows of one forward pass per worker; accumulation follows from it and cannot move the loss."""
    validation: ValidationConfig | None = None
    images: ImagesConfig | None = None
    """Show the model the images of the rows' `images` column."""
    router_loss: Annotated[float, Field(ge=0)] | None = None
    """Weight of the load-balancing loss of a mixture of experts; default: the model's own (`router_aux_loss_coef`). Its
    counts take a forward pass of their own per step; 0 leaves the loss out."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the decoder layers before the first step, once per run and in seconds. Needs a C++ compiler where it
    runs. A CPU without units for bf16 leaves it out under bf16, for which there is faster code of our own. A resumed
    run is the same to the bit where rows are laid end to end (CPU, or flash attention), else to rounding."""
    workers: TrainWorkers = TrainWorkers()
    checkpoint: CheckpointConfig = CheckpointConfig()
    gate: GateConfig | None = GateConfig()
    """Compare what is written with what was trained; null writes it unseen, as it is with `images`."""
    log_every: Positive = 1
    divergence: DivergenceConfig | None = DivergenceConfig()
    """When to give up on a run that gets worse; null: only where the loss or its gradient is not finite. Not watched
    under `curriculum` and `reptile`, whose order of rows makes the loss rise."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Where the steps are shown beside metrics.jsonl and Ray's metrics, which are always written. In a sweep each trial
    is a run of its own there, written when the trial has ended."""

    def identity(self) -> Tree:
        """As for every schema; what is left unset decides nothing."""
        return {k: v for k, v in super().identity().items() if v is not None or k not in _UNSET_BY_DEFAULT}

    def _not_compiled(self) -> str | None:
        """What of the job stands against `compile`."""
        if self.images is not None:
            return "images"
        if self.strategy.type == "deepspeed":
            return "strategy deepspeed"
        return None if self.model.peft.name in COMPILED else f"method {self.model.peft.name}"

    @property
    def pack_capacity(self) -> int:
        """Tokens of one packed row."""
        return self.pack_length or self.longest_document

    @property
    def pass_tokens(self) -> int:
        """Most tokens of one forward pass."""
        return self.micro_batch * self.pack_capacity

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document: a chat or text, or a pair of chats that is never split."""
        return self.max_length * self.segments

    @property
    def segments(self) -> int:
        """Most segments of one document, each of up to `max_length` tokens; see `itune_ray.train.documents`."""
        if self.objective.type == "rrhf":
            return self.objective.answers
        if self.model.peft.type == "l_tuning":
            return len(self.model.peft.labels)
        return {"pairs": 2, "compared": 2, "labelled": 4}.get(self.objective.rows, 1)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainJob":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of `epochs` and `steps`")
        if self.pack_length is not None and self.pack_length < self.longest_document:
            needed = {1: "max_length", 2: "twice max_length, for a pair,"}.get(
                self.segments, f"{self.segments} times max_length, for a row's answers,"
            )
            raise ValueError(f"pack_length {self.pack_length} must be at least {needed} {self.longest_document}")
        if self.objective.type == "reward" and self.model.adapter is not None:
            raise ValueError(
                "objective reward starts from a whole model: set model.path to the merged one (step://sft/model)"
            )
        if self.objective.type == "domain" and self.replay is None:
            raise ValueError("objective domain adapts to `data` and keeps to general rows: name these in `replay`")
        if self.objective.type == "domain" and self.reptile is not None:
            raise ValueError(
                "objective domain weighs general rows against the domain's, and reptile takes one task at a time: "
                "leave one out"
            )
        if self.optimizer.type == "muon" and self.strategy.type != "ddp":
            raise ValueError("optimizer muon needs whole matrices: set strategy.type=ddp, or optimizer.type=adamw")
        if self.reptile is not None and self.curriculum is not None:
            raise ValueError("curriculum and reptile each decide the order of the rows: leave one out")
        if self.reptile is not None and (self.strategy.type == "deepspeed" or self.model.peft.type == "adalora"):
            raise ValueError(
                "reptile needs weights that nothing else rewrites: take strategy ddp or fsdp2, and no adalora"
            )
        elastic = self.workers.fewest < self.workers.most
        if elastic and self.strategy.type == "fsdp2" and self.strategy.shard_over != "all":
            raise ValueError(
                f"strategy.shard_over {self.strategy.shard_over} needs a fixed number of workers, since others may be "
                "no multiple of it: set shard_over=all, or one workers.num"
            )
        if (reason := refusal(self.model.peft, self.strategy)) is not None:
            raise ValueError(reason)
        if self.images is not None:
            seen = self.packing, self.objective.type, self.model.peft.type, self.images.trained
            if (reason := images_refusal(*seen, fresh=self.model.path is None)) is not None:
                raise ValueError(reason)
            if self.router_loss is not None:
                raise ValueError("router_loss is of models of text alone: leave it out with images")
        if isinstance(self.objective, SftConfig):
            terms = self.objective.vision, self.objective.fusion
            reason = terms_refusal(*terms, self.images is not None, self.model.peft.type, self.batch)
            if reason is not None:
                raise ValueError(reason)
        if self.gate is not None and self.gate.vllm is not None and SUPPORT[self.model.peft.name].route == "none":
            raise ValueError(
                f"gate.vllm cannot be asked about method {self.model.peft.name}: {SUPPORT[self.model.peft.name].note}"
            )
        fresh_prompt = SUPPORT[self.model.peft.name].route == "prompt embeds" and self.model.path is None
        if self.gate is not None and self.gate.vllm is not None and fresh_prompt:
            raise ValueError(f"gate.vllm needs a base to serve method {self.model.peft.name} on: set model.path")
        scores = self.objective.type in ("reward", "classify")
        if self.gate is not None and self.gate.vllm is not None and (scores or self.images is not None):
            raise ValueError("gate.vllm compares log-probabilities of text: leave it out with images or a scalar head")
        if (self.model.peft.type == "l_tuning") != (self.objective.type == "classify"):
            raise ValueError(
                "method l_tuning and objective classify need each other: set model.peft.type=l_tuning and "
                f"objective.type=classify; got {self.model.peft.type} and {self.objective.type}"
            )
        if self.compile and (reason := self._not_compiled()) is not None:
            raise ValueError(
                f"compile=true is for text, with strategy ddp or fsdp2 and method {', '.join(COMPILED)}; got {reason}"
            )
        if self.gradient_checkpointing and self.model.peft.name in CACHED:
            raise ValueError(
                f"{self.model.peft.name} keeps keys and values that recomputation would add a second time: "
                "set gradient_checkpointing=false"
            )
        return self
