"""Installs the package as a user does and runs what the documentation says: python -m tests.clean_environment.

A new virtual environment gets `pip install .` with everything that the documentation uses. The commands of the
documentation, its code blocks and the examples then run in a folder that has none of the packages.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "pyproject.toml", "docs", "examples", "tests")
COPIED += ("benchmarks",)
COMMAND = re.compile(r"^    (scatter-moe .*)$|`(scatter-moe [^A-Z`|]*)`", re.MULTILINE)  # capitals stand for something
FACTORY = "from tests.cli.factories import rewritten as make\n"  # of the model that the documentation speaks of


def commands() -> list[list[str]]:
    """The command lines that the documentation shows, each once."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = (own or inline for page in pages for own, inline in COMMAND.findall(page.read_text()))
    return [shlex.split(line) for line in dict.fromkeys(found)]


def install(folder: Path) -> Path:
    """A new environment; where its programs are."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run([*pip, f"{ROOT}[dev]"], ROOT, {})
    return programs


def checkout_without_packages(folder: Path) -> None:
    for name in COPIED:
        source, target = ROOT / name, folder / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (folder / "my_package").mkdir()
    (folder / "my_package" / "my_model.py").write_text(FACTORY)


def run(command: list, folder: Path, environment: dict[str, str]) -> None:
    """What it prints is shown as it comes."""
    print(f"$ {shlex.join(map(str, command))}", flush=True)
    start = time.perf_counter()
    result = subprocess.run(command, cwd=folder, env=os.environ | environment)
    print(f"{time.perf_counter() - start:.0f} s, exit code {result.returncode}\n", flush=True)
    if result.returncode != 0:
        sys.exit(result.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="what pytest's -k chooses of code blocks and examples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "documentation"
        folder.mkdir()
        checkout_without_packages(folder)
        programs = install(Path(temporary) / "environment")
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        run(
            [programs / "python", "-c", "import scatter_moe; assert 'environment' in scatter_moe.__file__"],
            folder,
            environment,
        )
        for program, *arguments in commands():
            run([programs / program, *arguments], folder, environment)
        chosen = ["-k", f"(code_blocks or example) and ({options.only or 'test'})"]
        tests = ["-m", "pytest", "-v", "tests/test_docs.py", "tests/test_examples.py", *chosen]
        run([programs / "python", *tests], folder, environment)


if __name__ == "__main__":
    main()
