"""Draws many programs, runs each as it is and under our backend, and prints what became of them.

    python -m tests.adversarial --programs 5000 --seed 0 --jobs 60
    python -m tests.adversarial --each --seed 0 --jobs 60                  every loop with every mutation instead
    python -m tests.adversarial --program '{"router": "softmax", "loop": "hits", ...}'       one again, with its source

A program fails if outputs, gradients, buffers, Python state or the random numbers that it draws change. Each failure is
printed with the command that runs it again; the command exits with 1 then.
"""

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.adversarial.check import FAILED, OUTCOMES, Verdict, check, draw, each_mutation
from tests.adversarial.programs import LOOPS, Program
from tests.processes import run_all

CHUNK = 25  # programs a process: an import costs as much as a few of them
SECONDS_A_PROGRAM = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=100, help="how many are drawn")
    parser.add_argument("--each", action="store_true", help="every loop and addition with every mutation, once")
    parser.add_argument("--seed", type=int, default=0, help="which are drawn")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes at a time")
    parser.add_argument("--json", help="append a line for each program to this file")
    parser.add_argument("--program", help="run this one alone, here")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # a JSON list of programs, with verdicts as JSON on stdout
    arguments = parser.parse_args()
    if arguments.program:
        return run_one(program_of(json.loads(arguments.program)))
    if arguments.here:
        return run_here([program_of(fields) for fields in json.loads(arguments.here)])
    programs = each_mutation(arguments.seed) if arguments.each else draw(arguments.programs, arguments.seed)
    verdicts = run_in_processes(programs, arguments.jobs)
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.writelines(json.dumps(asdict(verdict)) + "\n" for verdict in verdicts)
    show(verdicts, arguments.seed)
    return int(any(verdict.outcome == FAILED for verdict in verdicts))


def program_of(fields: dict) -> Program:
    return Program(**fields | {"mutations": tuple(fields["mutations"])})


def run_one(program: Program) -> int:
    print(program.source())
    with tempfile.TemporaryDirectory() as directory:
        verdict = check(program, Path(directory))
    print(f"{verdict.outcome} {verdict.detail}")
    return int(verdict.outcome == FAILED)


def run_here(programs: list[Program]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        for program in programs:
            print(json.dumps(asdict(check(program, Path(directory)))), flush=True)
    return 0


def run_in_processes(programs: list[Program], jobs: int) -> list[Verdict]:
    chunks = [programs[start : start + CHUNK] for start in range(0, len(programs), CHUNK)]
    commands = [["-m", "tests.adversarial", "--here", json.dumps([asdict(p) for p in chunk])] for chunk in chunks]
    verdicts: list[Verdict] = []
    for finished in run_all(commands, jobs=jobs, timeout=CHUNK * SECONDS_A_PROGRAM):
        chunk = chunks[finished.number]
        verdicts += [Verdict(program_of(line["program"]), line["outcome"], line["detail"]) for line in finished.lines]
        verdicts += [Verdict(program, FAILED, finished.fault) for program in chunk[len(finished.lines) :]]
        told = ", ".join(f"{number} {outcome}" for outcome, number in tally(verdicts).items() if number)
        print(f"[{len(verdicts)}/{len(programs)}] {told}", file=sys.stderr, flush=True)
    return verdicts


def tally(verdicts: list[Verdict]) -> dict[str, int]:
    counted = Counter(verdict.outcome for verdict in verdicts)
    return {outcome: counted[outcome] for outcome in OUTCOMES}


def show(verdicts: list[Verdict], seed: int) -> None:
    """The failures, then what became of the programs with each loop: one that is never rewritten tests nothing."""
    for verdict in verdicts:
        if verdict.outcome == FAILED:
            print(f"{FAILED}: {verdict.detail}")
            print(f"    python -m tests.adversarial --program '{json.dumps(asdict(verdict.program))}'")
    print(f"{len(verdicts)} programs, seed {seed}")
    by_loop = {loop: [v for v in verdicts if v.program.loop == loop] for loop in LOOPS}
    width = max(map(len, LOOPS))
    print(f"| {'loop':{width}} | " + " | ".join(OUTCOMES) + " |")
    print("|".join(["", "-" * (width + 2), *("-" * (len(outcome) + 1) + ":" for outcome in OUTCOMES), ""]))
    for name, those in {**by_loop, "all": verdicts}.items():
        numbers = (f"{number:{len(outcome)}}" for outcome, number in tally(those).items())
        print(f"| {name:{width}} | " + " | ".join(numbers) + " |")


if __name__ == "__main__":
    sys.exit(main())
