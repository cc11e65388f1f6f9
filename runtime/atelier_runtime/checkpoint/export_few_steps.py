"""What a few-step generator has learnt beside its adapter, in a file of its own: stock loaders of the adapter know nothing of it.

    few_steps/<run>.safetensors    `atelier_runtime.few_steps.few_step_pipeline(pipe, file)`, and then the adapter as ever

Its tensors are `negative` and those of `embedder`, as `atelier_runtime.few_steps` describes them; its header says in
`atelier.twin_flow.*` where the network's own embedder is, and what goes into it.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from atelier_api.run_file import RunFile
from atelier_runtime import components
from atelier_runtime.checkpoint.exported_file import ExportedFile, Provenance, State, complete, details_of
from atelier_runtime.family import Family
from atelier_runtime.few_steps import CHILD, header_of

LAYOUT = "few-steps"


def parted(weights: Mapping[str, State]) -> tuple[dict[str, State], dict[str, State]]:
    """The weights by component, and apart from them those that tell of steps by their names in the file, where there are any."""
    adapters: dict[str, State] = {}
    steps: dict[str, State] = {}
    for component, state in weights.items():
        adapters[component] = {name: tensor for name, tensor in state.items() if not name.startswith(f"{CHILD}.")}
        if len(adapters[component]) < len(state):
            steps[component] = {
                name.removeprefix(f"{CHILD}."): tensor.contiguous()
                for name, tensor in state.items()
                if name not in adapters[component]
            }
    return adapters, steps


def export_few_steps(
    steps: Mapping[str, State], run_file: RunFile, family: Family, folder: Path, *, provenance: Provenance
) -> list[ExportedFile]:
    """Write the file of each component of `steps`, which `parted` gives. Raises StoreError where one reads back different."""
    exported, twin = [], run_file.spec.objective.twin_flow
    for component, state in steps.items():
        assert twin is not None
        assert family.time_embedder is not None
        path = folder / "few_steps" / f"{run_file.identity.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(state), path)
        config = components.denoiser_config(run_file.model_folder, component)
        details = details_of(run_file, family, component, provenance)
        details |= header_of(family.time_embedder, config) | {"atelier.twin_flow.sample_steps": str(twin.sample_steps)}
        exported.append(complete(path, LAYOUT, details))
    return exported
