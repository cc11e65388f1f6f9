"""`spec.model`: the base model that a run starts from."""

from pydantic import Field

from atelier_api.v1alpha1.base import Block


class ModelSpec(Block):
    """The base model."""

    family: str = Field(description="Model family, one of `atelier models`.", min_length=1, max_length=63)
    flavour: str | None = Field(
        default=None,
        description="Published size or variant of the family, for the memory prediction. Default: the family's first one. Ignored for a local folder, whose own files are read.",
        max_length=63,
    )
    source: str = Field(
        description="Where the checkpoint lies, laid out as a hub repository: a local folder, or `hf://owner/name` (optionally `@revision`), whose snapshot must be in the hub's cache on this machine.",
        min_length=1,
        max_length=2048,
    )
    revision: str | None = Field(default=None, description="Commit or tag of a hub repository.", max_length=128)
