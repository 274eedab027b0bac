"""What is recorded of time and memory."""

from tunesmith.configs._rules import Checked, below
from tunesmith.configs._section import section


@section
class Profiler(Checked):
    """torch.profiler traces of a few steps, and snapshots of an accelerator's memory, into profile/ in the run folder."""

    enabled: bool = False
    """Record traces (slows the recorded steps)."""
    wait_steps: int = 5
    """Steps left alone before each recording."""
    warmup_steps: int = 2
    """Steps traced and thrown away."""
    active_steps: int = 2
    """Steps recorded."""
    num_cycles: int = 1
    """How often wait, warm-up and recording repeat."""
    profile_memory: bool = False
    """Record allocations too."""
    with_stack: bool = False
    """Record the Python stack of every operator."""
    record_shapes: bool = True
    """Record the shapes of every operator's inputs."""
    memory_snapshot_every_n_steps: int | None = None
    """Snapshots of what an accelerator's memory holds and who asked for it (for pytorch.org/memory_viz) this often, and when it runs out; null: none."""
    ranks: list[int] | None = None
    """Ranks that record, such as [0]; null: all, each under its own name."""

    def problems(self):
        counts = ("active_steps", "num_cycles", "memory_snapshot_every_n_steps")
        yield from below(1, self, *counts)
        yield from below(0, self, "wait_steps", "warmup_steps")
        if any(rank < 0 for rank in self.ranks or []):
            yield f"`ranks` are counted from 0, got {self.ranks}"
