"""Whether two models differ, or only seem to: the same examples answered by both, differences with their uncertainty.

N examples that both answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from tunesmith.eval.texts import TextScore

_Z = 1.959964
"""Standard normal deviations that hold 95 % in between."""
_RESAMPLES = 1000
_FEWEST = 10
"""Examples below which nothing is said: no interval is worth much there."""

Method = Literal["paired standard error", "paired bootstrap", "none"]


@dataclass(frozen=True)
class Difference:
    """Of a number between two models."""

    task: str
    metric: str
    filter: str
    other: str
    """The model that is compared with the first."""
    first_value: float
    other_value: float
    difference: float
    """Other minus first."""
    low: float | None
    """The 95 % confidence interval of the difference; None where nothing can be said."""
    high: float | None
    method: Method
    samples: int
    """Examples (of a text: parts) that both answered."""
    higher_is_better: bool | None

    @property
    def verdict(self) -> str:
        """In words, whether the difference is more than chance."""
        if self.low is None or self.high is None:
            return "too few examples to tell" if self.samples < _FEWEST else "see its tasks"
        if self.low <= 0 <= self.high:
            return "no significant difference"
        if self.higher_is_better is None:
            return "significantly higher" if self.difference > 0 else "significantly lower"
        return "significantly better" if (self.difference > 0) == self.higher_is_better else "significantly worse"

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def compare_tasks(
    first: dict[str, Any], other: dict[str, Any], name: str, aggregation: Callable[[str, str], Callable | None]
) -> list[Difference]:
    """Differences of every metric of every task and group between two models' results of the harness, which hold their samples.

    name: of the other model. aggregation: for (task, metric) what makes one number of the examples' values; None: their mean.
    """
    found = []
    for task, of_task in first["results"].items():
        for key, mine in of_task.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(mine, int | float):
                continue
            theirs = other["results"][task][key]
            pairs, counts = [], leaves(first, task)
            for leaf in counts:
                pairs += _pairs(first["samples"][leaf], other["samples"][leaf], metric, filter_name)
            if task in first["samples"]:
                interval = _interval(pairs, aggregation(task, metric))
            elif _are_means(pairs, mine, theirs):
                interval = _interval(pairs, None)
            else:  # a group that weighs its tasks in a way of its own
                interval = (None, None, "none")
            better = first["higher_is_better"].get(task, {}).get(metric)
            values = (mine, theirs, theirs - mine)
            found.append(Difference(task, metric, filter_name, name, *values, *interval, len(pairs), better))
    return found


def leaves(results: dict[str, Any], task: str) -> list[str]:
    """The tasks that a group consists of; of a task itself."""
    if task in results["samples"]:
        return [task]
    return [leaf for child in results["group_subtasks"].get(task, []) for leaf in leaves(results, child)]


def _are_means(pairs: list[tuple[Any, Any]], mine: float, theirs: float) -> bool:
    """Whether a group's values are the means over all its examples."""
    if not pairs or not all(isinstance(value, int | float) for pair in pairs for value in pair):
        return False
    means = np.mean(np.array(pairs, dtype=float), axis=0)
    return bool(np.allclose(means, [mine, theirs], rtol=1e-9))


def compare_texts(first: TextScore, other: TextScore, name: str) -> Difference:
    """The difference in bits per byte, which models with different tokenizers share; paired by parts of the text."""
    scale = math.log(2)
    differences = np.array([(b.nll - a.nll) / scale for a, b in zip(first.blocks, other.blocks, strict=True)])
    sizes = np.array([block.bytes for block in first.blocks], dtype=float)
    mine, theirs = first.nll / scale / first.bytes, other.nll / scale / other.bytes
    low, high, method = None, None, "none"
    count = len(sizes)
    if count >= _FEWEST:
        # The standard error of a ratio of sums (Cochran, Sampling Techniques, 1977, section 6.4).
        residuals = differences - (theirs - mine) * sizes
        error = math.sqrt(count / (count - 1) * float(residuals @ residuals)) / sizes.sum()
        reach = _quantile(count - 1) * error
        low, high, method = theirs - mine - reach, theirs - mine + reach, "paired standard error"
    return Difference(
        first.file, "bits_per_byte", "none", name, mine, theirs, theirs - mine, low, high, method, count, False
    )


def _pairs(first: Sequence[dict], other: Sequence[dict], metric: str, filter_name: str) -> list[tuple[Any, Any]]:
    """Values of the examples that both models answered."""
    theirs = {sample["doc_id"]: sample[metric] for sample in other if _has(sample, metric, filter_name)}
    own = [(sample["doc_id"], sample[metric]) for sample in first if _has(sample, metric, filter_name)]
    return [(value, theirs[doc]) for doc, value in own if doc in theirs]


def _has(sample: dict, metric: str, filter_name: str) -> bool:
    return sample["filter"] == filter_name and metric in sample


def _interval(pairs: list[tuple[Any, Any]], aggregation: Callable | None) -> tuple[float | None, float | None, Method]:
    if len(pairs) < _FEWEST:
        return None, None, "none"
    if aggregation is not None:
        return *_bootstrap(pairs, aggregation), "paired bootstrap"
    differences = np.array([float(b) - float(a) for a, b in pairs])
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
    reach = _quantile(len(differences) - 1) * error
    return float(mean - reach), float(mean + reach), "paired standard error"


def _bootstrap(pairs: list[tuple[Any, Any]], aggregation: Callable) -> tuple[float, float]:
    """The middle 95 % of the differences over resamples of the examples, the same ones for both models."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(_RESAMPLES):
        rows = generator.integers(len(pairs), size=len(pairs))
        found.append(aggregation([pairs[row][1] for row in rows]) - aggregation([pairs[row][0] for row in rows]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _quantile(freedom: int) -> float:
    """How many standard errors Student's t holds 95 % within (Abramowitz and Stegun, 26.7.5)."""
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
