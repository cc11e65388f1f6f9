"""Making an attempt: its plan, its objects, and whether the whole gang would find room."""

from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1.conditions import ConditionType, Reason
from atelier_api.v1alpha1.status import Phase, PlanStatus
from atelier_operator.desired import Order, config_map, job, jobset, service
from atelier_operator.names import SCRATCH
from atelier_operator.observed import Backend, Child, Obstacle
from atelier_operator.plan import attempts
from atelier_operator.plan.acceptance import Accepted
from atelier_operator.plan.draft import Draft
from atelier_operator.plan.waiting import lacking_quota, times
from atelier_operator.planner.cluster import cluster_machine, gpu_class, run_file_of, with_profile
from atelier_operator.planner.execution import plan_below
from atelier_operator.planner.memory import table_facts
from atelier_operator.snapshot import Snapshot

LOOK_AGAIN_SECONDS = 15.0
"""What stands in the way of an attempt, such as a full quota, is watched by looking at it."""


def start(draft: Draft, accepted: Accepted, number: int) -> None:
    """Make the objects of an attempt."""
    unfinished = [child for child in draft.seen.children if child.attempt < number and child.finished is None]
    if unfinished:
        _await(draft, unfinished)
        return
    lingering = [pod for pod in draft.seen.pods if pod.attempt < number and not pod.ended]
    if lingering:
        _stopping(draft, f"{len(lingering)} pods of an earlier attempt are stopping")
        return
    if draft.seen.obstacle:
        _blocked(draft, draft.seen.obstacle)
        return
    order = order_of(draft, accepted, number)
    lacking = None if order.queue else lacking_quota(_needs(order), draft.seen.quotas)
    if lacking is not None:
        message = f"waiting for the whole gang to fit: {lacking}"
        draft.said.say(ConditionType.ADMITTED, "False", Reason.WAITING_FOR_QUOTA, message)
        draft.phase("Queued", Reason.WAITING_FOR_QUOTA, message)
        draft.wake_after(LOOK_AGAIN_SECONDS)
        return
    child = jobset(order) if order.backend == "jobset" else job(order)
    draft.create = [each for each in (config_map(order), service(order), child) if each is not None]
    draft.fields |= {
        "attempt": number,
        "plan": plan_status(order.run_file.plan, order.backend, order.queue),
        "store_uri": order.run_file.store_uri,
    }
    draft.records = attempts.opened(draft.records, number, draft.now)
    draft.said.say(ConditionType.SUSPENDED, "False", Reason.ACTIVE)
    draft.said.say(ConditionType.SCHEDULED, "False", Reason.GANG_PENDING, "the pods are being made")
    draft.said.say(ConditionType.RUNNING, "False", Reason.STARTING)
    again = draft.before.start_time is not None
    phase: Phase = "Recovering" if again else "Queued" if order.queue else "Preparing"
    draft.phase(phase, Reason.STARTING, f"attempt {number} as {order.backend} {order.name}")


def _blocked(draft: Draft, obstacle: Obstacle) -> None:
    """The attempt could not be made."""
    if obstacle.refused:
        reason, message = Reason.NOT_PERMITTED, f"the API server refuses {obstacle.name}: {obstacle.refused}"
    else:
        reason = Reason.NAME_TAKEN
        message = f"{obstacle.name} exists and does not belong to this run; delete it, or rename the run"
    draft.said.say(ConditionType.ACCEPTED, "False", reason, message)
    draft.phase("Recovering" if draft.before.attempt else "Pending", reason, message)
    draft.wake_after(LOOK_AGAIN_SECONDS)


def _await(draft: Draft, unfinished: list[Child]) -> None:
    """Never two attempts at once: an older one that is somehow still there goes first."""
    for child in unfinished:
        draft.remove(child)
    _stopping(draft, f"{unfinished[0].name} of an earlier attempt is being stopped")


def _stopping(draft: Draft, message: str) -> None:
    """Something of an earlier attempt is still there: a child that was deleted without its pods is gone before they are."""
    draft.said.say(ConditionType.RUNNING, "False", Reason.STOPPING, message)
    draft.phase("Recovering", Reason.STOPPING, message)


def order_of(draft: Draft, accepted: Accepted, number: int) -> Order:
    """An attempt, decided in every point by what the cluster serves now."""
    run, profile = accepted.run, accepted.profile
    execution = replanned(draft, accepted) or accepted.run_file.plan
    run_file = run_file_of(with_profile(run, profile), execution, uid=draft.run.uid, attempt=number, scratch=SCRATCH)
    return Order(
        run_file=run_file,
        snapshot=Snapshot(profile=profile, spec=run.spec),
        attempt=number,
        backend="jobset" if draft.seen.apis.jobset else "job",
        queue=run.spec.schedule.queue or profile.default_queue if draft.seen.apis.kueue else None,
        restarts_left=max(0, run.spec.retry.max_restarts - draft.used),
        excluded_nodes=tuple(draft.excluded_nodes),
    )


def replanned(draft: Draft, accepted: Accepted) -> ExecutionPlan | None:
    """A plan that needs less memory than the one that ran out of it; None where none did, or none is left."""
    present = draft.present_plan
    if present is None or not any(record.reason == Reason.OUT_OF_MEMORY for record in draft.records):
        return None
    peak = present.predicted_peak_memory_bytes
    if draft.records[-1].reason != Reason.OUT_OF_MEMORY:
        peak += 1  # the present plan is one that was made so, and has held: keep it
    machine = cluster_machine(accepted.run.spec, accepted.profile)
    return plan_below(accepted.run, table_facts(accepted.run.spec.model), machine, peak)


def plan_status(execution: ExecutionPlan, backend: Backend, queue: str | None) -> PlanStatus:
    """What the status says of an attempt's plan."""
    return PlanStatus(
        backend=backend,
        gang="kueue" if queue else "none",
        strategy=execution.strategy,
        world_size=execution.world_size,
        micro_batch_size=execution.micro_batch_size,
        gradient_accumulation=execution.gradient_accumulation,
        gradient_checkpointing=execution.gradient_checkpointing,
        tiled_encoding=execution.tiled_encoding,
        tiled_samples=execution.tiled_samples,
        predicted_peak_memory_bytes=execution.predicted_peak_memory_bytes,
        device_memory_bytes=execution.device_memory_bytes,
    )


def _needs(order: Order) -> dict[str, str]:
    """What all pods together request."""
    run_file, resources = order.run_file, order.profile.resources
    nodes = run_file.plan.nodes
    needs = {"pods": str(nodes), "cpu": times(resources.cpu, nodes), "memory": times(resources.memory, nodes)}
    if resources.ephemeral_storage is not None:
        needs["ephemeral-storage"] = times(resources.ephemeral_storage, nodes)
    gpu = gpu_class(run_file.spec, order.profile)
    if gpu is not None:
        needs[gpu.resource] = str(nodes * run_file.spec.parallelism.gpus_per_node)
    return needs
