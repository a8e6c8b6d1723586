"""Tags: what a request is about, named by a model and normalised over all rows (InsTag, Lu et al. 2308.07074, methods
D33)."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from itune_ray.config.base import digest
from itune_ray.config.filters.models import TagsConfig
from itune_ray.config.shared import SamplingConfig, ServedModel
from itune_ray.curate.filters.base import ModelFilter, Seen, Settled, Verdict, blank, unanswered
from itune_ray.curate.tags import merged_tags, parse_tags, tag_sets
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Llm
from itune_ray.engine.judge import prompt_text
from itune_ray.engine.templates import read_template, render
from itune_ray.errors import GenerationError

BUILTIN = {"tags": "itune_ray.curate:prompts/tags.jinja"}
MOST_NAMED = 20
"""Tags that the manifest names with their counts, the most frequent."""


class Tags(ModelFilter):
    """Gives every row `meta.tags`, a sorted list, and `meta.num_tags`, its length; drops only what could not be tagged.

    Tags are normalised (case, punctuation, plural), then those that mean the same by their words are merged into the
    most frequent, then the rare ones are left out: a row may end without tags, and stays. `select` with strategy `tags`
    samples by them, and `meta.num_tags` is InsTag's complexity. A reply that is no JSON list rejects the row as
    `unreadable_tags`, with the reply.
    """

    needs = frozenset({"prompt"})
    provides = frozenset({"meta.tags", "meta.num_tags"})
    selection = ModelFilter.selection | {"min_count", "merge", "max_parse_fail"}

    def __init__(self, config: TagsConfig):
        self.config: TagsConfig = config
        self._template = read_template(config.template or "tags", "filters.N.template", BUILTIN)

    @property
    def served(self) -> ServedModel:
        """The tagger."""
        return self.config.model

    @property
    def sampling(self) -> SamplingConfig:
        """The job's."""
        return self.config.sampling

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "template": digest(self._template)}

    def unfit(self, record: Record) -> str | None:
        return None if prompt_text(record).strip() else "no_prompt"

    async def rate(self, record: Record, llm: Llm, attempt: int) -> Outcome:
        """The tags as they were given, as JSON in `raw`."""
        key, prompt = record.content_hash, prompt_text(record)
        turn = {"role": "user", "content": render(self._template, prompt=prompt, fence=digest(prompt, length=12))}
        completion = await llm.generate((turn,), key=key)
        if completion.error is not None:
            return unanswered(record, completion.error, completion.retryable, attempt)
        (sample,) = completion.samples
        rated = blank(record, len(sample.token_ids), len(completion.prompt_token_ids))
        tags = parse_tags(sample.text)
        if tags is None:
            return Outcome(record=rated, input_key=key, status="rejected", reason="unreadable_tags", raw=sample.text)
        return Outcome(record=rated, input_key=key, status="accepted", raw=json.dumps(tags, ensure_ascii=False))

    def verdict(self, rating: Outcome) -> Verdict:
        """Every row that has tags stays."""
        if rating.status == "failed":
            return Verdict(False, failure=rating.cause)
        if rating.status == "rejected":
            return Verdict(False, rating.reason)
        return Verdict(True, meta={"tags": json.loads(rating.raw or "[]")})

    def check(self, replies: int, unscored: int) -> None:
        """Stop the job when too many replies hold no list: then the model or the template is at fault."""
        if unscored > self.config.max_parse_fail * replies:
            raise GenerationError(
                f"{unscored} of {replies} replies of the tagger hold no JSON list of tags",
                got=round(unscored / replies, 3),
                allowed=f"at most {self.config.max_parse_fail}",
                knob="filters.N.max_parse_fail or filters.N.template",
            )

    def settle(self, seen: Seen) -> Settled:
        """The tags of all rows, normalised together."""
        rows = [record for record, kept in zip(seen.records, seen.kept, strict=True) if kept]
        given = [record.meta["tags"] for record in rows]
        named = Counter(tag for row in tag_sets(given) for tag in row)
        merged = {} if self.config.merge is None else merged_tags(named, self.config.merge)
        sets = tag_sets(given, self.config.min_count, merged)
        counts = Counter(tag for row in sets for tag in row)
        facts: Mapping[str, Any] = {
            "tags": len(counts),
            "merged_tags": len(merged),
            "rare_tags": len({merged.get(tag, tag) for tag in named} - set(counts)),
            "untagged": sum(not row for row in sets),
            "most_frequent": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_NAMED]),
        }
        meta = {r.key: {"tags": sorted(s), "num_tags": len(s)} for r, s in zip(rows, sets, strict=True)}
        return Settled(facts=facts, meta=meta)
