"""The generated documentation says what the code says, and links inside the documentation lead somewhere."""

import re
from pathlib import Path

import pytest

from docs import generate

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", generate.pages(), ids=lambda page: page.path.name)
def test_generated_page_is_up_to_date(page):
    assert page.path.read_text() == page.text, "run `make docs`"


def test_markers_are_required():
    with pytest.raises(ValueError, match="expected one line"):
        generate.between_markers("no markers here", "ops", "content")


def test_text_around_markers_is_kept():
    begin, end = generate.BEGIN.format("x"), generate.END.format("x")
    assert generate.between_markers(f"before {begin} old {end} after", "x", "new") == (
        f"before {begin}\n\nnew\n\n{end} after"
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing
