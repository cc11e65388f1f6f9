"""The reference page of `TrainingRun`, made from the types.

python -m atelier_api.docgen            writes docs/reference/trainingrun.md
python -m atelier_api.docgen --check    exit code 1 when the page is not what would be written
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from atelier_api.cel import spec_rules
from atelier_api.families import FAMILIES
from atelier_api.fields import MISSING, Node, tree, walk
from atelier_api.generated import Generated, main
from atelier_api.read import PATTERNS

PATH = Path(__file__).parent.parent.parent / "docs" / "reference" / "trainingrun.md"

HEAD = """\
<!-- Generated from crds/atelier_api by `make crds`. Do not edit. -->

# TrainingRun

One fine-tune in one file, `atelier.dev/v1alpha1`. The same file is for `atelier run` and for `kubectl apply`.

Keys that are not listed here are refused. A decimal is written as a string (`"1e-4"`), since Kubernetes objects hold no floats; the
command line takes a plain number as well. Paths are relative to the folder of the file.
"""

EXAMPLE = """\
apiVersion: atelier.dev/v1alpha1
kind: TrainingRun
metadata:
  name: pixel-knight
spec:
  model:
    family: flux
    source: hf://black-forest-labs/FLUX.1-dev
  adapter:
    rank: 32
    targets: [attention, mlp]
  data:
    sources:
      - uri: pictures
    captions:
      trigger: pxlknght
  hyperparameters:
    steps: 3000
    globalBatchSize: 8
    learningRate: "1e-4"
  parallelism:
    gpusPerNode: 8
    deviceMemory: 80Gi
  validation:
    everySteps: 500
    prompts:
      - text: pxlknght on a hill
  storage:
    uri: s3://runs/art
"""

FAMILIES_TITLE = "Families and flavours"
RULES_TITLE = "Rules between fields"


def text() -> str:
    """The page."""
    root = tree()
    parts = [HEAD, "## Example\n\n```yaml\n" + EXAMPLE + "```\n", _families()]
    blocks = [("", root), *((path, node) for path, node in walk(root))]
    for path, node in blocks:
        block = node.item if node.kind == "list" and node.item is not None and node.item.fields else node
        if block.fields and not path.endswith("[]"):
            parts.append(_section(path + ("[]" if block is not node else ""), node, block))
    parts.append(_rules())
    return "\n".join(parts)


def _section(path: str, node: Node, block: Node) -> str:
    """The table of one block."""
    title = f"## `{path}`" if path else "## The file"
    lines = [title, "", node.description, ""]
    lines += [_row("field", "type", "default", "allowed", "what it is"), _row(*["---"] * 5)]
    for name, child in block.fields.items():
        kinds = [kind for kind, names in block.variants.items() if name in names and name != "type"]
        note = f" Only for type {' and '.join(kinds)}." if kinds else ""
        allowed = (
            "see the families above"
            if f"{path}.{name}" in ("spec.model.family", "spec.model.flavour")
            else _allowed(child)
        )
        lines.append(_row(f"`{name}`", _type(child), _default(child), allowed, child.description + note))
    return "\n".join(lines) + "\n"


def _type(node: Node) -> str:
    match node.kind:
        case "list":
            assert node.item is not None
            return f"list of {'blocks' if node.item.fields else _type(node.item)}"
        case "map":
            return "map of string to string"
        case "variants":
            return "block"
    return node.kind


def _default(node: Node) -> str:
    if node.required:
        return "required"
    if node.defaults:
        return ", ".join(f"`{_inline(default)}` ({kind})" for kind, default in node.defaults.items())
    if node.default is MISSING:
        return ""
    if node.default is None:
        return "none"
    if node.kind in ("block", "variants", "map"):
        return ""
    if node.kind == "decimal":
        return f'`"{node.default}"`'
    return f"`{_inline(node.default)}`"


def _allowed(node: Node) -> str:
    item = node.item if node.kind == "list" and node.item is not None else Node(kind="string")
    said = [
        ", ".join(f"`{choice}`" for choice in node.choices or item.choices),
        node.bounds.text(),
        PATTERNS.get(node.pattern or "", ""),
        f"{node.length.text()} {'items' if node.kind == 'list' else 'characters'}" if node.length.text() else "",
        "`null`" if node.nullable and node.default is not None else "",
    ]
    return "; ".join(part for part in said if part)


def _families() -> str:
    lines = [
        f"## {FAMILIES_TITLE}",
        "",
        _row("`family`", "model", "`flavour`, the first is the default"),
        _row(*["---"] * 3),
    ]
    for facts in FAMILIES.values():
        flavours = ", ".join(f"`{flavour.name}`" for flavour in facts.flavours)
        lines.append(_row(f"`{facts.name}`", facts.title, flavours))
    return "\n".join(lines) + "\n"


def _rules() -> str:
    """What fields must be to each other, one line for each field."""
    lines = [f"## {RULES_TITLE}", "", "An option at its default counts as not given.", ""]
    lines += [_row("field", "rule"), _row("---", "---")]
    lines += [_row(f"`spec.{field}`", message) for field, message in _messages()]
    return "\n".join(lines) + "\n"


def _messages() -> Iterator[tuple[str, str]]:
    told: dict[str, list[str]] = {}
    for rule in spec_rules():
        told.setdefault(rule.field, []).append(rule.message)
    for field, messages in told.items():
        yield field, "; ".join(dict.fromkeys(messages))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


if __name__ == "__main__":
    main(Generated(PATH, text))
