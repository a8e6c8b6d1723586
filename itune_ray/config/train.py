"""Schema of `itune train`."""

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from itune_ray.config.adaptation import CACHED, SUPPORT, refusal
from itune_ray.config.adaptation import FullConfig as FullConfig
from itune_ray.config.adaptation import LoraConfig as LoraConfig
from itune_ray.config.adaptation import PeftConfig as PeftConfig
from itune_ray.config.base import Schema, Tree
from itune_ray.config.classify import ClassifyConfig as ClassifyConfig
from itune_ray.config.course import Curriculum, Replay, Reptile
from itune_ray.config.gate import GateConfig
from itune_ray.config.images import ImagesConfig
from itune_ray.config.images import refusal as images_refusal
from itune_ray.config.roles import Env, Holder, Role
from itune_ray.config.shared import Fraction, Job, MixturePart, ModelRef, Positive, Thinking
from itune_ray.config.trackers import TrackerConfig

# --- the model -----------------------------------------------------------------------------------------------------


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


# --- what is optimised ---------------------------------------------------------------------------------------------

Rows = Literal["answers", "pairs", "compared", "labelled", "ranked", "distributions", "classes"]


class SftConfig(Schema):
    """Supervised fine-tuning: negative log-likelihood over supervised tokens, divided once by their global count
    (survey eq. 6 and 14)."""

    rows: ClassVar[Rows] = "answers"
    """What a row must hold, and what it becomes; see `itune_ray.train.documents`."""

    type: Literal["sft"] = "sft"
    supervise: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens of a chat count: every assistant turn with its end-of-turn token, the last one, or all. Text rows
    are always supervised whole."""


class DpoConfig(Schema):
    """Direct preference optimisation (survey eq. 12; Rafailov et al. 2023): -log σ(β(Δw - Δl)) over pairs, Δ the
    log-probability of an answer minus what it was before the first step."""

    rows: ClassVar[Rows] = "pairs"

    type: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to its reference: larger moves less."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs assumed to be labelled the wrong way round: above 0 this is cDPO (Mitchell 2023)."""
    nll: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answers' negative log-likelihood per token, which keeps them likely: above 0 this is RPO
    (Pang et al. 2024)."""


class RobustConfig(Schema):
    """Robust DPO (Chowdhury et al. 2024): the DPO loss of the true labels, estimated from labels of which a known share
    is flipped."""

    rows: ClassVar[Rows] = "pairs"

    type: Literal["robust"] = "robust"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """As for dpo."""
    flipped: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """ε, the share of pairs that are labelled the wrong way round."""


class IpoConfig(Schema):
    """Identity preference optimisation (Azar et al. 2023): (Δw/nw - Δl/nl - 1/(2τ))² over pairs, per token."""

    rows: ClassVar[Rows] = "pairs"

    type: Literal["ipo"] = "ipo"
    tau: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to its reference: the margin aimed at is 1/(2τ) nats per token."""


class SimpoConfig(Schema):
    """Simple preference optimisation (Meng et al. 2024): -log σ(β(mean log p of the chosen answer's tokens - that of
    the rejected one's) - γ), without a reference."""

    rows: ClassVar[Rows] = "pairs"

    type: Literal["simpo"] = "simpo"
    beta: Annotated[float, Field(gt=0)] = 2.0
    """Scale of the rewards; 2 to 10 in the paper."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """Margin between the rewards; 0.1 to 0.8 times `beta` in the paper."""


class OrpoConfig(Schema):
    """Odds ratio preference optimisation (Hong et al. 2024): negative log-likelihood of the chosen answers plus a
    preference for their odds, in one stage and without a reference."""

    rows: ClassVar[Rows] = "pairs"

    type: Literal["orpo"] = "orpo"
    weight: Annotated[float, Field(gt=0)] = 0.1
    """λ of the odds ratio term."""


class RewardConfig(Schema):
    """A reward model (Bradley and Terry 1952; Ouyang et al. 2022): -log σ(r_w - r_l) over pairs, r a new scalar head's
    value at an answer's last token. The result is a sequence classifier with one label."""

    rows: ClassVar[Rows] = "compared"

    type: Literal["reward"] = "reward"
    margin: str | None = None
    """Field of a row's `meta` that says by how much the chosen reward should lead (Llama 2); default: no margin."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (r_w + r_l)², which holds the rewards' mean near 0; 0.01 is usual."""


class KtoConfig(Schema):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers that are each good or bad. A row is a chat with
    a label, or a pair, which is split into a good answer and a bad one."""

    rows: ClassVar[Rows] = "labelled"

    type: Literal["kto"] = "kto"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """As for dpo."""
    desirable: Annotated[float, Field(gt=0)] = 1.0
    """Weight of a good answer. The paper keeps desirable × good answers at 1 to 4/3 of undesirable × bad ones."""
    undesirable: Annotated[float, Field(gt=0)] = 1.0
    """Weight of a bad answer."""
    label: str = "label"
    """Field of a row's `meta` that is true (or 1) for a good answer and false (or 0) for a bad one."""


class RrhfConfig(Schema):
    """Rank responses to align human feedback (Yuan et al. 2023): Σ max(0, s_i - s_j) over answers i that score below j,
    s an answer's mean log-probability, plus the best answer's negative log-likelihood. A row is a chat whose answers
    are in its `meta`, or a pair."""

    rows: ClassVar[Rows] = "ranked"

    type: Literal["rrhf"] = "rrhf"
    answers: Annotated[int, Field(ge=2)] = 4
    """The most answers of a row; one with more is rejected."""
    field: str = "responses"
    """Field of a row's `meta` that lists its answers as {response, score}; the chat's own last turn is not among them
    unless it is listed. A row without it counts as a pair, the chosen answer above the rejected one."""
    length_power: Annotated[float, Field(ge=0)] = 1.0
    """λ of s = log p / length^λ."""
    nll: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the best answers' negative log-likelihood per token."""


class KdConfig(Schema):
    """Knowledge distillation (survey eq. 3): a divergence between teacher and student per supervised token over the
    teacher's stored k likeliest tokens and one bucket for all others, at T = 1: of a flatter teacher the k hold next to
    nothing."""

    rows: ClassVar[Rows] = "distributions"

    type: Literal["kd"] = "kd"
    k: Positive = 20
    """Tokens of the teacher's that are used; rows must hold at least so many."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """forward: KL(teacher || student), which covers all that the teacher may say; reverse: KL(student || teacher),
    which keeps to what it surely says; jsd: between the two, bounded (Agarwal et al. 2024)."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The teacher's share of the mixture in jsd; near 0 it is like forward, near 1 like reverse."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Weight of the divergence; the rest goes to the negative log-likelihood of the answer itself."""


ObjectiveConfig = Annotated[
    SftConfig
    | DpoConfig
    | RobustConfig
    | IpoConfig
    | SimpoConfig
    | OrpoConfig
    | RewardConfig
    | KtoConfig
    | RrhfConfig
    | KdConfig
    | ClassifyConfig,
    Field(discriminator="type"),
]


class AdamwConfig(Schema):
    """AdamW (Loshchilov and Hutter 2019)."""

    type: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class MuonConfig(Schema):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for embeddings, norms and the head. Strategy ddp only: it
    orthogonalises whole matrices."""

    type: Literal["muon"] = "muon"
    lr: Annotated[float, Field(gt=0)] = 0.02
    momentum: Fraction = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adamw: AdamwConfig = AdamwConfig(lr=3e-3)


OptimizerConfig = Annotated[AdamwConfig | MuonConfig, Field(discriminator="type")]


class ScheduleConfig(Schema):
    """Learning-rate factor over the run: linear warm-up, then decay to `final`."""

    type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: Fraction = 0.03
    """Share of all steps."""
    final: Fraction = 0.0
    """Factor at the last step; ignored by `constant`."""


# --- where it runs -------------------------------------------------------------------------------------------------


class DdpConfig(Schema):
    """Replicated weights, gradients averaged (torch DistributedDataParallel)."""

    type: Literal["ddp"] = "ddp"


class Fsdp2Config(Schema):
    """Weights, gradients and optimizer state sharded per decoder layer (torch `fully_shard`)."""

    beside_identity = frozenset({"shard_over"})

    type: Literal["fsdp2"] = "fsdp2"
    shard_over: Literal["all", "node"] | Positive = "all"
    """Workers that share one copy of the model: all; those of a node, so that weights are gathered within nodes and
    only gradients cross them (HSDP); or so many, neighbours by rank. Their number must divide that of the workers."""
    reshard_after_forward: bool = True
    """Free gathered weights after each forward: less memory, one more all-gather (ZeRO-3 against ZeRO-2)."""


class DeepspeedConfig(Schema):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020): optimizer state, gradients and weights cut into equal runs."""

    beside_identity = frozenset({"offload"})

    type: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = 3
    """What is sharded: optimizer state and fp32 master weights (1), gradients too (2), weights too (3)."""
    persist_below: Annotated[int, Field(ge=0)] | None = None
    """Stage 3 keeps weights of at most so many elements gathered on every rank; default: 100,000."""

    offload: bool = False
    """Keep optimizer state and fp32 weights, in stage 3 the sharded weights too, in host memory, and update them
    there: room on the GPU for time."""

    @model_validator(mode="after")
    def _weights_are_sharded(self) -> "DeepspeedConfig":
        if self.persist_below is not None and self.stage != 3:
            raise ValueError(f"persist_below is for stage 3, and stage {self.stage} never shards weights: leave it out")
        return self


StrategyConfig = Annotated[DdpConfig | Fsdp2Config | DeepspeedConfig, Field(discriminator="type")]


def _count(value: object) -> object:
    pair = cast(list[object] | tuple[object, ...], value) if type(value) in (list, tuple) else (value, value)
    few, many = pair if len(pair) == 2 else (0, 0)
    if type(few) is not int or type(many) is not int or not 0 < few <= many:
        raise ValueError("must be a positive number, or [fewest, most]")
    return value


WorkerCount = Annotated[int | tuple[int, int], BeforeValidator(_count)]
"""A number of workers, or the fewest and the most."""


class TrainWorkers(Holder):
    """Ray Train workers. Any number gives the same optimisation."""

    role: ClassVar[Role] = "train"

    num: WorkerCount = 1
    """How many; or [fewest, most]: as many as the cluster has room for, fewer when machines go and more when they come,
    each time from the last checkpoint."""
    resize_every_s: Annotated[float, Field(gt=0)] = 60.0
    """How often [fewest, most] looks whether there is room for more."""
    env: Env = {}
    """Environment variables of every worker, e.g. {NCCL_SOCKET_IFNAME: ens5, FI_PROVIDER: efa}."""
    torch_threads: Positive | None = None
    """Threads of one CPU worker; default: 1, since two on a busy machine are ten times slower."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint before the job gives up."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Of one device in the precision used, e.g. 989 for bf16 on an H100: utilisation (MFU) is then reported."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Deadline of placing all workers together, new nodes included."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Of torch.distributed; auto: nccl where workers have GPUs, else gloo."""
    collective_timeout_s: Positive = 600
    """Deadline of one collective; a rank that did not come is named."""

    @property
    def fewest(self) -> int:
        """Workers without which nothing is trained."""
        return self.num if isinstance(self.num, int) else self.num[0]

    @property
    def most(self) -> int:
        """The most workers that there may be at once."""
        return self.num if isinstance(self.num, int) else self.num[1]


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

    data: Annotated[tuple[MixturePart, ...], Field(min_length=1)]
    """Each row is scored once, whatever weight it has."""
    every_steps: Positive | None = None
    """Score so often; the start and the end are always scored."""


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
    workers: TrainWorkers = TrainWorkers()
    checkpoint: CheckpointConfig = CheckpointConfig()
    gate: GateConfig | None = GateConfig()
    """Compare what is written with what was trained; null writes it unseen, as it is with `images`."""
    log_every: Positive = 1
    divergence: DivergenceConfig | None = DivergenceConfig()
    """When to give up on a run that gets worse; null: only where the loss or its gradient is not finite."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Where the steps are shown beside metrics.jsonl and Ray's metrics, which are always written; not used by a
    sweep's trials."""

    def identity(self) -> Tree:
        """As for every schema; what is left unset decides nothing."""
        return {k: v for k, v in super().identity().items() if v is not None or k not in _UNSET_BY_DEFAULT}

    @property
    def pack_capacity(self) -> int:
        """Tokens of one packed row."""
        return self.pack_length or self.longest_document

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
        if self.optimizer.type == "muon" and self.strategy.type != "ddp":
            raise ValueError("optimizer muon needs whole matrices: set strategy.type=ddp, or optimizer.type=adamw")
        if self.reptile is not None and self.curriculum is not None:
            raise ValueError("curriculum and reptile each decide the order of the rows: leave one out")
        if self.reptile is not None and (self.strategy.type == "deepspeed" or self.model.peft.type == "adalora"):
            raise ValueError(
                "reptile needs weights that nothing else rewrites: take strategy ddp or fsdp2, and no adalora"
            )
        if (reason := refusal(self.model.peft, self.strategy)) is not None:
            raise ValueError(reason)
        if self.images is not None:
            seen = self.packing, self.objective.type, self.model.peft.type, self.images.trained
            if (reason := images_refusal(*seen, fresh=self.model.path is None)) is not None:
                raise ValueError(reason)
        if self.gate is not None and self.gate.vllm is not None and SUPPORT[self.model.peft.name].route == "none":
            raise ValueError(
                f"gate.vllm cannot be asked about method {self.model.peft.name}: {SUPPORT[self.model.peft.name].note}"
            )
        if (self.model.peft.type == "l_tuning") != (self.objective.type == "classify"):
            raise ValueError(
                "method l_tuning and objective classify need each other: set model.peft.type=l_tuning and "
                f"objective.type=classify; got {self.model.peft.type} and {self.objective.type}"
            )
        if self.gradient_checkpointing and self.model.peft.type in CACHED:
            raise ValueError(
                f"{self.model.peft.type} keeps keys and values that recomputation would add a second time: "
                "set gradient_checkpointing=false"
            )
        return self
