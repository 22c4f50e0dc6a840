"""The documentation says what the code says: generated pages are up to date, links lead somewhere, code blocks run.

A block that a test can't run says why in the line before it: `<!-- not run: hub -->`.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    prose = re.sub(r"^```.*?^```$|^    .*?$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", prose)
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


BLOCK = re.compile(r"^(?:<!-- not run: ([a-z ]+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REASONS = {"fragment", "gpu", "hub", "shown"}
# What a block may assume: README's says "model" and "inputs" without making them.
ASSUMED = {"README.md": "from tests.cli.factories import rewritten\nmodel, inputs = rewritten()\n"}


def blocks(document: Path) -> list[tuple[str | None, str, int]]:
    """Of each Python block: why it isn't run, its code, and the lines before it."""
    text = document.read_text()
    return [(m[1], m[2], text.count("\n", 0, m.start(2))) for m in BLOCK.finditer(text)]


def script(document: Path) -> str:
    """The blocks that are run, one after the other as on the page, each line at its line number."""
    lines: list[str] = []
    for reason, code, before in blocks(document):
        if reason is None:
            lines += [""] * (before - len(lines)) + code.splitlines()
    return "\n".join(lines) + "\n"


def test_reasons_not_to_run_a_block_are_known():
    assert {reason for document in DOCUMENTS for reason, _, _ in blocks(document)} <= REASONS | {None}


def test_every_python_block_is_found():
    for document in DOCUMENTS:
        assert document.read_text().count("```python") == len(blocks(document)), document


@pytest.mark.parametrize(
    "document",
    [document for document in DOCUMENTS if any(reason is None for reason, _, _ in blocks(document))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_code_blocks_run(document, tmp_path, monkeypatch):
    torch.compiler.reset()
    torch.manual_seed(0)
    path = tmp_path / f"{document.stem}.py"
    path.write_text(script(document))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assumed: dict = {}
    exec(ASSUMED.get(document.name, ""), assumed)
    runpy.run_path(str(path), init_globals={name: assumed[name] for name in assumed if not name.startswith("__")})


def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("mkdocs", reason="the site is built with mkdocs-material, which is not installed here")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "grid" in (tmp_path / "site" / "gallery" / "index.html").read_text()
