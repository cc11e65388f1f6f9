"""The reference page names every field, and its example runs."""

from atelier_api import docgen
from atelier_api.families import FAMILIES
from atelier_api.fields import tree, walk
from atelier_api.read import parse_run


def test_the_example_is_a_valid_run() -> None:
    assert parse_run(docgen.EXAMPLE, "example").metadata.name == "pixel-knight"
    assert docgen.EXAMPLE in docgen.text()


def test_every_field_stands_in_the_table_of_its_block() -> None:
    sections = {part.split("\n", 1)[0].strip("`"): part for part in docgen.text().split("\n## ")}
    for path, node in walk(tree()):
        block, _, name = path.rpartition(".")
        if name.endswith(("[]", "{}")):
            continue
        row = next(line for line in sections[block or "The file"].splitlines() if line.startswith(f"| `{name}` |"))
        assert node.description in row


def test_every_family_and_flavour_is_listed() -> None:
    page = docgen.text()
    for facts in FAMILIES.values():
        assert f"| `{facts.name}` | {facts.title} |" in page
        assert all(f"`{flavour.name}`" in page for flavour in facts.flavours)


def test_rows_of_a_table_have_as_many_cells_as_its_head() -> None:
    width = 0
    for line in docgen.text().splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = line.replace("\\|", "").count("|")
        width = width or cells
        assert cells == width, line
