"""Confidence intervals against closed forms, and how often they are right."""

import math

import numpy as np
import pytest

from tunesmith.eval.compare import _quantile, compare_tasks, compare_texts
from tunesmith.eval.texts import Block, TextScore


def results(values, aggregate=np.mean, metric="acc", better=True):
    samples = [{"doc_id": doc, "filter": "none", "metrics": [metric], metric: value} for doc, value in values.items()]
    of_task = {"alias": "quiz", f"{metric},none": float(aggregate(list(values.values()))), f"{metric}_stderr,none": 0.1}
    return {
        "results": {"quiz": of_task},
        "samples": {"quiz": samples},
        "group_subtasks": {},
        "higher_is_better": {"quiz": {metric: better}},
    }


def compared(first, other, aggregation=None, **more):
    pair = [results(dict(enumerate(values)), **more) for values in (first, other)]
    return compare_tasks(*pair, "other", lambda task, metric: aggregation)[0]


def test_quantiles_of_students_t():
    for freedom, wanted in ((9, 2.2622), (29, 2.0452), (100, 1.9840), (10**6, 1.9600)):
        assert _quantile(freedom) == pytest.approx(wanted, abs=5e-4)


def test_a_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    first, other = rng.random(40), rng.random(40)
    found = compared(first, other)
    differences = other - first
    reach = 2.0227 * differences.std(ddof=1) / math.sqrt(40)
    assert found.difference == pytest.approx(differences.mean()) and found.method == "paired standard error"
    assert (found.low, found.high) == pytest.approx((differences.mean() - reach, differences.mean() + reach), abs=1e-4)


def test_examples_are_paired_by_their_number_not_their_place():
    first = results({doc: doc % 3 for doc in range(30)})
    other = results({doc: doc % 3 + 1 for doc in reversed(range(30))})
    (found,) = compare_tasks(first, other, "other", lambda *_: None)
    assert (found.low, found.high) == pytest.approx((1, 1)) and found.verdict == "significantly better"


@pytest.mark.parametrize(
    "better, verdict", [(True, "significantly worse"), (False, "significantly better"), (None, "significantly lower")]
)
def test_verdicts(better, verdict):
    assert compared([1.0] * 20, [0.0] * 20, better=better).verdict == verdict
    assert compared([1.0] * 20, [1.0] * 20, better=better).verdict == "no significant difference"
    assert compared([1.0] * 9, [0.0] * 9, better=better).verdict == "too few examples to tell"


def test_the_bootstrap_agrees_with_the_standard_error_where_both_hold():
    rng = np.random.default_rng(1)
    first = rng.random(200)
    other = first + 0.1 * rng.standard_normal(200)
    by_error, by_resampling = compared(first, other), compared(first, other, aggregation=np.mean)
    assert by_resampling.method == "paired bootstrap"
    assert (by_resampling.low, by_resampling.high) == pytest.approx((by_error.low, by_error.high), abs=2e-3)


def text(nlls, sizes):
    blocks = [Block(float(nll), int(size)) for nll, size in zip(nlls, sizes)]
    return TextScore("book.txt", float(sum(nlls)), 100, 50, int(sum(sizes)), blocks)


def test_intervals_of_texts_hold_the_truth_as_often_as_they_say():
    """Blocks whose losses differ by 0.02 nats a byte on average: 95 % of intervals hold that."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        sizes = rng.integers(500, 2000, 60)
        first = sizes * (1 + 0.3 * rng.standard_normal(60))
        other = first + sizes * (0.02 + 0.05 * rng.standard_normal(60))
        found = compare_texts(text(first, sizes), text(other, sizes), "other")
        hits += found.low <= 0.02 / math.log(2) <= found.high
    assert 0.92 < hits / 400 < 0.98


def test_a_short_text_tells_nothing():
    assert compare_texts(text([1] * 9, [9] * 9), text([2] * 9, [9] * 9), "other").verdict == "too few examples to tell"
