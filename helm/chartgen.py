"""What the chart takes from elsewhere in the repository, and its reference page.

python helm/chartgen.py            writes the files
python helm/chartgen.py --check    exit code 1 when a file is not what would be written

* templates/crds/    from crds/*.yaml
* Chart.yaml         its two versions, from pyproject.toml
* values.schema.json from values.schema.yaml, with the schema of profiles from their CRD
* docs/reference/chart-values.md from values.schema.yaml and the defaults in values.yaml
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from atelier_api.generated import Generated, main

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "atelier"
CRDS = ROOT / "crds"
PROFILE_CRD = CRDS / "clustertrainingprofiles.atelier.dev.yaml"
SCHEMA_SOURCE = ROOT / "helm" / "values.schema.yaml"
PAGE = ROOT / "docs" / "reference" / "chart-values.md"

Schema = dict[str, Any]

# Objects that Kubernetes defines: the API server checks what is in them.
OPEN = frozenset(
    {"global", "nodeAffinity", "podAffinity", "podAntiAffinity"} | {"namespaceSelector", "podSelector", "ipBlock"}
)

_METADATA = """metadata:
  name: {name}
  labels:
    {{{{- include "atelier.labels" (list . "crds") | nindent 4 }}}}
  {{{{- if .Values.crds.keep }}}}
  annotations:
    helm.sh/resource-policy: keep
  {{{{- end }}}}
"""


def crd_template(source: Path) -> str:
    """The CRD as a template. Raises ValueError when it has template brackets, or metadata besides a name."""
    text = source.read_text(encoding="utf-8")
    if "{{" in text:
        raise ValueError(f"{source.name} has '{{{{', which Helm would take for a template action")
    head, found, rest = text.partition(f"metadata:\n  name: {source.stem}\nspec:\n")
    if not found:
        raise ValueError(f"{source.name} should have only the name {source.stem} in its metadata")
    body = head.partition("\n")[2] + _METADATA.format(name=source.stem) + "spec:\n" + rest
    note = f"{{{{/* Generated from crds/{source.name} by helm/chartgen.py. Do not edit. */}}}}\n"
    return f"{note}{{{{- if .Values.crds.install }}}}\n{body}{{{{- end }}}}\n"


def chart_text() -> str:
    """Chart.yaml with the versions of the Python distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    text = (CHART / "Chart.yaml").read_text(encoding="utf-8")
    text = re.sub(r"^version: .*$", f"version: {version}", text, flags=re.MULTILINE)
    return re.sub(r"^appVersion: .*$", f'appVersion: "{version}"', text, flags=re.MULTILINE)


def schema_source() -> Schema:
    """values.schema.yaml with the schema of profiles."""
    schema: Schema = yaml.safe_load(SCHEMA_SOURCE.read_text(encoding="utf-8"))
    versions = yaml.safe_load(PROFILE_CRD.read_text(encoding="utf-8"))["spec"]["versions"]
    spec = versions[0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    schema["definitions"]["trainingProfile"] = _json_schema(spec)
    return schema


def schema_text() -> str:
    """values.schema.json: every object is closed but those that Kubernetes defines."""
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of Atelier's chart"}
    return json.dumps(schema | _closed(schema_source(), ""), indent=2, ensure_ascii=False) + "\n"


def page_text() -> str:
    """The reference page: one row per value."""
    schema = schema_source()
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    head = (
        "# Values of the chart\n\n"
        "Generated from `helm/values.schema.yaml` and `helm/atelier/values.yaml` by `helm/chartgen.py`. Do not edit.\n"
        "`[]` in a name stands for an entry of a list. Unknown keys are refused at every level. How to use them:\n"
        "[install on a cluster](../how-to/install-on-a-cluster.md).\n"
    )
    lines = [head]
    for block, field in schema["properties"].items():
        if block in OPEN:
            continue
        lines.append(
            f"\n## {block}\n\n{field['description']}\n\n| value | type | default | meaning |\n|---|---|---|---|"
        )
        rows = _rows(field, block, schema["definitions"]) if "properties" in field else [(block, field)]
        lines += [_row(path, each, defaults) for path, each in rows]
    return "\n".join(lines) + "\n"


def _json_schema(field: Schema) -> Schema:
    """A structural schema as JSON Schema: what is Kubernetes' own or only for the API server is left out."""
    dropped = ("nullable", "format", "default")
    result = {key: value for key, value in field.items() if key not in dropped and not key.startswith("x-kubernetes-")}
    if field.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if field.get("nullable"):
        result["type"] = [*_types(result), "null"]
        if "enum" in result:
            result["enum"] = [*result["enum"], None]
    if "properties" in field:
        result["properties"] = {name: _json_schema(each) for name, each in field["properties"].items()}
    if "items" in field:
        result["items"] = _json_schema(field["items"])
    return result


def _closed(schema: Any, name: str) -> Any:
    """`schema` with every object that lists its properties refusing others."""
    if isinstance(schema, list):
        return [_closed(each, name) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _closed_below(key, value, name) for key, value in schema.items()}
    if "object" in _types(schema) and name not in OPEN:
        result.setdefault("additionalProperties", False)
    return result


def _closed_below(key: str, value: Any, name: str) -> Any:
    """Below `properties` and `definitions` keys are names of fields, elsewhere they are words of JSON Schema."""
    if key in ("properties", "definitions"):
        return {field: _closed(each, field) for field, each in value.items()}
    return _closed(value, name)


def _types(schema: Schema) -> list[str]:
    found = schema.get("type", [])
    return found if isinstance(found, list) else [found]


def _rows(field: Schema, path: str, definitions: Mapping[str, Schema]) -> Iterator[tuple[str, Schema]]:
    """The leaves below an object, and for lists of objects the list and then the fields of its entries."""
    for name, each in field.get("properties", {}).items():
        resolved = _resolve(each, definitions)
        below = f"{path}.{name}"
        items = _resolve(resolved.get("items", {}), definitions)
        if "properties" in resolved and name != "affinity":
            if "[]" in below:
                yield below, resolved
            yield from _rows(resolved, below, definitions)
            continue
        yield below, resolved
        if "description" in next(iter(items.get("properties", {}).values()), {}):
            yield from _rows(items, f"{below}[]", definitions)


def _resolve(field: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The field with what its reference says; its own words win."""
    if "$ref" not in field:
        return field
    found = definitions[field["$ref"].rpartition("/")[2]]
    return {**found, **{key: value for key, value in field.items() if key != "$ref"}}


def _row(path: str, field: Schema, defaults: Any) -> str:
    kind = field.get("type", "")
    kind = " or ".join(kind) if isinstance(kind, list) else kind
    if "enum" in field:
        kind = ", ".join(f"`{each}`" for each in field["enum"])
    default = "" if "[]" in path else f"`{json.dumps(_default(defaults, path), ensure_ascii=False)}`"
    return f"| `{path}` | {kind} | {default} | {field['description']} |"


def _default(defaults: Any, path: str) -> Any:
    """Raises KeyError when values.yaml does not have a value that the schema has."""
    for name in path.split("."):
        defaults = defaults[name]
    return defaults


def files() -> list[Generated]:
    """Everything that is generated."""
    crds = [
        Generated(CHART / "templates" / "crds" / source.name, partial(crd_template, source))
        for source in sorted(CRDS.glob("*.yaml"))
    ]
    return [
        *crds,
        Generated(CHART / "Chart.yaml", chart_text),
        Generated(CHART / "values.schema.json", schema_text),
        Generated(PAGE, page_text),
    ]


if __name__ == "__main__":
    main(*files())
