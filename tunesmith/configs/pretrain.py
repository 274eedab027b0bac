"""Options of `tune run pretrain`."""

from dataclasses import field
from typing import Any

from tunesmith.configs._section import section
from tunesmith.configs.data import TextData
from tunesmith.configs.shared import TrainSettings


@section(kw_only=True)
class Pretrain(TrainSettings):
    """Pre-training: next-token loss on plain text, from scratch or from a checkpoint."""

    model: str
    """Folder, Hub id, or a named size such as llama3_2/1B (see `tune ls`)."""
    from_scratch: bool = True
    """Initialise at random; false starts from the folder's weights."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json to change, such as {num_hidden_layers: 4}; only from scratch."""
    dataset: TextData | list[TextData]
    """Text to train on: one source, or a list drawn by weight."""
    dataset_val: TextData | list[TextData] | None = None
    """Text for the validation loss."""
    sample_prompts: list[str] = field(default_factory=list)
    """Beginnings that the model continues before and after training; shown in report.html."""

    def problems(self):
        yield from super().problems()
        if self.model_args and not self.from_scratch:
            yield "`model_args` changes the shape of the model, which needs `from_scratch: true`"
        if self.from_scratch and self.weights.type == "lora":
            yield "`weights.type: lora` needs a trained base: set `from_scratch: false`, or train all weights"
