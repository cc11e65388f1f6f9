"""Where the files lie that the ranks, the agent and the command line share: the run's scratch folder on this machine."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scratch:
    """Paths below `RunFile.scratch`. On one machine several nodes share it, in a cluster each pod has its own."""

    root: Path

    @property
    def progress(self) -> Path:
        """Progress of the run, written by rank 0."""
        return self.root / "progress.json"

    def failures(self, attempt: str) -> Path:
        """Folder of the failure files of one attempt."""
        return self.root / "failures" / attempt

    def run_file(self, attempt: str, node_rank: int) -> Path:
        """The RunFile that the agent hands to its ranks."""
        return self.root / "attempts" / f"{attempt}-node-{node_rank}.json"

    def metrics(self, node_rank: int) -> Path:
        """Memory-mapped numbers of the ranks of a node."""
        return self.root / "metrics" / f"node-{node_rank}"

    def logs(self, attempt: str, node_rank: int) -> Path:
        """Output of the ranks of a node: `<group>/attempt_0/<local rank>/{stdout,stderr}.log` below it."""
        return self.root / "logs" / attempt / f"node-{node_rank}"

    def port(self, node_rank: int) -> Path:
        """The port that the agent of a node serves on."""
        return self.root / f"agent-{node_rank}.port"

    def lock(self, node_rank: int) -> Path:
        """Held, with its process id inside, by the agent of a node."""
        return self.root / f"agent-{node_rank}.lock"

    def result(self, node_rank: int) -> Path:
        """Terminal facts of the agent of a node."""
        return self.root / f"result-{node_rank}.json"
