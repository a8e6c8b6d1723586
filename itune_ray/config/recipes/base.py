"""What every recipe config has."""

from itune_ray.config.base import Schema
from itune_ray.config.shared import SamplingConfig, ServedModel


class RecipeBase(Schema):
    """What every built-in recipe has."""

    @property
    def asks_teacher(self) -> bool:
        """Whether the job's `teacher` is asked; where not, no engine starts for it."""
        return True

    @property
    def needs_teacher(self) -> bool:
        """Whether the job must name a teacher; where not, it must not."""
        return self.asks_teacher

    def served(self) -> dict[str, ServedModel]:
        """Further models that the recipe asks, by the name it knows them under."""
        return {}


ANSWERS = SamplingConfig(temperature=0.7, top_p=0.95, max_tokens=1024)


JUDGING = SamplingConfig(temperature=0.0, max_tokens=2048)
