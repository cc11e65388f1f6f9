"""Files of a base checkpoint: which of a repository's a run needs, whether a copy is whole, and where a cache keeps one.

A checkpoint is laid out as a hub repository of diffusers: `model_index.json` names the components, each a folder. Repositories hold
much that no run reads: the same weights as pickles, ONNX or Flax, in a second precision, or once more as one file at the top.
Reads names and `model_index.json`, never weights.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1.model import ModelSpec
from atelier_api.v1alpha1.storage import S3Settings

INDEX = "model_index.json"
WEIGHTS = ".safetensors"
TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of configs and of what tokenizers read."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
"""One of these, or one of a tokenizer's, is what a component is loaded by. `config.json` is of those that have weights."""


def components(index: Mapping[str, Any]) -> list[str]:
    """Names of the components in `model_index.json`; those that the checkpoint goes without ([null, null]) are left out."""
    return [name for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]]


def needed(names: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    """Of a repository's files, those that a run reads, sorted: the index, and of each component configs and plain safetensors."""
    known = set(components(index))
    chosen = []
    for name in sorted(names):
        folder, _, file = name.partition("/")
        if name == INDEX or (folder in known and "/" not in file and _is_read(file)):
            chosen.append(name)
    return chosen


def lacking(names: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    """What a checkpoint with these files lacks to be loaded; empty when it is whole."""
    have: dict[str, set[str]] = {}
    for name in needed(names, index):
        folder, _, file = name.rpartition("/")
        have.setdefault(folder, set()).add(file)
    found = [] if INDEX in have.get("", ()) else [INDEX]
    for component in components(index):
        files = have.get(component, set())
        if not any(file in _CONFIGS or file.startswith("tokenizer") for file in files):
            found.append(f"the configuration of {component}")
        elif "config.json" in files:
            found += _lacking_weights(component, files)
    return found


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a whole checkpoint, as far as names tell."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(index, dict):
        return False
    return not lacking((path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), index)


def hub_name(model: ModelSpec) -> tuple[str, str]:
    """Repository (`owner/name`) and revision of an `hf://` source."""
    repository, _, revision = model.source.removeprefix("hf://").partition("@")
    return repository, revision or model.revision or "main"


def base_arguments(model: ModelSpec, folder: str) -> str:
    """What `from_pretrained` is called with to load the base: a repository and its revision, or the folder on this machine."""
    if not model.source.startswith("hf://"):
        return f'"{folder}"'
    name, revision = hub_name(model)
    return f'"{name}"' + ("" if revision == "main" else f', revision="{revision}"')


def lora_loading(facts: FamilyFacts, folder: str, name: str, options: str = "") -> list[str]:
    """Lines of Python that put the LoRA file `name` of the diffusers layout on `pipe`, the family's stock pipeline."""
    component = facts.lora_component
    if component is None:
        return [f'pipe.load_lora_weights("{folder}", weight_name="{name}"{options})']
    return [
        "# the pipeline has no loader for LoRA, so its denoiser is given diffusers' own",
        "from diffusers.loaders.peft import PeftAdapterMixin",
        f"denoiser = pipe.{component}",
        'denoiser.__class__ = type("Denoiser", (type(denoiser), PeftAdapterMixin), {})',
        f'denoiser.load_lora_adapter("{folder}", weight_name="{name}", prefix="{component}")',
    ]


def lycoris_loading(component: str, path: str, kind: str) -> list[str]:
    """Lines of Python that merge a file of lycoris-lora into the denoiser `component` of `pipe`, the family's stock pipeline.

    `kind` is the type of adapter: the library's reader of whole files fails on IA³, whose layers are read one by one.
    """
    if kind == "ia3":
        return [
            "from lycoris.modules.ia3 import IA3Module",
            "from safetensors.torch import load_file",
            f'tensors = load_file("{path}")',
            f"for name, layer in pipe.{component}.named_modules():",
            '    key = "lycoris_" + name.replace(".", "_")',
            '    if f"{key}.weight" in tensors:',
            '        scales = IA3Module(key, layer, train_on_input=bool(tensors[f"{key}.on_input"]))',
            '        scales.weight.data.copy_(tensors[f"{key}.weight"])',
            "        scales.merge_to(1.0)",
        ]
    return [
        "from lycoris import create_lycoris_from_weights",
        f'network, _ = create_lycoris_from_weights(1.0, "{path}", pipe.{component})',
        "network.merge_to(1.0)",
    ]


def inversion_loading(facts: FamilyFacts, token: str, path: str) -> list[str]:
    """Lines of Python that give `pipe`, the family's stock pipeline, the placeholder `token` of a file of textual inversion."""
    return [
        "from safetensors.torch import load_file",
        f'vectors = load_file("{path}")',
        *(
            f'pipe.load_textual_inversion(vectors["{each.key}"], token="{token}", text_encoder=pipe.{each.text_encoder}, '
            f"tokenizer=pipe.{each.tokenizer})"
            for each in facts.vocabularies
        ),
    ]


FEW_STEPS = "exports/few_steps/"
"""Begins the keys of files that tell a network where its steps end."""


def few_step_loading(path: str) -> list[str]:
    """Lines of Python that have `pipe`, which holds no adapter yet, draw in few steps by such a file."""
    return ["from atelier_runtime.few_steps import few_step_pipeline", f'pipe = few_step_pipeline(pipe, "{path}")']


def token_file(token: str) -> str:
    """Name of the file of a placeholder: ComfyUI calls it so in prompts (`embedding:pixel-knight`)."""
    return f"{token.strip('<>')}.safetensors"


def hub_snapshot(cache: Path, repository: str, revision: str) -> Path | None:
    """The whole snapshot of a revision (branch, tag or commit) in the hub library's cache; None where there is none yet."""
    base = hub_folder(cache, repository)
    reference = base / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = base / "snapshots" / commit
    return snapshot if is_whole(snapshot) else None


def hub_folder(cache: Path, repository: str) -> Path:
    """Folder of a model repository in the hub library's cache: `refs/<revision>`, `snapshots/<commit>/`, `blobs/<hash>`."""
    return cache / f"models--{repository.replace('/', '--')}"


def objects_folder(cache: Path, source: str, s3: S3Settings) -> Path:
    """Folder of an `s3://` source in the cache of models: one folder per content that the prefix has had, and `current`."""
    place = source.rstrip("/")
    digest = hashlib.sha256(f"{s3.endpoint or ''}\0{place}".encode()).hexdigest()[:12]
    return cache / f"{place.removeprefix('s3://').partition('/')[0]}-{digest}"


def current_copy(folder: Path) -> Path | None:
    """The newest whole copy below an `objects_folder`; None where nothing has been fetched yet."""
    try:
        copy = folder / (folder / "current").read_text().strip()
    except OSError:
        return None
    return copy if is_whole(copy) else None


def _is_read(file: str) -> bool:
    """Whether a component's file is read: no second format, and no second precision (`model.fp16.safetensors`)."""
    if file.endswith(WEIGHTS):
        match = _SHARD.fullmatch(file)
        return "." not in (match["stem"] if match else file.removesuffix(WEIGHTS))
    if ".index." in file:
        return file.endswith(f"{WEIGHTS}.index.json")
    return file.endswith(TEXTS)


def _lacking_weights(component: str, files: set[str]) -> list[str]:
    weights = [file for file in files if file.endswith(WEIGHTS)]
    if not weights:
        return [f"the weights of {component} as safetensors"]
    shards = [match for file in weights if (match := _SHARD.fullmatch(file))]
    if not shards:
        return []
    stem, count = shards[0]["stem"], int(shards[0]["count"])
    wanted = {f"{stem}-{number:05d}-of-{count:05d}{WEIGHTS}" for number in range(1, count + 1)}
    return [f"{component}/{file}" for file in sorted((wanted | {f"{stem}{WEIGHTS}.index.json"}) - files) if file]
