"""Curriculum: in which stage of training a row is admitted, by its difficulty (methods D35)."""

import math
from collections import Counter
from typing import Any

from itune_ray.config.curate import CurriculumConfig
from itune_ray.curate.filters.base import Choice, Reached, SetFilter
from itune_ray.data.pacing import admitted, percentile_ranks, stage_of
from itune_ray.data.records import row_seed


class Curriculum(SetFilter):
    """Keeps every row and writes `meta.curriculum` = {difficulty, rank, stage, order}.

    Stage s of S admits the rows whose percentile rank is at most g((s+1)/S), so the last admits all; a row's stage is
    the first that admits it. `order` numbers the rows by (stage, hash): read in that order, every row is seen, easy
    stages first and without order inside a stage. Rows without a difficulty have neither it nor a rank, and come in
    the last stage; the manifest counts them as `unranked`.
    """

    def __init__(self, config: CurriculumConfig):
        self._config = config
        self.references = (config.difficulty,)

    def choose(self, reached: Reached) -> Choice:
        config = self._config
        difficulty = reached.numbers(config.difficulty).tolist()
        hashes = [row_seed(reached.seed, "curate.curriculum", record.key) for record in reached.records]
        ranked = [row for row, value in enumerate(difficulty) if not math.isnan(value)]
        by = {"curriculum": difficulty, "anti": [-value for value in difficulty], "random": hashes}[config.mode]
        ranks = dict(zip(ranked, percentile_ranks([by[row] for row in ranked]), strict=True))
        shares = [
            admitted(config.pacing, (stage + 1) / config.stages, config.start, config.full, config.power)
            for stage in range(config.stages)
        ]
        stages = [stage_of(ranks.get(row, 1.0), shares) for row in range(len(hashes))]
        order = sorted(range(len(hashes)), key=lambda row: (stages[row], hashes[row], row))
        place = {row: index for index, row in enumerate(order)}
        meta: dict[int, dict[str, Any]] = {
            row: {
                "curriculum": {
                    "difficulty": difficulty[row] if row in ranks else None,
                    "rank": ranks.get(row),
                    "stage": stages[row],
                    "order": place[row],
                }
            }
            for row in range(len(hashes))
        }
        counts = Counter(stages)
        facts = {
            "admitted": [round(share, 6) for share in shares],
            "stages": [counts[stage] for stage in range(config.stages)],
            "unranked": len(hashes) - len(ranked),
        }
        return Choice(meta=meta, facts=facts)
