"""Compiled steps write the same; on CUDA they are graphs."""

import pytest

from tests.generation.test_engine import Letters, ids_of, prompts_of
from tests.models.conftest import pair
from tunesmith.generation.completions import generate_completions
from tunesmith.generation.sampling import Sampling


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("case", "batch_size"), [("gemma2", 4), ("qwen3 tied biased windows", 1)])
def test_the_text_is_the_same(case, batch_size):
    """Of one sequence at a time the attention is another."""
    model = pair(case)[1]
    prompts = prompts_of(5, 40, 9, 33, 6) if batch_size > 1 else prompts_of(40, 5)
    for options in (
        Sampling(max_new_tokens=12, stop_ids=()),
        Sampling(max_new_tokens=8, temperature=0.9, seed=1, num_samples=2, log_probs=True),
    ):
        expected = generate_completions(model, Letters(), prompts, options, batch_size=batch_size)
        found = generate_completions(model, Letters(), prompts, options, batch_size=batch_size, compile=True)
        assert ids_of(found) == ids_of(expected)
        for one, other in zip(found, expected):
            assert one.log_probs is None or one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
