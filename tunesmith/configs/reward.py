"""Options of `tune run reward`."""

from typing import ClassVar, Literal

from tunesmith.configs._rules import below
from tunesmith.configs._section import section
from tunesmith.configs.data import RewardData
from tunesmith.configs.shared import TrainSettings


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
    """For classification: how many classes there are, where `dataset.label_names` doesn't name them and the model doesn't have them."""
    centring_coefficient: float = 0.0
    """For preference: weight of the square of a pair's summed rewards, which draws their mean to 0 (arXiv 2312.09244); 0.01 is usual, 0 turns it off."""

    def problems(self):
        yield from super().problems()
        yield from below(0, self, "centring_coefficient")
        yield from below(2, self, "num_labels")
        named = {tuple(source.label_names) for source in self._sources if source.label_names}
        count = len(next(iter(named), ()))
        if self.task != "classification":
            given = {"num_labels": self.num_labels, "label_names": named}
            yield from (f"`{name}` is for `task: classification`; leave it out" for name in given if given[name])
        elif len(named) > 1:
            yield "`label_names` must be the same for all sources: they are one model's classes"
        elif count == 1 or (count and self.num_labels not in (None, count)):
            yield f"`label_names` names {count} class{'es' * (count > 1)}: name all {self.num_labels or 'of two or more'}"
        if self.centring_coefficient and self.task != "preference":
            yield f"`centring_coefficient` is for `task: preference`; leave it out of `task: {self.task}`"

    @property
    def labels(self) -> list[str] | None:
        """Names of what is scored; None: those that the model has."""
        if self.task != "classification":
            return ["reward"] if self.task == "preference" else ["wrong", "right"]
        named = next((source.label_names for source in self._sources if source.label_names), [])
        return named or [f"LABEL_{number}" for number in range(self.num_labels or 0)] or None

    def name_classes(self, names: list[str]) -> None:
        """Let every source know the classes, so that labels beyond them are found when rows are read."""
        for source in self._sources if self.task == "classification" else []:
            source.label_names = names

    @property
    def _sources(self) -> list[RewardData]:
        given = [data if isinstance(data, list) else [data] for data in (self.dataset, self.dataset_val) if data]
        return [source for sources in given for source in sources]
