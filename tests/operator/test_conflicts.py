"""A run that changes while it is looked at: nothing that was decided by its old state is written."""

import asyncio
from datetime import timedelta
from typing import Any

from operator_life import KEY, Life

Object = dict[str, Any]


def behind_its_back(life: Life, change: Any) -> None:
    """The operator decides and writes before the watch has brought a change of the run."""

    async def passes() -> None:
        life.watches.bring()
        change()
        life.now += timedelta(seconds=1)
        await life.reconciler.reconcile(KEY)

    asyncio.run(passes())


def trained() -> Life:
    life = Life()
    asyncio.run(life.rest())
    life.train("knight-1", "1.0", 10)
    asyncio.run(life.rest())
    life.tell("1.0", 20)
    return life


def test_a_run_that_has_changed_is_read_again_and_nothing_is_written() -> None:
    life = trained()
    before = life.status
    life.cluster.calls.clear()
    behind_its_back(life, lambda: life.suspend(True))
    assert [call[:2] for call in life.cluster.calls] == [("PATCH", "TrainingRun"), ("GET", "TrainingRun")]
    assert life.status == before
    asyncio.run(life.look())
    assert (life.status["phase"], life.status["reason"]) == ("Suspended", "Stopping")


def test_a_run_that_is_gone_is_forgotten() -> None:
    life = trained()
    behind_its_back(life, lambda: life.cluster.remove(life.run))
    assert life.inventory.run(KEY) is None


def test_another_run_of_the_same_name_is_not_given_the_status_of_the_old_one() -> None:
    life = trained()
    document = {each: life.run[each] for each in ("apiVersion", "kind", "spec")} | {
        "metadata": {"name": KEY[1], "namespace": KEY[0]}
    }

    def replaced() -> None:
        life.cluster.remove(life.run)
        life.cluster.make(document)

    behind_its_back(life, replaced)
    assert "status" not in life.run
    seen = life.inventory.run(KEY)
    assert seen is not None
    assert seen["metadata"]["uid"] == life.run["metadata"]["uid"]
