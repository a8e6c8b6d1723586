"""A curriculum as a training order: each step draws from the rows that its pacing has admitted (methods D35, T18)."""

from collections.abc import Iterator, Sequence

import numpy as np

from itune_ray.config.course import Curriculum
from itune_ray.data.order import Order
from itune_ray.data.pacing import admitted, competence, percentile_ranks
from itune_ray.data.records import row_seed


class CurriculumOrder(Order):
    """Step t of T (from 1) draws `batch` documents evenly from those whose percentile rank of difficulty is at most
    g(t/T), but from a batch of documents at least (Platanios et al. 2019; Wu et al. 2021).

    Over the run a document is drawn as often as uniform draws would on average, to within about one: at every step
    each admitted document is due batch · weight / Σ weight more draws, and those with most due are drawn. A share of a
    draw, by a generator of (seed, step), sets equals apart. So hard rows are used less often than easy ones, and in a
    short run some not at all. Rows without a difficulty are admitted last.

    Args:
        difficulties: Per document; NaN where there is none.
        curriculum: Mode and pacing. `anti` ranks by falling difficulty, `random` by hash.
    """

    def __init__(
        self,
        keys: Sequence[str],
        weights: Sequence[float],
        seed: int,
        batch: int,
        difficulties: Sequence[float],
        curriculum: Curriculum,
    ):
        super().__init__(keys, weights, seed, batch)
        self._curriculum = curriculum
        hashes = np.array([row_seed(seed, "train.curriculum", key) for key in keys])
        ranks = self._ranks(np.asarray(difficulties, dtype=np.float64), hashes)
        self._easiest = np.lexsort((hashes, ranks))
        self._sorted_ranks = ranks[self._easiest]

    def share(self, step: int, steps: int) -> float:
        """g at the step (from 1)."""
        how = self._curriculum
        if how.pacing == "competence":
            return competence(step / steps / how.full, how.start)
        return admitted(how.pacing, step / steps, how.start, how.full, how.power)

    def steps(self, epochs: float | None, steps: int | None) -> Iterator[tuple[float, list[int]]]:
        """See `Order.steps`: as many steps, of as many documents, as the same rows take without a curriculum."""
        weights = np.asarray(self._weights, dtype=np.float64)[self._easiest]
        sizes = [(done, len(drawn)) for done, drawn in super().steps(epochs, steps)]
        due, share = np.zeros(len(weights)), self._generator(0).random(len(weights))
        for step, (done, size) in enumerate(sizes, start=1):
            within = int(np.searchsorted(self._sorted_ranks, self.share(step, len(sizes)), side="right"))
            within = max(within, min(size, len(weights)))
            due[:within] += size * weights[:within] / weights[:within].sum()
            picked: list[int] = []
            generator = self._generator(step)
            while len(picked) < size:
                count = min(size - len(picked), within)
                most = np.argsort(-(due + share)[:within], kind="stable")[:count]
                due[most] -= 1
                share[most] = generator.random(count)  # anew, so that no documents keep meeting in one step
                picked += self._easiest[most].tolist()
            yield done, picked

    def _generator(self, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(row_seed(self._seed, "train.curriculum", "", step)))

    def _ranks(self, difficulties: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        known = ~np.isnan(difficulties)
        by = {"curriculum": difficulties, "anti": -difficulties, "random": hashes}[self._curriculum.mode]
        ranks = np.ones(len(difficulties))
        ranks[known] = percentile_ranks(by[known].tolist())
        return ranks
