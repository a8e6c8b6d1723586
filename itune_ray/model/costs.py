"""What an adaptation costs: trained and total parameters, of the model and of every adapted matrix (survey eq. 8)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixCost:
    """One adapted matrix: trainable r(d+k) against d·k weights, ratio r(1/d + 1/k) (survey eq. 8)."""

    name: str
    out_features: int
    in_features: int
    rank: int
    extra: int = 0
    """Beside A and B: DoRA's d row lengths, AdaLoRA's r singular values. Not in eq. 8, and counted here."""

    @property
    def trainable(self) -> int:
        return self.rank * (self.out_features + self.in_features) + self.extra

    @property
    def ratio(self) -> float:
        return self.trainable / (self.out_features * self.in_features)


@dataclass(frozen=True)
class ParameterReport:
    """Trainable and total parameters of a model, and per adapted matrix; eq. 8 holds per matrix, not per model."""

    total: int
    """Base parameters plus adapters; tied weights counted once."""
    trainable: int
    matrices: tuple[MatrixCost, ...] = ()

    @property
    def ratio(self) -> float:
        """Share of all parameters that is trained."""
        return self.trainable / self.total
