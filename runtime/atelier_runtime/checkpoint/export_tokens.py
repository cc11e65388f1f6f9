"""Results of textual inversion: one file for each placeholder.

diffusers/<placeholder>.safetensors    `pipe.load_textual_inversion(tensors["clip_l"], token=…, text_encoder=…, tokenizer=…)`
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from atelier_api.model_files import token_file
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.adapter import TextualInversionAdapter
from atelier_runtime.checkpoint.exported_file import ExportedFile, Provenance, State, complete, details_of
from atelier_runtime.family import Family
from atelier_runtime.inversion_layout import files


def export_tokens(
    weights: Mapping[str, State], run_file: RunFile, family: Family, folder: Path, *, provenance: Provenance
) -> list[ExportedFile]:
    """Write a file for each placeholder.

    `weights` are the trained tensors on the CPU by component and parameter name, in the dtype to be saved. Raises StoreError where a
    file reads back different.
    """
    adapter = run_file.spec.adapter
    if not isinstance(adapter, TextualInversionAdapter):
        raise ValueError(f"no file of placeholders can be made of an adapter of type {adapter.type}")
    component = family.denoisers[0]
    details = details_of(run_file, family, component, provenance)
    exported = []
    for token, tensors in files(weights[component], adapter).items():
        path = folder / "diffusers" / token_file(token)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        exported.append(complete(path, "diffusers", details | {"atelier.token": token}))
    return exported
