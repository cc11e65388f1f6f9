"""What a run has cost: GPUs times the seconds for which the whole gang held them."""

from typing import Any

from run_stories import Story, ended, pod, profile, trained

PRICED = {"gpuClasses": [{"name": "h100-80g", "memory": "80Gi", "pricePerHour": "3.6"}], "currency": "EUR"}


def priced(**options: Any) -> Story:
    """A run of two GPUs at 3.60 an hour each, whose first attempt trains since now."""
    story = Story(**options)
    story.profile = profile(**PRICED)
    story.look()
    story.train(step=0)
    story.look()
    return story


def spent(story: Story) -> tuple[int, float | None]:
    cost = story.status.cost
    assert cost is not None
    return cost.gpu_seconds, cost.spent


def test_seconds_count_for_each_gpu_while_the_gang_has_nodes() -> None:
    story = priced()
    assert spent(story) == (0, 0.0)
    story.train(step=10)
    story.look(100)
    assert spent(story) == (200, 0.2)
    assert story.status.cost is not None
    assert story.status.cost.currency == "EUR"


def test_time_alone_is_no_reason_to_write() -> None:
    story = priced()
    assert story.look(100).status == story.status
    assert spent(story) == (0, 0.0)
    story.train(step=10)
    story.look(100)
    assert spent(story) == (400, 0.4)


def test_waiting_costs_nothing() -> None:
    story = Story()
    story.profile = profile(**PRICED)
    story.look()
    story.run_pods()
    story.pods = (pod(0), pod(1, node=None, running=False, phase="Pending", ip=None))
    story.look(600)
    assert story.status.cost is None
    story.train(step=0)
    story.look(600)
    assert spent(story) == (0, 0.0)


def test_what_is_left_is_estimated_from_the_time_that_the_trainer_says() -> None:
    story = priced()
    story.train(step=50, eta_seconds=300)
    story.look(100)
    assert story.status.cost is not None
    assert story.status.cost.expected == 0.8
    story.look(300)
    story.complete()
    story.look()
    assert (story.status.phase, story.status.cost.expected, story.status.cost.spent) == ("Succeeded", 0.8, 0.8)


def test_an_operator_that_was_away_counts_up_to_the_end_of_the_child_and_not_to_its_return() -> None:
    story = priced()
    story.complete()
    story.change(finished_at=story.now)
    story.look(3600)
    assert spent(story) == (0, 0.0)


def test_the_pause_before_another_attempt_is_free() -> None:
    story = priced(jobset=False, retry={"backoffSeconds": 60})
    story.look(0)
    story.fail(ended(82), ended(82, 1))
    story.look(10)
    before = spent(story)
    story.look(60)
    assert (story.status.attempt, spent(story)) == (2, before)
    assert story.condition("Scheduled").status == "False"
    story.train(step=0)
    story.look(30)
    assert spent(story) == before


def test_a_stopped_run_pays_until_its_pods_are_gone() -> None:
    story = priced()
    story.edit("schedule", suspend=True)
    story.look(10)
    story.vanish()
    story.look(20)
    paid = spent(story)
    assert paid == (60, 0.06)
    story.edit("schedule", suspend=False)
    story.look(5000)
    assert spent(story) == paid


def test_without_a_price_only_seconds_are_counted() -> None:
    story = trained()
    story.train(step=0)
    story.look()
    story.train(step=10)
    story.look(100)
    assert spent(story) == (200, None)
    assert story.status.cost is not None
    assert story.status.cost.currency is None


def test_the_cpu_costs_nothing() -> None:
    story = trained(parallelism={"gpusPerNode": 0})
    story.train(step=10)
    story.look(100)
    assert story.status.cost is None


def test_a_clock_that_goes_back_takes_nothing_back() -> None:
    story = priced()
    story.train(step=10)
    story.look(100)
    story.train(step=11)
    story.look(-50)
    assert spent(story) == (200, 0.2)
    story.train(step=12)
    story.look(60)
    assert spent(story) == (220, 0.22)
