"""Lines of Python that use what a run has made, for its report."""

from collections.abc import Iterator, Sequence

from atelier_api.layouts import LYCORIS
from atelier_api.model_files import (
    FEW_STEPS,
    base_arguments,
    few_step_loading,
    inversion_loading,
    lora_loading,
    lycoris_loading,
    token_file,
)
from atelier_api.run_file import RunFile
from atelier_api.sampler import sampler_loading
from atelier_api.v1alpha1.adapter import TextualInversionAdapter
from atelier_runtime import components
from atelier_runtime.control import CONTROL_NETWORK
from atelier_runtime.family import Family


def usage(run_file: RunFile, family: Family, keys: Sequence[str]) -> str:
    """A program that draws with the result. `keys` are the exported files, relative to the run's root, the first denoiser's first."""
    pipeline = components.pipeline_name(family, run_file.model_folder)
    shown = run_file.spec.data.clip.shown_frames
    given = ["image", "last_image"][: len(components.given_frames(family, run_file.model_folder))]
    pictures = given or (["image"] if family.facts.references else [])
    inputs = [f'{name}=load_image("{name}.png")' for name in pictures]
    if shown > 1:  # arguments that a pipeline of a family which continues clips has
        inputs = [f'video=load_video("start.mp4"), num_cond_frames={shown}']
    control = family.control if run_file.spec.adapter.type == "controlnet" else None
    if control:
        pipeline = control.pipeline
        inputs.append(f'{control.picture}=load_image("condition.png")')
    loaders = ["load_video" if shown > 1 else "load_image"] if inputs else []
    tools = [*loaders, *(["export_to_video"] if family.facts.modality == "video" else [])]
    lines = ["import wave", ""] if family.facts.modality == "audio" else []
    lines += _imports([control.network, pipeline] if control else [pipeline])
    if tools:
        lines.append(f"from diffusers.utils import {', '.join(sorted(tools))}")
    lines.append("")
    twin = run_file.spec.objective.twin_flow
    if twin is not None:
        inputs += ["uniform_tail=False"] if shown > 1 else []
        inputs += [f"num_inference_steps={twin.sample_steps}", f"guidance_scale={family.facts.guidance_above:g}"]
    return "\n".join([*lines, *_loading(run_file, family, pipeline, keys), *_drawing(family, inputs)])


def _imports(names: Sequence[str]) -> list[str]:
    """A line for each library that has some of the classes `names`."""
    libraries = dict.fromkeys(components.library_of(name) for name in names)
    found = {library: [name for name in names if components.library_of(name) == library] for library in libraries}
    return [f"from {library} import {', '.join(classes)}" for library, classes in found.items()]


def _loading(run_file: RunFile, family: Family, pipeline: str, keys: Sequence[str]) -> Iterator[str]:
    base, adapter = base_arguments(run_file.spec.model, run_file.model_folder), run_file.spec.adapter.type
    steps = [key for key in keys if key.startswith(FEW_STEPS)]
    keys = [key for key in keys if key not in steps]
    if adapter == "full":
        for component in sorted({key.split("/")[2] for key in keys}):
            yield f'# replace the pipeline\'s {component} by the folder "exports/diffusers/{component}" (from_pretrained)'
    control = family.control if adapter == "controlnet" else None
    if control:
        yield f'network = {control.network}.from_pretrained("exports/diffusers/{CONTROL_NETWORK}")'
    yield f"pipe = {pipeline}.from_pretrained({base}{f', {CONTROL_NETWORK}=network' if control else ''})"
    yield from sampler_loading(run_file.spec.objective)
    for key in steps:
        yield from few_step_loading(key)
    if adapter == "lora":
        for key in (key for key in keys if key.startswith("exports/diffusers/")):
            folder, name = key.rsplit("/", 1)
            second = ", load_into_transformer_2=True" if name.endswith("_low_noise.safetensors") else ""
            yield from lora_loading(family.facts, folder, name, second)
    elif isinstance(run_file.spec.adapter, TextualInversionAdapter):
        for token in run_file.spec.adapter.tokens:
            yield from inversion_loading(family.facts, token.token, f"exports/diffusers/{token_file(token.token)}")
    elif adapter in LYCORIS:
        for key, component in zip(keys, family.denoisers, strict=False):
            yield from lycoris_loading(component, key, adapter)


def _drawing(family: Family, inputs: Sequence[str]) -> Iterator[str]:
    """The call, all by name: some pipelines take the picture first. `inputs` are the arguments beside the prompt."""
    arguments = ['prompt="your prompt"', *inputs]
    output = f"pipe({', '.join(arguments)})[0][0]"  # the first of the first field, which has many names
    if family.facts.modality == "image":
        yield f'{output}.save("picture.png")'
    elif family.facts.modality == "audio":
        yield f"waveform = {output}  # [2, samples]"
        yield 'with wave.open("sound.wav", "wb") as file:'
        yield '    file.setparams((2, 2, pipe.sample_rate, 0, "NONE", ""))'
        yield "    file.writeframes((waveform.T * 32767).short().cpu().contiguous().numpy().tobytes())"
    else:
        yield f'export_to_video({output}, "clip.mp4", fps={family.facts.frame_rate or 16.0:g})'
