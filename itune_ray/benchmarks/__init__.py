"""What models are measured on: data, prompt and grader, one file each."""

import importlib
from collections import Counter
from collections.abc import Sequence

from itune_ray.benchmarks.base import Benchmark
from itune_ray.config.evaluate import BenchmarkConfig, IfScoreBenchmark, PerplexityBenchmark, PlaygroundBenchmark
from itune_ray.errors import ConfigError

BENCHMARKS = {
    "playground": "itune_ray.benchmarks.playground:Playground",
    "if_score": "itune_ray.benchmarks.if_score:IfScore",
    "perplexity": "itune_ray.benchmarks.perplexity:Perplexity",
}
"""Config type -> class."""

GRADERS = {"playground": "itune_ray.benchmarks.playground:grade_reply"}
"""Name -> function of (prompt, reply, meta) -> score in [0, 1]: graders that need no reference answer."""


def benchmark(config: BenchmarkConfig) -> Benchmark:
    """The benchmark a config describes, its items not yet made."""
    module, _, name = BENCHMARKS[config.type].partition(":")
    return getattr(importlib.import_module(module), name)(config, benchmark_name(config))


def benchmarks(configs: Sequence[BenchmarkConfig]) -> list[Benchmark]:
    """All of them; raises `ConfigError` when two would share a name in scores and reports."""
    made = [benchmark(config) for config in configs]
    twice = [name for name, count in Counter(b.name for b in made).items() if count > 1]
    if twice:
        raise ConfigError("two benchmarks have the same name", got=twice[0], knob="benchmarks.N.name")
    return made


def benchmark_name(config: BenchmarkConfig) -> str:
    """The name in scores and reports: the one given, else the type and its variant."""
    if config.name:
        return config.name
    if isinstance(config, PlaygroundBenchmark):
        split = "_paraphrase" if config.split == "test_paraphrase" else ""
        return f"playground{split}_{config.shots}shot" if config.shots else f"playground{split}"
    assert isinstance(config, (IfScoreBenchmark, PerplexityBenchmark))
    return f"{config.type}-{config.source.name}" if config.source.name else config.type
