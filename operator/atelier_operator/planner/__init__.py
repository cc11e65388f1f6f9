"""The planner: from a run, the model's sizes and a machine to an execution plan. Pure; imports neither torch nor a cluster client.

`local` and `checkpoint_facts` are the two modules that read the local disk, for runs on this machine.
"""

from atelier_operator.planner.execution import Paths, plan, resolve
from atelier_operator.planner.memory import ModelFacts, Prediction, table_facts
from atelier_operator.planner.strategy import Machine

__all__ = ["Machine", "ModelFacts", "Paths", "Prediction", "plan", "resolve", "table_facts"]
