"""The operator's passes over one run on a cluster in memory, and the whole life of that run."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

from atelier_api.progress import Progress
from atelier_operator.cluster import Cluster, LostLeadership
from atelier_operator.inventory import Inventory, Key
from atelier_operator.observed import Apis
from atelier_operator.polling import Poller
from atelier_operator.reconcile import Reconciler
from memory_cluster import Engines, MemoryCluster, Watches
from run_stories import PROFILE, START, raw_run

Object = dict[str, Any]

KEY: Key = ("art", "knight")
PATIENCE_SECONDS = 60.0
"""`rest` waits for what the operator wants to look at again within this time."""


class Killed(BaseException):
    """The process is gone."""


class Agents:
    """Stands for the poller: it has an answer from the second pass on in which it was told of a life of the pods."""

    def __init__(self, answers: dict[str, Progress]) -> None:
        self.answers = answers
        self.watched: dict[Key, tuple[str, str | None]] = {}
        self.forgotten: list[Key] = []
        self._asked: set[str] = set()
        self.woken = False

    def watch(self, key: Key, life: str, address: str | None) -> None:
        self.watched[key] = (life, address)
        if address is not None and life not in self._asked:
            self._asked.add(life)
            self.woken = life in self.answers

    def forget(self, key: Key) -> None:
        self.forgotten.append(key)

    def latest(self, key: Key, life: str) -> Progress | None:
        return self.answers.get(life) if life in self._asked else None


class Life:
    """One run, its cluster, and an operator that can be replaced by a new one, or by one whose watches are late."""

    def __init__(self, *, jobset: bool = True, **spec: Any) -> None:
        self.now = START
        self.apis = Apis(jobset=jobset)
        self.cluster = MemoryCluster(lambda: self.now, jobset=jobset)
        self.engines = Engines(self.cluster, lambda: self.now)
        self.answers: dict[str, Progress] = {}
        self.killed = 0
        self.forgives = False
        self.may_see_nodes = True
        profile = {"kind": "ClusterTrainingProfile", "metadata": {"name": "default"}, "spec": PROFILE}
        self.cluster.make(profile)
        raw = raw_run(**spec)
        raw["metadata"] = {"name": KEY[1], "namespace": KEY[0]}
        self.cluster.make(raw)
        self.start()

    def start(self, late: dict[str, int] | None = None) -> None:
        """Another operator: nothing is left of the one before."""
        self.inventory = Inventory()
        self.watches = Watches(self.cluster, self.inventory, late)
        self.agents = Agents(self.answers)
        self.reconciler = self.operator(self.inventory, self.agents)

    def operator(self, inventory: Inventory, agents: Agents) -> Reconciler:
        """An operator over an inventory."""
        made = Reconciler(
            cast(Cluster, self.cluster),
            inventory,
            cast(Poller, agents),
            clock=lambda: self.now,
            may_see_nodes=self.may_see_nodes,
        )
        made.apis = self.apis
        return made

    @property
    def run(self) -> Object:
        return next(iter(self.cluster.all("TrainingRun")))

    @property
    def status(self) -> Object:
        """The newest status, also of a run that is gone."""
        return self.cluster.statuses[-1]

    async def look(self) -> float | None:
        """One pass, a second after the one before, and again half a second after a failure, as the queue would have it."""
        self.now += timedelta(seconds=1)
        self.watches.bring()
        self.agents.woken = False
        try:
            return await self.reconciler.reconcile(KEY)
        except (Killed, LostLeadership):
            self.killed += 1
            self.start()
        except Exception:
            if not self.forgives:
                raise
        return 0.5

    async def rest(self) -> None:
        """Passes until nothing more is to be done soon."""
        for _ in range(100):
            written = len(self.cluster.changes)
            after = await self.look()
            if after is not None and 1 < after <= PATIENCE_SECONDS:
                self.now += timedelta(seconds=after - 1)
            soon = self.agents.woken or (after is not None and after <= PATIENCE_SECONDS)
            if not soon and written == len(self.cluster.changes) and not self.watches.behind():
                return
        raise AssertionError(f"the operator does not rest: {self.cluster.calls[-12:]}")

    def train(self, child: str, life: str, step: int) -> None:
        """The child's pods run, and their agent tells how far it is."""
        self.engines.run_pods(child)
        self.tell(life, step)

    def tell(self, life: str, step: int, stage: str = "Training") -> None:
        self.answers[life] = Progress.model_validate({"stage": stage, "step": step, "totalSteps": 100})

    def suspend(self, wanted: bool) -> None:
        self.cluster.edit(
            "TrainingRun", KEY[1], lambda run: run["spec"].setdefault("schedule", {}).update(suspend=wanted)
        )


def chapters(life: Life) -> list[Callable[[], None]]:
    """What the others do in a whole life; the operator rests after each. A crash that the JobSet cures, memory that runs out, a
    user who suspends and resumes, and the end."""
    engines = life.engines

    def crash() -> None:
        engines.end_pods("knight-1", 82, 82)

    def restart() -> None:
        engines.restart("knight-1", counted=True)
        life.tell("1.1", 12)

    def out_of_memory() -> None:
        engines.end_pods("knight-1", 80, 82)
        engines.fail("knight-1", "FailJobSetFailurePolicyAction")

    def complete() -> None:
        engines.end_pods("knight-3", 0, 0)
        engines.complete("knight-3")

    def time_is_over() -> None:
        life.now += timedelta(seconds=3600)

    return [
        lambda: None,
        lambda: life.train("knight-1", "1.0", 10),
        crash,
        restart,
        out_of_memory,
        lambda: life.train("knight-2", "2.0", 20),
        lambda: life.suspend(True),
        engines.settle,
        lambda: life.suspend(False),
        lambda: life.train("knight-3", "3.0", 40),
        complete,
        time_is_over,
        engines.settle,
    ]
