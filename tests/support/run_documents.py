"""TrainingRun documents for tests: a small valid one to change, and hypothesis strategies drawn from the API's own fields."""

import copy
import re
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from atelier_api.families import FAMILIES, FamilyFacts
from atelier_api.fields import MISSING, Node, tree
from atelier_api.layouts import LAYOUTS
from atelier_api.read import problems
from atelier_api.v1alpha1.base import format_decimal

Document = dict[str, Any]

SMALLEST: Document = {
    "apiVersion": "atelier.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "small"},
    "spec": {
        "model": {"family": "flux", "source": "base"},
        "data": {"sources": [{"uri": "pictures"}]},
        "hyperparameters": {"steps": 10},
    },
}


def document(**changes: Any) -> Document:
    """The smallest document with values set below `spec`: `document(adapter__rank=0)`.

    Its source has the references, and its hyperparameters the precision, without which its family could not be trained.
    """
    result = copy.deepcopy(SMALLEST)
    for path, value in changes.items():
        *blocks, field = path.split("__")
        block = result["spec"]
        for name in blocks:
            block = block.setdefault(name, {})
        block[field] = value
    if _trains_on_pairs(result["spec"]["model"]):
        for source in result["spec"]["data"]["sources"]:
            if source == SMALLEST["spec"]["data"]["sources"][0]:
                source["references"] = ["originals"]
    if _needs_fp32(result["spec"]["model"]):
        result["spec"]["hyperparameters"].setdefault("precision", "fp32")
    return result


def _trains_on_pairs(model: Any) -> bool:
    facts = _facts(model)
    return facts is not None and facts.references > 0


def _needs_fp32(model: Any) -> bool:
    facts = _facts(model)
    return facts is not None and bool(facts.needs_fp32)


def _facts(model: Any) -> FamilyFacts | None:
    return FAMILIES.get(model["family"]) if isinstance(model, dict) and isinstance(model.get("family"), str) else None


PATTERN_EXAMPLES = {
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$": ["default", "h100-80g", "a.b"],
    r"^(auto|dynamic|none|[0-9]+(\.[0-9]+)?)$": ["auto", "dynamic", "none", "3.0", "12"],
    r"^[0-9]+(Mi|Gi)$": ["80Gi", "512Mi", "0Gi", "24Gi"],
    r"^https?://[^/ ]+": ["https://s3.example", "http://127.0.0.1:9000"],
    r"^[a-z]([-a-z0-9]*[a-z0-9])?$": ["a", "a-1", "run"],
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": ["default", "1a"],
    r"^<[a-z0-9]+(-[a-z0-9]+)*>$": ["<fox>", "<pixel-knight-2>"],
}
"""Strings that match each pattern of the API."""

EXAMPLES = {
    "spec.model.family": [*FAMILIES],
    "spec.model.flavour": ["dev", "2.1-t2v-14b", "2.1-i2v-14b-480p", "2.1-flf2v-14b-720p", "2.2-ti2v-5b", "other"],
    "spec.model.source": [
        "base",
        "/models/flux",
        "hf://owner/name",
        "hf://owner/name@v1",
        "hf://owner",
        "s3://b/c",
        "s3://bucket/models",
        "gs://x/y",
    ],
    "spec.model.revision": ["main", "0123abcd"],
    "spec.data.sources[].uri": ["pictures", "../more", "s3://bucket/prefix", "s3://B", "gs://x"],
    "spec.validation.prompts[].image": ["first.png", "s3://bucket/first.png", "s3://B", "gs://x"],
    "spec.validation.prompts[].lastImage": ["last.png", "hf://owner/name"],
    "spec.data.sources[].references[]": ["originals", "s3://bucket/originals", "gs://x"],
    "spec.validation.prompts[].references[]": ["a.png", "s3://bucket/a.png", "gs://x"],
    "spec.data.sources[].conditioning": ["edges", "s3://bucket/edges", "gs://x"],
    "spec.validation.prompts[].conditioning": ["a.png", "s3://bucket/a.png", "gs://x"],
    "spec.storage.uri": ["runs", "s3://bucket/prefix", "s3://b", "file:///tmp/x"],
    "spec.adapter.targets[]": ["attention", "mlp", "all", r".*\.to_q"],
    "spec.adapter.inputTargets[]": ["mlp", r".*\.net\.2"],
}
"""Strings with a grammar of their own, sound and unsound."""

FEW = {
    "spec.data.resolution": [16, 32, 256, 512, 1000, 1024, 4096],
    "spec.data.bucketAlign": [8, 16, 24, 32, 64, 256],
    "spec.data.clip.frames": [1, 48, 49, 81, 1025],
    "spec.data.clip.shownFrames": [1, 2, 13, 49],
    "spec.validation.frames": [1, 48, 49],
    "spec.data.audio.minSeconds": [1, 3, 60, 61],
    "spec.data.audio.maxSeconds": [1, 60, 600],
    "spec.validation.width": [8, 100, 512, 1024],
    "spec.validation.height": [8, 100, 512, 1024],
    "spec.hyperparameters.globalBatchSize": [1, 2, 6, 8, 12, 64, 65536],
    "spec.hyperparameters.microBatchSize": [1, 2, 3, 8],
    "spec.hyperparameters.schedule.warmupSteps": [0, 1, 100],
    "spec.hyperparameters.steps": [1, 99, 1000],
    "spec.techniques.layerSync.studentBlock": [0, 7, 40],
    "spec.techniques.layerSync.teacherBlock": [0, 8, 23, 29, 47, 1023],
    "spec.parallelism.nodes": [1, 2, 3],
    "spec.parallelism.gpusPerNode": [0, 1, 2, 8],
    "spec.parallelism.processesPerNode": [1, 2, 3],
}
"""Numbers that meet each other in rules: few values, so that both outcomes are common."""


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Documents whose fields are right each for itself; the rules between them are met or not. Most optional fields are left out."""
    return draw(_block(tree(), ""))


_STRATEGIES: dict[str, st.SearchStrategy[Any]] = {}
_ONE_OF_FOUR = st.integers(0, 3)


def _value(node: Node, path: str) -> st.SearchStrategy[Any]:
    """Made once for each field: hypothesis checks a strategy that is new to it, which takes longer than to draw from it."""
    if path not in _STRATEGIES:
        _STRATEGIES[path] = _new_value(node, path)
    return _STRATEGIES[path]


def _new_value(node: Node, path: str) -> st.SearchStrategy[Any]:
    if path in FEW:
        return st.sampled_from(FEW[path])
    if path in EXAMPLES:
        return st.sampled_from(EXAMPLES[path])
    match node.kind:
        case "block" | "variants":
            return _block(node, path)
        case "list":
            return _list(node, path)
        case "map":
            return st.just({})
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(int(node.bounds.low or 0), int(node.bounds.high or 0))
        case "decimal":
            return _decimal(node)
    if node.choices:
        return st.sampled_from(node.choices)
    if node.pattern:
        return st.sampled_from(PATTERN_EXAMPLES[node.pattern])
    least, most = int(node.length.low or 0), min(int(node.length.high or 0), 12)
    return st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=least, max_size=most)


@st.composite
def _block(draw: st.DrawFn, node: Node, path: str) -> Document:
    names = list(node.fields)
    result: Document = {}
    if node.kind == "variants":
        kind = draw(st.sampled_from([*node.variants, None]))
        names = [name for name in node.variants[kind or "lora"] if name != "type"]
        result = {"type": kind} if kind else {}
    for name in names:
        child = node.fields[name]
        if child.required or draw(_ONE_OF_FOUR) == 0:
            below = f"{path}.{name}" if path else name
            alone = _value(child, below)
            result[name] = draw(
                st.one_of(st.none(), alone) if child.nullable and child.default is not MISSING else alone
            )
    return result


@st.composite
def _list(draw: st.DrawFn, node: Node, path: str) -> list[Any]:
    assert node.item is not None
    least, most = int(node.length.low or 0), min(int(node.length.high or 3), 3)
    return draw(st.lists(_value(node.item, f"{path}[]"), min_size=least, max_size=most))


@st.composite
def _decimal(draw: st.DrawFn, node: Node) -> str:
    """A decimal within the bounds, at them as often as not; some in other spellings."""
    low, high = float(node.bounds.low or 0), float(node.bounds.high or 0)
    ends = [end for end, out in ((low, node.bounds.low_excluded), (high, node.bounds.high_excluded)) if not out]
    default = [] if node.default in (MISSING, None) else [float(node.default)]
    inside = st.floats(
        low, high, exclude_min=node.bounds.low_excluded, exclude_max=node.bounds.high_excluded, allow_subnormal=False
    )
    number = draw(st.one_of(st.sampled_from([*ends, *default]) if ends or default else inside, inside))
    spelled = [format_decimal(number), f"{number:e}" if float(f"{number:e}") == number else format_decimal(number)]
    return draw(st.sampled_from([text for text in spelled if len(text) <= 32]))


def sound_documents() -> st.SearchStrategy[Document]:
    """Documents that are valid as a whole: what breaks a rule is left out, or put right where it must be there."""
    return documents().map(_mended)


def _mended(drawn: Document) -> Document:
    sound = copy.deepcopy(drawn)
    for _ in range(8):
        found = problems(sound)
        if not found:
            return sound
        for problem in found:
            _mend(sound, problem.path)
    raise AssertionError(f"still broken: {[str(problem) for problem in found]}")


def _mend(sound: Document, path: str) -> None:
    spec = sound["spec"]
    if path == "spec.hyperparameters.globalBatchSize":
        parallelism, numbers = spec.get("parallelism", {}), spec["hyperparameters"]
        processes = parallelism.get("gpusPerNode", 1) or parallelism.get("processesPerNode") or 1
        numbers["globalBatchSize"] = parallelism.get("nodes", 1) * processes * (numbers.get("microBatchSize") or 1)
    elif path.startswith("spec.data.sources"):
        source = {"uri": "pictures", "references": ["originals"][: _trains_on_pairs(spec["model"])]}
        controlled = spec.get("adapter", {}).get("type") == "controlnet"
        spec["data"]["sources"] = [source | ({"conditioning": "edges"} if controlled else {})]
    elif re.fullmatch(r"spec\.validation\.prompts\[.*\.references(\[.*)?", path):
        for prompt in spec["validation"].get("prompts", []):  # an earlier problem of them may have removed them
            prompt["references"] = ["a.png"][: _trains_on_pairs(spec["model"])]
    elif path.startswith("spec.adapter.tokens") and spec["adapter"].get("type") == "textual-inversion":
        spec["adapter"]["tokens"] = [{"token": "<fox>", "initializer": "fox"}]
    elif path.startswith("spec.techniques.layerSync"):
        spec["techniques"].pop("layerSync", None)
    elif path == "spec.hyperparameters.ema" or path.startswith("spec.objective.twinFlow"):
        spec["objective"].pop("twinFlow", None)
    elif path == "spec.publish.formats":
        spec.setdefault("publish", {})["formats"] = [LAYOUTS[spec.get("adapter", {}).get("type", "lora")][0]]
    elif path == "spec.hyperparameters.precision":
        spec["hyperparameters"]["precision"] = "fp32"
    elif path == "spec.data.clip.shownFrames":
        clip, validation = spec["data"].get("clip", {}), spec.get("validation", {})
        clip.pop("shownFrames", None)
        for block in (clip, validation):
            if block.get("frames") == 1:  # of which none is left to be shown
                del block["frames"]
    elif path == "spec.data.audio.minSeconds":
        for field in ("minSeconds", "maxSeconds"):  # the default of one may not fit the other
            spec["data"]["audio"].pop(field, None)
    elif path == "spec.model.source":
        spec["model"]["source"] = "base"
    else:
        *blocks, field = path.split("[", maxsplit=1)[0].removeprefix("spec.").split(".")
        block = spec
        for name in blocks:
            block = block[name]
        block.pop(field, None)


def places(value: Any, node: Node, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Node]]:
    """Every field of a document below `spec`, with its node."""
    if place[:1] == ("spec",) and value is not None:
        yield place, node
    if isinstance(value, dict):
        for name, item in value.items():
            if name in node.fields:
                yield from places(item, node.fields[name], (*place, name))
    if isinstance(value, list) and node.item is not None:
        for index, item in enumerate(value):
            yield from places(item, node.item, (*place, index))


def wrong_values(node: Node) -> Iterator[Any]:
    """Values that no field of this kind takes."""
    yield {"unknownKey": 1} if node.fields else {"a": {}}
    yield [[]]
    if node.kind != "boolean":
        yield True
    if node.kind in ("string", "decimal"):
        yield 7 if node.kind == "string" else "seven"
    if node.kind == "integer":
        yield "7"
        yield 10**12
    if node.choices:
        yield "nothing-like-it"


def with_value(original: Document, place: tuple[Any, ...], value: Any) -> Document:
    """A document with another value at a place."""
    changed = copy.deepcopy(original)
    block: Any = changed
    for step in place[:-1]:
        block = block[step]
    block[place[-1]] = value
    return changed
