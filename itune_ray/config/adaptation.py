"""Schemas of parameter-efficient methods, and what each works with: strategies, and the way of its result to vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.shared import Fraction, Positive

Targets = tuple[str, ...] | Literal["all-linear"]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(gt=0)]


class Adaptation(Schema):
    """What every config of `model.peft` has beside its `type`."""

    @property
    def name(self) -> str:
        """The method: its row of `SUPPORT`."""
        return str(vars(self)["type"])


class FullConfig(Adaptation):
    """Train every weight."""

    type: Literal["full"] = "full"


class LowRank(Adaptation):
    """What LoRA and its relatives share."""

    rank: Positive = 16
    alpha: Scale | None = None
    """Scale numerator; default: twice the rank."""
    dropout: Dropout = 0.0
    target: Targets = "all-linear"
    """Module names to adapt; `all-linear` takes every linear layer but the head (QLoRA's recipe)."""


class LoraConfig(LowRank):
    """Low-rank adaptation W' = W0 + (alpha / rank) B A (survey eq. 7; Hu et al. 2022)."""

    type: Literal["lora"] = "lora"
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length m of every row of W' apart from its direction: W' = m (W0 + s B A) / |W0 + s B A| by rows (Liu
    et al. 2024). m starts as the row lengths of W0."""
    train_tokens: tuple[str, ...] = ()
    """Tokens whose embedding rows are trained too, e.g. chat markers the base never saw."""

    @property
    def name(self) -> str:
        return "dora" if self.dora else "rslora" if self.rslora else "lora"


class QloraConfig(LowRank):
    """LoRA over a base that is frozen in 4 bits (Dettmers et al. 2023): NF4 in blocks of 64, scales quantised again.

    What is trained fits the rounded base, so the result is that base, written out, with the adapter merged in."""

    type: Literal["qlora"] = "qlora"
    rslora: bool = False
    """See `LoraConfig.rslora`."""


class AdaloraConfig(LowRank):
    """Low-rank change P diag(e) Q whose ranks shrink where they matter least (Zhang et al. 2023).

    The total rank falls as a cubic from `rank` to `target_rank` per matrix; singular values of the least important
    triplets are set to 0. Importance is smoothed |w dL/dw| times its smoothed deviation."""

    type: Literal["adalora"] = "adalora"
    rank: Positive = 12
    target_rank: Positive = 8
    """Mean rank at the end."""
    warmup: Fraction = 0.1
    """Share of the steps before the ranks begin to shrink."""
    final: Fraction = 0.3
    """Share of the steps at the end in which they stay."""
    every_steps: Positive = 1
    """Steps from one allocation to the next."""
    beta: tuple[Fraction, Fraction] = (0.85, 0.85)
    """Smoothing of the importance, and of its deviation."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the mean over P and Q of |PᵀP - I| and |QQᵀ - I| (Frobenius; the paper squares, the released code and
    its published weights do not)."""

    @model_validator(mode="after")
    def _shrinks(self) -> "AdaloraConfig":
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank {self.target_rank} must be at most rank {self.rank}: ranks only shrink")
        if self.warmup + self.final >= 1:
            raise ValueError(f"warmup {self.warmup} and final {self.final} must leave steps in between: below 1 in sum")
        return self


PeftMethod = Literal["IA3", "LN_TUNING", "VERA", "OFT", "LOHA", "LOKR", "HRA", "MISS", "FOURIERFT"]


class PeftLibraryConfig(Adaptation):
    """Any other method of the `peft` library whose result can be merged, by the library's own name and arguments."""

    type: Literal["peft"] = "peft"
    method: PeftMethod
    args: dict[str, JsonValue] = {}
    """Arguments of the library's config class, e.g. {r: 8, target_modules: all-linear}. Where the library knows no
    layers of its own for a model's family, target_modules is `all-linear`."""

    @property
    def name(self) -> str:
        return self.method.lower()


class BitfitConfig(Adaptation):
    """Train biases alone (Ben Zaken et al. 2022). Families that have none by default, such as Llama, first get zero
    biases where their config knows some, which is tuning of added biases, not the original. The result is a plain
    checkpoint."""

    type: Literal["bitfit"] = "bitfit"


class PromptTuningConfig(Adaptation):
    """Trained embeddings before every document (Lester et al. 2021)."""

    type: Literal["prompt_tuning"] = "prompt_tuning"
    tokens: Positive = 20
    """Virtual tokens; the paper takes 100 on large models."""
    text: str | None = None
    """Start from the embeddings of this text, repeated or cut; default: embeddings of random words."""


class PTuningConfig(Adaptation):
    """Prompt embeddings made by a small network while they are trained (Liu et al. 2021)."""

    type: Literal["p_tuning"] = "p_tuning"
    tokens: Positive = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: Positive = 128
    """Width of the network."""


class PrefixTuningConfig(Adaptation):
    """Trained keys and values before those of every document, in every layer, made by a two-layer network while they
    are trained (Li and Liang 2021): Attn = softmax(Q [P_K; K]ᵀ / √d) [P_V; V]."""

    type: Literal["prefix_tuning"] = "prefix_tuning"
    tokens: Positive = 20
    hidden: Positive = 128
    """Width of the network, which is not part of the result."""


class PTuningV2Config(Adaptation):
    """Prefix tuning whose keys and values are trained themselves (Liu et al. 2022)."""

    type: Literal["p_tuning_v2"] = "p_tuning_v2"
    tokens: Positive = 20


class Bottleneck(Adaptation):
    """What adapters with a bottleneck share: h + W_up f(W_down h), W_up zero (Compacter: next to zero) at the start."""

    reduction: Positive = 16
    """Hidden size divided by the width of the bottleneck."""


class HoulsbyConfig(Bottleneck):
    """Bottlenecks after attention and after the MLP, inside the residual, f = swish (Houlsby et al. 2019)."""

    type: Literal["houlsby"] = "houlsby"


class PfeifferConfig(Bottleneck):
    """Bottlenecks after the MLP alone, f = swish (Pfeiffer et al. 2021)."""

    type: Literal["pfeiffer"] = "pfeiffer"


class CompacterConfig(Bottleneck):
    """Houlsby's bottlenecks with W = Σ_i A_i ⊗ (s_i t_iᵀ), the A_i shared by all layers, f = gelu (Mahabadi et al.
    2021). At the start A_i is N(0, (1e-4)²), s_i and t_i are Glorot-uniform."""

    type: Literal["compacter"] = "compacter"
    reduction: Positive = 32
    terms: Positive = 4
    """Terms of the sum; divides hidden size and bottleneck."""


class UpperLayers(Adaptation):
    """What the methods that adapt the attention of the upper layers share."""

    layers: Positive | None = None
    """Layers from the top; default: all but the lowest two, as the papers' 30 of 32, and at least one."""

    def adapted_layers(self, total: int) -> int:
        """How many of a model's layers are adapted."""
        return self.layers or max(1, total - 2)


class LlamaAdapterConfig(UpperLayers):
    """Prompts that attention sees through a softmax of their own and a gate: o = Attn(x) + g softmax(Q K_Pᵀ / √d) V_P,
    g zero at the start, one per layer (Zhang et al. 2024). For the families that the `peft` library does it for:
    llama and mistral."""

    type: Literal["llama_adapter"] = "llama_adapter"
    tokens: Positive = 10
    """Prompts of a layer."""


class LlamaExcitorConfig(UpperLayers):
    """Prompts that change what is attended to and no value (survey eq. 27, corrected; Zou et al. 2024):
    softmax((Q Kᵀ + g Q K_Eᵀ) / √d) V with K_E(t) = softmax(x_t A B Pᵀ / √d_P) P, a key of token t alone. g is zero at
    the start, one per key head."""

    type: Literal["llama_excitor"] = "llama_excitor"
    tokens: Positive = 30
    """Prompts P of a layer."""
    rank: Positive = 16
    """Of A B."""


class LTuningConfig(Adaptation):
    """Classification by the labels' own words (Kowsher et al. 2024, L-Tuning): a text is read once per label, behind
    what is made from the frozen model's states of the label, M(label). A scalar head says whether the label fits.
    Trained by objective `classify`."""

    silent_at_default = frozenset({"form"})

    type: Literal["l_tuning"] = "l_tuning"
    form: Literal["prefix", "prompt"] = "prefix"
    """prefix: keys and values Z(F(M(label))), F pooling the states by learned queries and Z prefix tuning's two-layer
    network. prompt: embeddings G(M(label)) before the text's, one for each token of the label, by a two-layer network
    G."""
    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    """The words of each label."""
    tokens: Positive = 4
    """Virtual tokens of a label's prefix, one query of F each; a prompt has as many as the label has tokens."""
    hidden: Positive = 128
    """Width of Z or G."""

    @property
    def name(self) -> str:
        return "l_tuning_prompt" if self.form == "prompt" else "l_tuning"

    @model_validator(mode="after")
    def _differ(self) -> "LTuningConfig":
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must differ; got {list(self.labels)}")
        if self.form == "prompt" and self.tokens != type(self).model_fields["tokens"].default:
            raise ValueError("tokens is of form=prefix: a prompt has as many as a label has tokens; leave it out")
        return self


BOTTLENECKS = (HoulsbyConfig, PfeifferConfig, CompacterConfig)
PROMPTS = (PromptTuningConfig, PTuningConfig, PrefixTuningConfig, PTuningV2Config, LTuningConfig)
CACHED = ("prefix_tuning", "p_tuning_v2", "l_tuning")
"""Methods whose virtual tokens are keys and values in a cache."""

PeftConfig = Annotated[
    FullConfig
    | LoraConfig
    | QloraConfig
    | AdaloraConfig
    | PeftLibraryConfig
    | BitfitConfig
    | PromptTuningConfig
    | PTuningConfig
    | PrefixTuningConfig
    | PTuningV2Config
    | HoulsbyConfig
    | PfeifferConfig
    | CompacterConfig
    | LlamaAdapterConfig
    | LlamaExcitorConfig
    | LTuningConfig,
    Field(discriminator="type"),
]

# --- what works with what -------------------------------------------------------------------------------------------

StrategyName = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
"""A strategy, DeepSpeed's by its stage."""
STRATEGY_NAMES: tuple[StrategyName, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
Route = Literal["adapter", "merged", "prompt embeds", "none"]
"""How vLLM gets the result: the adapter over the base, `model/` with the change merged in, the adapter as embeddings
before each prompt, or not at all."""


@dataclass(frozen=True)
class Support:
    """What a method works with."""

    route: Route
    note: str
    """Why the route is that."""
    refused: Mapping[StrategyName, str] = field(default_factory=dict[StrategyName, str])
    """Strategy -> why it cannot train the method; all others do."""


_ZERO = "DeepSpeed keeps gradients to itself, and the budget needs them"
_FOUR_BITS = "4-bit codes are buffers, which stay whole on every rank, so nothing of the base would be sharded"
_SHARED = "its matrices A are shared by all layers, and weights are sharded layer by layer"

_MERGED = Support("merged", "vLLM takes LoRA adapters alone")
_PROMPT = Support("prompt embeds", "the prompt is no token: it is sent as embeddings")
_PREFIX = Support("none", "vLLM takes no keys and values from outside")
_MODULES = Support("none", "the bottlenecks are new modules that vLLM's models lack")

SUPPORT: dict[str, Support] = {
    "full": Support("merged", "the weights themselves"),
    "lora": Support("adapter", "many adapters share one engine"),
    "rslora": Support("adapter", "the scale is read from the adapter"),
    "dora": Support("merged", "vLLM refuses adapters with row lengths"),
    "qlora": Support(
        "merged",
        "the adapter fits the rounded base, not the original",
        {"fsdp2": _FOUR_BITS, "zero3": _FOUR_BITS},
    ),
    "adalora": Support(
        "merged",
        "vLLM refuses adapters with singular values",
        {
            "fsdp2": "its budget ranks whole singular triplets, of which a rank has a part",
            "zero1": _ZERO,
            "zero2": _ZERO,
            "zero3": _ZERO,
        },
    ),
    "ia3": _MERGED,
    "ln_tuning": _MERGED,
    "vera": _MERGED,
    "oft": _MERGED,
    "loha": _MERGED,
    "lokr": _MERGED,
    "hra": _MERGED,
    "miss": _MERGED,
    "fourierft": _MERGED,
    "bitfit": Support("merged", "a plain checkpoint of a family that knows biases"),
    "prompt_tuning": _PROMPT,
    "p_tuning": _PROMPT,
    "prefix_tuning": _PREFIX,
    "p_tuning_v2": _PREFIX,
    "houlsby": _MODULES,
    "pfeiffer": _MODULES,
    "compacter": Support("none", _MODULES.note, {"fsdp2": _SHARED}),
    "l_tuning": _PREFIX,
    "l_tuning_prompt": Support("none", "its scalar head classifies, and vLLM's models lack it"),
    "llama_adapter": Support("none", "vLLM's attention has one softmax, and none for prompts"),
    "llama_excitor": Support("none", "vLLM's models compute keys without what the prompts add"),
}
"""Method -> what it works with; `docs/peft.md` shows it as a table, and a test trains or refuses every cell."""


def strategy_name(strategy: Any) -> StrategyName:
    """The name of a strategy's config in `Support.refused`."""
    return f"zero{strategy.stage}" if strategy.type == "deepspeed" else strategy.type  # pyright: ignore


def refusal(peft: Adaptation, strategy: Any) -> str | None:
    """Why a strategy cannot train a method, or None when it can."""
    support, name = SUPPORT[peft.name], strategy_name(strategy)
    if (reason := support.refused.get(name)) is None:
        return None
    others = ", ".join(other for other in STRATEGY_NAMES if other not in support.refused)
    return f"method {peft.name} cannot be trained with strategy {name}: {reason}; set strategy to one of {others}"


def support_table() -> str:
    """`SUPPORT` as the Markdown table of `docs/peft.md`."""
    head = f"| method | {' | '.join(STRATEGY_NAMES)} | to vLLM | because |"
    lines = [head, "|" + "---|" * (len(STRATEGY_NAMES) + 3)]
    for method, support in SUPPORT.items():
        cells = " | ".join("refused" if name in support.refused else "yes" for name in STRATEGY_NAMES)
        lines.append(f"| {method} | {cells} | {support.route} | {support.note} |")
    reasons: dict[str, list[str]] = {}
    for method, support in SUPPORT.items():
        for name, reason in support.refused.items():
            reasons.setdefault(reason, []).append(f"{method} with {name}")
    return "\n".join([*lines, "", *(f"- {', '.join(cells)}: {reason}." for reason, cells in reasons.items())])
