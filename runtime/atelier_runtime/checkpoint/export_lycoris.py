"""Results of lycoris-lora's types of adapter, in its own layout: what it reads, and ComfyUI and kohya-ss.

    lycoris/<run>.safetensors    `create_lycoris_from_weights(1.0, file, pipe.<denoiser>)`, then `merge_to()` of what it gives

Of (IA)³ that reader fails; `atelier_api.model_files` has the lines that load it with the library's module.

diffusers has no loader for them. A checkpoint with two experts gives two files, `<run>_high_noise` and `<run>_low_noise`.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.adapter import LycorisAdapter
from atelier_runtime.checkpoint.exported_file import ExportedFile, Provenance, State, complete, details_of, noise_range
from atelier_runtime.family import Family
from atelier_runtime.lycoris_layout import file_tensors


def export_lycoris(
    weights: Mapping[str, State], run_file: RunFile, family: Family, folder: Path, *, provenance: Provenance
) -> list[ExportedFile]:
    """Write one file for each trained component.

    `weights` are the adapter's whole tensors on the CPU by component and parameter name, in the dtype to be saved. Raises StoreError
    where a file reads back different.
    """
    adapter = run_file.spec.adapter
    if not isinstance(adapter, LycorisAdapter):
        raise ValueError(f"no file of lycoris-lora can be made of an adapter of type {adapter.type}")
    exported = []
    for component, state in weights.items():
        noise = noise_range(run_file, family, list(weights), component)
        path = folder / "lycoris" / f"{run_file.identity.name}{f'_{noise}' if noise else ''}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(file_tensors(state, adapter, family), path)
        exported.append(complete(path, "lycoris", details_of(run_file, family, component, provenance)))
    return exported
