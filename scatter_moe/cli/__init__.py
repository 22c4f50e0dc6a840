"""The command `scatter-moe`.

    scatter-moe info                          versions, devices, tuning files, what transformers would run
    scatter-moe explain MODULE:FACTORY        what would be rewritten in the model that FACTORY() gives, and why not
    scatter-moe explain HF_CONFIG             the same for a model of transformers, without its weights

Exit codes: 0 as it should be; 1 something is left as it is (explain), or nobody reads what is printed to its end;
2 wrong usage, or the target can't be loaded.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from scatter_moe.cli import examine, info
from scatter_moe.cli.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code. `arguments` of None are the process's."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UsageError as error:
        print(f"scatter-moe: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except BrokenPipeError:  # `scatter-moe ... --json | head`; rich does the same for tables
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("scatter-moe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = commands.add_parser("info", help="versions, devices, tuning files, what transformers would run")
    about.set_defaults(run=_info)

    explain = commands.add_parser("explain", help="what would be rewritten in a model, and why not")
    explain.add_argument(
        "target",
        metavar="MODULE:FACTORY | HF_CONFIG",
        help="a function that returns (model, inputs), inputs a tuple or a dict;\n"
        "or a model type (mixtral), a config.json, its folder, or a name on the Hugging Face hub",
    )
    explain.add_argument("--layers", type=_positive, default=4, help="of an HF_CONFIG, at most this many layers (4)")
    explain.add_argument("--tokens", type=_positive, default=16, help="of an HF_CONFIG, the length of the input (16)")
    explain.add_argument("--device", default="meta", help="of an HF_CONFIG; meta computes nothing and needs no memory")
    explain.add_argument("--experts", help="of an HF_CONFIG, transformers' experts_implementation (its own default)")
    explain.set_defaults(run=_explain)

    for command in (about, explain):
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepted are whole numbers from 1 on")
    return int(text)


def _info(options: argparse.Namespace) -> int:
    found = info.collect()
    if options.json:
        _print_json(found)
    else:
        from scatter_moe.cli import tables

        tables.print_info(found)
    return 0


def _explain(options: argparse.Namespace) -> int:
    if options.json:
        outcome = examine.run(options, announce=lambda step: None)
        _print_json(outcome.as_dict())
    else:
        from scatter_moe.cli import tables

        with tables.progress() as announce:
            outcome = examine.run(options, announce)
        tables.print_outcome(outcome)
    return 0 if outcome.all_rewritten else 1


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2), flush=True)  # noqa: T201
