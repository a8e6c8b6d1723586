"""An order in which tasks take turns: so many steps of one, then of the next (for meta-tuning, methods T18)."""

from collections.abc import Iterator, Sequence
from itertools import islice

from itune_ray.data.order import Order
from itune_ray.data.records import row_seed


class TaskOrder(Order):
    """Blocks of `block` steps whose documents are all of one task. Round by round each task has one block, in the order
    of a hash of (seed, round, task); within a task, documents come as in an order of its own, epoch after epoch.

    Args:
        tasks: The task of each document.
    """

    def __init__(
        self, keys: Sequence[str], weights: Sequence[float], seed: int, batch: int, tasks: Sequence[str], block: int
    ):
        super().__init__(keys, weights, seed, batch)
        self._block = block
        self._of: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            self._of.setdefault(task, []).append(index)

    def steps(self, epochs: float | None, steps: int | None) -> Iterator[tuple[float, list[int]]]:
        """See `Order.steps`: as many steps as the same documents take without tasks, each of `batch` documents."""
        total = steps if steps is not None else sum(1 for _ in super().steps(epochs, None))
        documents = {task: self._documents(own) for task, own in self._of.items()}
        for step, task in zip(range(1, total + 1), self._turns(), strict=False):
            yield step * self._batch / len(self._keys), list(islice(documents[task], self._batch))

    def _turns(self) -> Iterator[str]:
        """The task of each step."""
        turn = 0
        while True:
            for task in sorted(self._of, key=lambda task: (row_seed(self._seed, "train.tasks", task, turn), task)):
                yield from [task] * self._block
            turn += 1

    def _documents(self, own: Sequence[int]) -> Iterator[int]:
        keys, weights = [self._keys[i] for i in own], [self._weights[i] for i in own]
        for _, index in Order(keys, weights, self._seed, self._batch).stream(None):
            yield own[index]
