"""Objectives of `itune train`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.classify import ClassifyConfig
from itune_ray.config.shared import Positive

Rows = Literal["answers", "pairs", "compared", "labelled", "ranked", "distributions", "classes", "adapted"]
Supervise = Literal["assistant", "last_assistant", "all"]
"""Which tokens of a chat count."""


class SftConfig(Schema):
    """Supervised fine-tuning: negative log-likelihood over supervised tokens, divided once by their global count
    (survey eq. 6 and 14)."""

    rows: ClassVar[Rows] = "answers"
    """What a row must hold, and what it becomes; see `itune_ray.train.documents`."""
    silent_at_default = frozenset({"vision", "fusion"})

    type: Literal["sft"] = "sft"
    supervise: Supervise = "assistant"
    """Which tokens of a chat count: every assistant turn with its end-of-turn token, the last one, or all. Text rows
    are always supervised whole."""
    vision: Annotated[float, Field(ge=0)] = 0.0
    """With `images`, weight of a contrast between images and answers over the rows of a step (survey eq. 9, whose terms
    are open: SigLIP's sigmoid loss between means of projected features and of the answers' embeddings)."""
    fusion: Annotated[float, Field(ge=0)] = 0.0
    """With `images`, weight of image-text matching (survey eq. 9, as above): an answer is to be likelier with its own
    images than with those of another row of the step. A step then computes every row twice."""


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


class DomainConfig(Schema):
    """Domain adaptation (survey eq. 10): negative log-likelihood of the domain's rows, those of `data`, and of general
    ones, those of `replay`, and a term that keeps what is predicted on general rows as it was before the first step.
    Each is per supervised token of its own rows."""

    rows: ClassVar[Rows] = "adapted"

    type: Literal["domain"] = "domain"
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the domain's rows, however many they are."""
    beta: Annotated[float, Field(ge=0)] = 0.1
    """Weight of KL(base || model) on the general rows: larger moves less, and 0 spares the pass over them that writes
    down what the base says. To try: 0, 0.1 and 1."""
    k: Positive = 20
    """The base's likeliest tokens that the divergence tells apart; all others are one bucket."""
    supervise: Supervise = "assistant"
    """As for sft."""


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
    | DomainConfig
    | ClassifyConfig,
    Field(discriminator="type"),
]
