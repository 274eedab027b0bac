"""Options of `tune run reward`."""

from typing import ClassVar, Literal

from tunesmith.configs._section import section
from tunesmith.configs.data import RewardData
from tunesmith.configs.shared import TrainSettings, below


@section(kw_only=True)
class Reward(TrainSettings):
    """Models that score: rewards from preferred answers, classes of texts, steps of an answer."""

    takes_classifiers: ClassVar[bool] = True

    model: str
    """Folder with config.json and safetensors, or a Hub id: a language model, which gets a new head, or a model that scores, whose head is trained on."""
    dataset: RewardData | list[RewardData]
    """What to learn from: one source, or a list drawn by weight."""
    dataset_val: RewardData | list[RewardData] | None = None
    """The same for validation."""
    task: Literal["preference", "classification", "process"] = "preference"
    """preference: one reward, higher for the chosen of two answers; classification: the class of a text; process: whether each step of an answer is right."""
    num_labels: int | None = None
    """For classification: how many classes there are, where label_names doesn't say."""
    label_names: list[str] | None = None
    """For classification: the names of the classes in the order of their numbers; they go into config.json."""
    centring_coefficient: float = 0.0
    """For preference: weight of the square of a pair's summed rewards, which draws their mean to 0 (arXiv 2312.09244); 0.01 is usual, 0 turns it off."""

    def problems(self):
        yield from super().problems()
        yield from below(0, self, "centring_coefficient")
        yield from below(2, self, "num_labels")
        names = self.label_names or []
        if self.task == "classification":
            if self.num_labels and names and self.num_labels != len(names):
                yield f"`num_labels: {self.num_labels}` and `label_names`, which has {len(names)}, don't agree: leave one out"
            if len(names) == 1 or len(set(names)) < len(names):
                yield "`label_names` must name two classes or more, each once"
        else:
            for name in ("num_labels", "label_names"):
                if getattr(self, name):
                    yield f"`{name}` is for `task: classification`; leave it out of `task: {self.task}`"
        if self.centring_coefficient and self.task != "preference":
            yield f"`centring_coefficient` is for `task: preference`; leave it out of `task: {self.task}`"

    @property
    def labels(self) -> list[str] | None:
        """Names of what is scored; None: as many as the model has."""
        if self.task == "classification":
            return self.label_names or (self.num_labels and [f"LABEL_{n}" for n in range(self.num_labels)]) or None
        return ["reward"] if self.task == "preference" else ["wrong", "right"]
