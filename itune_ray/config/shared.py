"""Sections that several jobs share: where rows come from, which model, which engine, how it samples, where it runs."""

from typing import Annotated, Any, ClassVar, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from itune_ray.config.base import Schema, Tree
from itune_ray.config.roles import Env, Holder, Role, Roles

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


Layout = Literal[
    "records",
    "alpaca",
    "messages",
    "sharegpt",
    "preference",
    "qa",
    "oasst",
    "oasst_best",
    "superni",
    "prompt",
    "text",
    "documents",
    "fields",
]
"""Row layouts, see `itune_ray.data.formats`."""
Format = Literal["auto", Layout]
"""A layout, or to decide by the columns."""


# --- sources -------------------------------------------------------------------------------------------------------


class FileSource(Schema):
    """Rows from files: JSONL, JSON, CSV or Parquet (also `.gz`), or the payload of an earlier artifact."""

    type: Literal["file"] = "file"
    path: str
    """A file, a folder of files, or a URI (s3://, gs://); in a pipeline also `step://NAME/PAYLOAD`."""
    format: Format = "auto"
    """Row layout; `auto` decides by the columns of the first row and says what it took."""
    name: str | None = None
    """First part of every row key; default: the file's stem. Rows of an artifact keep their keys: there it names them
    in reports and in a filter's `only`, by default after the artifact's stage, and tells rows apart whose key another
    input of a curation holds too: their source becomes `NAME/SOURCE`."""
    limit: Positive | None = None
    """Read only the first so many rows."""
    max_row_bytes: Positive = 16 * 2**20
    """A row that is larger as JSON is quarantined as `oversized`."""


class PlaygroundSource(Schema):
    """Rows of the built-in world, made from a seed: no files, no network."""

    type: Literal["playground"] = "playground"
    split: Literal["chat", "prompts", "raw", "manual", "test", "test_paraphrase"]
    """chat: instruction and exact answer; prompts: instruction only; raw: pretraining text without chat turns; manual:
    rated human-style rows; test and test_paraphrase: instances for evaluation, seen and held-out wordings."""
    rows: Positive
    seed: int = 0
    options: dict[str, Any] = {}
    """Arguments of the split, e.g. family weights; refused by name when unknown."""
    name: str | None = None
    """First part of every row key; default: `playground-SPLIT`."""


class HubSource(Schema):
    """A dataset of the Hugging Face Hub or a folder written by `datasets.save_to_disk`."""

    type: Literal["hub"] = "hub"
    path: str
    """`org/name` or a folder."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Format = "auto"
    name: str | None = None
    limit: Positive | None = None
    max_row_bytes: Positive = 16 * 2**20
    """A row that is larger as JSON is quarantined as `oversized`."""


class CustomSource(Schema):
    """Your own rows: a function that yields `itune_ray.data.records.Record`."""

    type: Literal["custom"] = "custom"
    import_path: str
    """`package.module:function`; its source code is part of the artifact's identity."""
    args: dict[str, Any] = {}
    name: str | None = None


Source = Annotated[FileSource | PlaygroundSource | HubSource | CustomSource, Field(discriminator="type")]


class MixturePart(Schema):
    """One part of a union with its weight (survey eq. 5)."""

    source: Source
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used per epoch: 0.5 takes a hash-sampled half, 2 uses each row twice."""
    priority: int = 0
    """On equal content the row of the higher priority stays."""


# --- models --------------------------------------------------------------------------------------------------------


class ThinkingBudget(Schema):
    """Thoughts of limited length."""

    budget: Positive
    """Tokens of a thought; a longer one is cut, and the answer follows."""


Thinking = Literal["keep", "strip"] | ThinkingBudget


class ModelRef(Schema):
    """A pretrained model as others publish it: nothing is keyed on its name."""

    silent_at_default = frozenset({"thinking"})

    path: str
    """A Hub id, a folder, a URI (s3://, gs://), `playground://base`, `playground://teacher`, or in a pipeline
    `step://NAME/model`. Gated Hub models use the token in the environment (HF_TOKEN)."""
    revision: str | None = None
    """Hub branch, tag or commit; the resolved commit is recorded."""
    adapter: str | None = None
    """An adapter folder or URI to use with it, e.g. `step://sft/adapter`: LoRA's, which takes an engine with
    `max_adapters`, or virtual tokens, which take one with `prompt_embeds`."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    chat_template: str | None = None
    """A Jinja chat template, or a file that holds one, for models that ship none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    thinking: Thinking = "keep"
    """What becomes of a reasoning model's thoughts, in training, generation and evaluation alike: keep; strip; or
    {budget: N}, by which they end after N tokens. Benchmarks grade what follows a thought."""


# --- engines -------------------------------------------------------------------------------------------------------


class SamplingConfig(Schema):
    """How an engine samples; the defaults are those of distillation in methods D04."""

    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    top_k: int = -1
    """-1 keeps the whole vocabulary."""
    max_tokens: Positive = 1024
    stop: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    """Answers are JSON that fits this schema."""
    regex: str | None = None
    """Answers match this expression whole."""
    choice: tuple[str, ...] = ()
    """Answers are one of these."""

    @model_validator(mode="after")
    def _one_structure(self) -> "SamplingConfig":
        given = [name for name in ("json_schema", "regex", "choice") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"answers have one structure: set one of {', '.join(given)}")
        return self


class VllmEngineConfig(Schema):
    """vLLM in an actor of ours: LLMEngine stepped in-process on CPU, AsyncLLM on GPU."""

    beside_identity = frozenset(
        {
            "max_num_seqs",
            "gpu_memory_utilization",
            "kv_cache_gb",
            "tensor_parallel",
            "pipeline_parallel",
            "max_adapters",
            "max_adapter_rank",
            "prompt_embeds",
            "max_logprobs",
            "enforce_eager",
            "request_log",
        }
    )

    type: Literal["vllm"] = "vllm"
    max_model_len: Positive | None = None
    """Longest prompt plus answer in tokens; default: the model's own."""
    max_num_seqs: Positive = 256
    """Sequences that one engine decodes at once."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_gb: Annotated[float, Field(gt=0)] = 1.0
    """KV cache on CPU; on GPU `gpu_memory_utilization` decides."""
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    max_adapters: Annotated[int, Field(ge=0)] = 0
    """LoRA adapters that can be loaded at once; 0 switches LoRA off."""
    max_adapter_rank: Positive = 64
    prompt_embeds: bool = False
    """Take prompts as embeddings: adapters of prompt_tuning and p_tuning, in any number, instead of LoRA's."""
    max_logprobs: Positive = 20
    enforce_eager: bool | None = None
    """Skip graph capture; default: on CPU only."""
    request_log: str | None = None
    """A local file to which the engine appends the id of every request it is given: an audit of what was generated."""
    extra: dict[str, Any] = {}
    """Further arguments of vLLM's EngineArgs, by their own names."""

    @model_validator(mode="after")
    def _one_kind_of_adapter(self) -> Self:
        # Beside embeddings vLLM looks only token positions up, and finds another row's LoRA of the embedding there.
        if self.prompt_embeds and self.max_adapters:
            raise ValueError("prompt_embeds and max_adapters need an engine each: set one of them")
        return self


class FakeEngineConfig(Schema):
    """A pure function with fault injection, for unit tests only."""

    beside_identity = frozenset({"request_log", "latency_s", "load_s"})

    type: Literal["fake"] = "fake"
    fail_rate: Fraction = 0.0
    """Share of requests, chosen by hash, that return an error on every attempt."""
    flaky_rate: Fraction = 0.0
    """Share of requests that fail on the first attempt only."""
    truncate_rate: Fraction = 0.0
    """Share of completions cut with finish_reason `length`."""
    refuse_rate: Fraction = 0.0
    empty_rate: Fraction = 0.0
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    load_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds until it has loaded."""
    request_log: str | None = None
    """A local file to which the engine appends the id of every request it is given."""


class HttpEngineConfig(Schema):
    """An OpenAI-compatible endpoint that somebody else runs; `model.path` is the model's name there. Rows leave the
    cluster: the endpoint's host is named when the job starts."""

    beside_identity = frozenset(
        {"api_key_env", "requests_per_minute", "tokens_per_minute", "max_retries", "timeout_s", "request_log"}
    )

    type: Literal["http"] = "http"
    url: str
    """Base URL, e.g. https://api.openai.com/v1."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable, where the replica runs, that holds the key; null for an endpoint without one."""
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    """Prompt and generated tokens; a request counts with its `max_tokens` until its answer says how many it took."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Times a request is sent again after 408, 409, 429, 5xx or a lost connection, after a growing pause or as long as
    the endpoint asks for."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Deadline of one attempt."""
    extra: dict[str, Any] = {}
    """Further fields of the request's body."""
    request_log: str | None = None
    """A local file to which the engine appends the id of every request it is given."""

    @model_validator(mode="after")
    def _an_address(self) -> "HttpEngineConfig":
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be that of the endpoint, e.g. https://api.openai.com/v1")
        if parts.username or parts.password:
            raise ValueError("url must hold no credentials: name the key's variable in api_key_env")
        return self


EngineConfig = Annotated[VllmEngineConfig | HttpEngineConfig | FakeEngineConfig, Field(discriminator="type")]


class PoolConfig(Holder):
    """How many engine replicas, and what each takes of the cluster. Where it runs never changes what it produces."""

    role: ClassVar[Role] = "infer"

    replicas: Positive | tuple[Positive, Positive] = 1
    """Replicas, all asked for at once. With [min, max] work begins as soon as min are ready; the others join when they
    come, are given up after `start_timeout_s`, and are no more than fit beside the stage's own workers."""
    gpus_each: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one replica; with tensor or pipeline parallel engines, of one shard."""
    env: Env = {}
    """Environment variables of every replica, e.g. {NCCL_SOCKET_IFNAME: ens5}."""
    max_outstanding: Positive = 512
    """Requests a replica holds at once; more wait at the sender, which is the backpressure."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Deadline of one request, queueing in the engine included."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Deadline of placement plus model loading."""
    max_restarts: Annotated[int, Field(ge=0)] = 2
    """Times a dead replica is started again before the pool gives up."""

    @property
    def least(self) -> int:
        """Replicas without which no work begins."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def most(self) -> int:
        """Replicas that are asked for where there is room."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]

    @model_validator(mode="after")
    def _ordered(self) -> "PoolConfig":
        if self.least > self.most:
            raise ValueError(f"replicas must be [min, max] with min at most max, got [{self.least}, {self.most}]")
        return self


class ServedModel(Schema):
    """A model with the engine that serves it and the pool that holds the replicas."""

    beside_identity = frozenset({"pool"})

    model: ModelRef
    engine: EngineConfig = VllmEngineConfig()
    pool: PoolConfig = PoolConfig()

    @model_validator(mode="after")
    def _one_client(self) -> "ServedModel":
        if isinstance(self.engine, HttpEngineConfig) and self.pool.most != 1:
            raise ValueError("pool.replicas must be 1 for an http engine: one client keeps its rate limits")
        if isinstance(self.engine, HttpEngineConfig) and self.model.thinking != "keep":
            raise ValueError(
                "an endpoint renders chats itself: tell it about thoughts by engine.extra, and leave out model.thinking"
            )
        return self


# --- running -------------------------------------------------------------------------------------------------------


class RayConfig(Schema):
    """How to reach Ray. A submitted job finds its cluster by itself."""

    address: str | None = None
    """`auto`, `host:port` or `ray://...`; default: $RAY_ADDRESS, else a fresh local Ray."""
    num_cpus: Positive | None = None
    """Logical CPUs of a fresh local Ray; default: the larger of 8 and the machine's cores, since most actors idle."""
    dashboard: bool = True
    """Start the dashboard with a fresh local Ray."""
    dashboard_port: Positive | None = None
    """Its port; default: 8265 or the next free one."""
    cluster_file: str | None = None
    """The file that made the cluster (a launcher's YAML or a RayCluster manifest): asks are checked against the nodes
    it may add; default: the one that the cluster launcher leaves on the head, else the nodes that are there."""
    roles: Roles = Roles()
    """Where a cluster has nodes for one kind of work each: the custom resource by which they are known."""


Placement = Literal["auto", "separate", "timeshare", "restart"]


class Budget(Schema):
    """Caps on what a run spends, all its attempts together. At a cap it stops as after an interrupt: what was made is
    kept, and with a larger cap the same command goes on."""

    tokens: Positive | None = None
    """Tokens that engines read and wrote, whoever asked them, and trained tokens."""
    cost: Annotated[float, Field(gt=0)] | None = None
    """Money, by `run.prices`; every living node of the cluster counts."""


class RunSettings(Schema):
    """Where and how a run happens. Never part of an artifact's identity."""

    output: str | None = None
    """Output root, an absolute path or a URI; default: $ITUNE_OUTPUT, else `./runs` on a local machine. It holds
    `<name>/<stage>-<id>/`."""
    ray: RayConfig = RayConfig()
    placement: Placement = "auto"
    """What becomes of running engines while a model is trained. separate: both hold their resources, or the job is
    refused. timeshare: engines sleep and keep theirs, and each device holds one engine and one worker by their shares
    (0.55 and 0.45 GPU). restart: engines are given back and started again when asked next. auto: separate where both
    fit, else restart."""
    stall_s: Annotated[float, Field(gt=0)] = 300.0
    """A step without progress for so long is told of, with what each engine and worker is doing."""
    prices: dict[str, float] = {}
    """Price of a resource for an hour, e.g. {CPU: 0.05, GPU: 2.5}: what the cluster costs is then counted."""
    budget: Budget = Budget()
    lock_ttl_s: Annotated[float, Field(gt=0)] = 60.0
    """A run's lock is taken over when its owner has not renewed it for this long."""

    @model_validator(mode="after")
    def _cost_has_prices(self) -> "RunSettings":
        if self.budget.cost is not None and not self.prices:
            raise ValueError("budget.cost needs prices to count by, e.g. run.prices={CPU: 0.05, GPU: 2.5}")
        return self


class Job(Schema):
    """What every job has: a name, a seed, and where it runs."""

    beside_identity = frozenset({"name", "run"})

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run and of its folder under the output root."""
    seed: int = 0
    """Seed of all randomness of the job; rows draw by (seed, stage, row key, round)."""
    run: RunSettings = RunSettings()

    @model_validator(mode="before")
    @classmethod
    def _output_shorthand(cls, tree: object) -> object:
        """`output=/some/root` on the command line means `run.output=/some/root`."""
        given: Tree = cast(Tree, tree).copy() if isinstance(tree, dict) else {}
        if "output" not in given:
            return cast(object, tree)
        output = given.pop("output")
        return {**given, "run": {**given.get("run", {}), "output": output}}
