"""What each exit code of the agent does to a run on a cluster. One table, for the JobSet's rules and for the operator."""

from dataclasses import dataclass
from typing import Literal

from atelier_api.exit_codes import ExitCode

Reaction = Literal["fail", "restart", "restart-uncounted", "replan", "avoid-node"]


@dataclass(frozen=True)
class Rule:
    """`reaction` to a child that has failed with the code. `by_jobset`: a JobSet restarts by itself."""

    reaction: Reaction

    @property
    def by_jobset(self) -> bool:
        return self.reaction in ("restart", "restart-uncounted")


RULES: dict[ExitCode, Rule] = {
    ExitCode.CONFIG: Rule("fail"),
    ExitCode.DATA: Rule("fail"),
    ExitCode.CREDENTIALS: Rule("fail"),
    ExitCode.DIVERGED: Rule("fail"),
    ExitCode.STORE_UNREACHABLE: Rule("restart-uncounted"),
    ExitCode.STOPPED: Rule("restart-uncounted"),
    ExitCode.OUT_OF_MEMORY: Rule("replan"),
    ExitCode.GPU_FAULT: Rule("avoid-node"),
    ExitCode.COLLECTIVE_TIMEOUT: Rule("restart"),
    ExitCode.INTERNAL: Rule("restart"),
}

FINAL_CODES = tuple(int(code) for code, rule in RULES.items() if not rule.by_jobset)
"""Codes after which a JobSet must not start the same pods again."""

UNCOUNTED_CODES = tuple(int(code) for code, rule in RULES.items() if rule.reaction == "restart-uncounted")
"""Codes whose restarts do not count: nobody's fault."""

MOST_UNCOUNTED = 100
"""Restarts that do not count end here: something is wrong that no restart cures."""

MOST_REPLANS = 2
"""New plans after the device ran out of memory."""
