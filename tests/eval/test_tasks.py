"""Names of tasks are found as the harness finds them, but without reading all of its 14,000 files."""

import pytest

from tunesmith.errors import UserError

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness


@pytest.fixture(scope="module")
def tasks():
    from tunesmith.eval import tasks

    return tasks


@pytest.mark.parametrize(
    "name", ["hellaswag", "gsm8k", "wikitext", "mmlu", "arc_challenge", "truthfulqa_mc2", "openllm"]
)
def test_few_files_are_read_and_all_that_is_needed(tasks, name):
    manager = tasks._manager([name], [])
    assert not tasks._missing([name], manager)
    assert len(manager.task_index) < 2000


@pytest.mark.slow
def test_every_name_is_found_where_the_harness_finds_it(tasks):
    from lm_eval.tasks import TaskManager

    everything, places = TaskManager().task_index, tasks._places()
    assert everything.keys() <= places.keys()
    for name, entry in everything.items():
        for one in entry.tags if entry.yaml_path is None else [name]:
            assert any(everything[one].yaml_path.is_relative_to(folder) for folder in places[name]), (name, one)
    for name in ("mmlu", "ai2_arc", "openllm", "chain_of_thought"):
        few = tasks._manager([name], []).task_index
        assert few[name].cfg == everything[name].cfg and few[name].tags == everything[name].tags


def test_unknown_names_are_told_with_the_nearest(tasks):
    with pytest.raises(UserError, match="no task hellaswga; did you mean `hellaswag`"):
        tasks.load_tasks(["hellaswga"])


def test_code_of_the_model_is_not_run_unasked(tasks):
    for name in ("humaneval", "mbpp"):
        with pytest.raises(UserError, match=f"{name} executes the code that the model writes.*confirm_run_unsafe_code"):
            tasks.load_tasks([name])
