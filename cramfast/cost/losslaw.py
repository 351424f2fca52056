"""The scaling law of the loss, for the fit of cramfast.scaling and for the forecasts of cramfast.plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv:2203.15556).

    E is in nats per masked token, A and B belong to N in parameters and D in tokens.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        """Nats per masked token; numbers or arrays of floats."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta
