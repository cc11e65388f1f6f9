"""AdmissionReview v1: what the API server asks, and how it is answered. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from atelier_operator.names import GROUP

API_VERSION, KIND = "admission.k8s.io/v1", "AdmissionReview"
CHANGES = ("CREATE", "UPDATE")
LONGEST_WARNING = 250
"""The API server cuts what is longer than 256."""

STATUS_REASONS = {403: "Forbidden", 422: "Invalid"}

Raw = Mapping[str, Any]


class Malformed(ValueError):
    """No AdmissionReview of the kind that this webhook is registered for."""


@dataclass(frozen=True)
class Review:
    """One question. `run` is the object as it would be stored, `before` as it is; {} where there is none."""

    uid: str
    operation: str
    ours: bool
    subresource: str
    namespace: str
    name: str
    run: Raw
    before: Raw


@dataclass(frozen=True)
class Verdict:
    """`code` 0: let in, with `message` as a warning where there is one. Else refused, with `message`."""

    result: Literal["allowed", "warned", "refused", "cold", "busy", "late", "error"]
    message: str = ""
    code: int = 0


ALLOWED = Verdict("allowed")


def read_review(body: bytes) -> Review:
    """Raises Malformed."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict) or (document.get("apiVersion"), document.get("kind")) != (API_VERSION, KIND):
        raise Malformed(f"the body is no {KIND} of {API_VERSION}")
    request = _mapping(document, "request")
    changes = request.get("operation") in CHANGES
    run = _mapping(request, "object") if changes else {}
    before = _mapping(request, "oldObject") if request.get("operation") == "UPDATE" else {}
    for raw in (each for each in (run, before) if each):
        _mapping(raw, "metadata")
    resource = request.get("resource")
    resource = resource if isinstance(resource, dict) else {}
    return Review(
        uid=_text(request, "uid"),
        operation=_text(request, "operation"),
        ours=(resource.get("group"), resource.get("resource")) == (GROUP, "trainingruns"),
        subresource=_text(request, "subResource", ""),
        namespace=_text(request, "namespace", ""),
        name=_text(request, "name", ""),
        run=run,
        before=before,
    )


def answer(uid: str, verdict: Verdict) -> dict[str, Any]:
    """The AdmissionReview that goes back."""
    response: dict[str, Any] = {"uid": uid, "allowed": not verdict.code}
    if verdict.code:
        reason = STATUS_REASONS.get(verdict.code, "")
        response["status"] = {"code": verdict.code, "reason": reason, "message": verdict.message}
    elif verdict.message:
        response["warnings"] = [_header_text(verdict.message)]
    return {"apiVersion": API_VERSION, "kind": KIND, "response": response}


def _mapping(raw: Raw, field: str) -> Raw:
    value = raw.get(field)
    if not isinstance(value, dict):
        raise Malformed(f"{field} is a {type(value).__name__}; must be an object")
    return value


def _text(raw: Raw, field: str, default: str | None = None) -> str:
    value = raw.get(field, default)
    if not isinstance(value, str):
        raise Malformed(f"request.{field} is a {type(value).__name__}; must be a string")
    return value


def _header_text(text: str) -> str:
    """Warnings travel in a header: one line of printable characters."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= LONGEST_WARNING else f"{line[: LONGEST_WARNING - 1]}…"
