"""The metrics, by scikit-learn and scipy, as functions of (truth, prediction)."""

from collections.abc import Callable, Sequence

Metric = Callable[[Sequence[float], Sequence[float]], float]


def accuracy(truth: Sequence[float], predicted: Sequence[float]) -> float:
    """Share predicted right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(truth, predicted))


def f1(truth: Sequence[float], predicted: Sequence[float], positive: int | None = 1) -> float:
    """F1 of one class of two; or, with None, the mean over the F1 of every class that occurs on either side."""
    from sklearn.metrics import f1_score

    if positive is None:
        return float(f1_score(truth, predicted, average="macro", zero_division=0))
    return float(f1_score([t == positive for t in truth], [p == positive for p in predicted], zero_division=0))


def matthews(truth: Sequence[float], predicted: Sequence[float]) -> float:
    """Matthews correlation; 0 when every prediction is the same."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth, predicted))


def pearson(truth: Sequence[float], predicted: Sequence[float]) -> float:
    """Pearson correlation; 0 when either side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, truth, predicted)


def spearman(truth: Sequence[float], predicted: Sequence[float]) -> float:
    """Spearman rank correlation; 0 when either side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, truth, predicted)


def _correlation(function, truth: Sequence[float], predicted: Sequence[float]) -> float:
    if len(set(truth)) < 2 or len(set(predicted)) < 2:
        return 0.0
    return float(function(truth, predicted).statistic)


METRICS: dict[str, Metric] = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}
REGRESSION = ("pearson", "spearman")  # these take a number for a label, the others a class
