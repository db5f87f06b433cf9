"""Do the quick tests catch bugs? Plants those of bugs.txt, one at a time, and runs the tests.

    python benchmarks/plant_bugs.py run --jobs 2            # all of them
    python benchmarks/plant_bugs.py run --only NAME NAME
    python benchmarks/plant_bugs.py draw grpo.py 54         # new ones: pip install cosmic-ray

A bug is planted in a copy of the files that git tracks. There the quick tests of all test files
that import the changed file run until one fails, those that name the changed function first. Before
that, the same tests must pass in a copy without a bug.
"""

import argparse
import ast
import contextlib
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIST = HERE / "bugs.txt"
LIMIT = 300  # seconds for one bug: some make the tests hang


@dataclass
class Bug:
    """A text of a function, what replaces it, and who thought of it."""

    name: str
    file: str
    function: str  # or a class
    origin: str  # drawn or hand
    old: str
    new: str
    equivalent: str = ""  # why the program is still right; empty: it is wrong


def read_bugs(path: Path) -> list[Bug]:
    """The bugs of a list, an empty line between two. The first line has a bug's name, file,
    function and origin. Then follow the text to replace, each of its lines after "- ", what
    replaces it, after "+ ", and for an equivalent bug the reason, after "= ". "#" is a comment."""
    bugs = []
    for paragraph in re.split("\n\n+", path.read_text(encoding="utf-8")):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        texts = []
        for mark in "-+=":
            texts.append("\n".join(line[2:] for line in lines[1:] if line[0] == mark))
        if lines:
            bugs.append(Bug(*lines[0].split(), *texts))
    return bugs


@functools.cache
def definitions(source: str) -> dict[str, tuple[int, int]]:
    """Functions and classes of a module: index of the first line, and of the one after the last."""
    nodes = ast.parse(source).body
    named = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: (node.lineno - 1, node.end_lineno or 0) for node in named}


def plant(source: str, bug: Bug) -> str:
    """The source with a bug. Raises ValueError, with the bug's name, unless the text to replace
    occurs exactly once in the bug's function, and the result is valid Python."""
    lines = source.splitlines(keepends=True)
    first, after = definitions(source).get(bug.function, (0, 0))
    body = "".join(lines[first:after])
    if body.count(bug.old) != 1:
        found = f"{body.count(bug.old)} times in {bug.function} of {bug.file}, not once"
        raise ValueError(f"{bug.name}: found {found}: {bug.old!r}")
    changed = body.replace(bug.old, bug.new)
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise ValueError(f"{bug.name}: {error}") from error
    return "".join([*lines[:first], changed, *lines[after:]])


def pytest_collection_modifyitems(items: list) -> None:
    """pytest, which loads this file as a plugin, calls this after it has found the tests: those
    that name the function come first."""
    items.sort(key=lambda item: os.environ["BUG_FUNCTION"] not in item.name)


def run_tests(root: Path, file: str, source: str, function: str, limit: float = LIMIT) -> str:
    """Run the quick tests in a copy of the tree whose `file` has this source. Returns the first
    that failed, or "". Raises ValueError if the tests could not be run."""
    tracked = subprocess.check_output(["git", "-C", root, "ls-files"], text=True).splitlines()
    imports = re.compile(rf"^\s*(import|from) {Path(file).stem}\b", re.MULTILINE)
    tests = [name for name in tracked if Path(name).match("test_*.py")]
    tests = [name for name in tests if imports.search((root / name).read_text(encoding="utf-8"))]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    settings = {"OMP_NUM_THREADS": "1", "GRPO_SLOW": "", "BUG_FUNCTION": function}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        for name in tracked:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tree / name)
        (tree / file).write_text(source, encoding="utf-8")
        process = subprocess.Popen(
            [*command, "-p", "plant_bugs", f"--basetemp={folder}/scratch", *tests],
            cwd=tree,
            env=os.environ | settings | {"PYTHONPATH": str(HERE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all processes that the tests started
            process.communicate()
            return f"no end within {limit:g} s"
    if process.returncode > 2 or not tests:  # 1: a test failed, 2: a file cannot be imported
        raise ValueError(f"no tests of {file} were run: {output[-300:]}")
    if process.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)
    return failed[1] if failed else f"pytest ended with {process.returncode}"


def try_bugs(root: Path, bugs: list[Bug], jobs: int) -> Iterator[str]:
    """Plant each bug. Yields a line for each, then one for each file. Raises ValueError if a bug
    cannot be planted, or if a test fails without any."""
    files = sorted({bug.file for bug in bugs})
    sources = {file: (root / file).read_text(encoding="utf-8") for file in files}
    planted = {bug.name: plant(sources[bug.file], bug) for bug in bugs}  # all are checked first
    for file in files:
        failed = run_tests(root, file, sources[file], "")
        if failed:
            raise ValueError(f"without a bug in {file} a test fails: {failed}")

    def outcome(bug: Bug) -> tuple[str, str]:
        if bug.equivalent:
            return "equivalent", bug.equivalent
        failed = run_tests(root, bug.file, planted[bug.name], bug.function)
        return "caught" if failed else "missed", failed

    counts: Counter = Counter()
    with ThreadPoolExecutor(jobs) as pool:
        for bug, (word, text) in zip(bugs, pool.map(outcome, bugs)):
            counts[bug.file, word] += 1
            yield f"{word:10}  {bug.name:30} {bug.function:21} {text}".rstrip()
    for file in files:
        words = ("caught", "missed", "equivalent")
        yield f"{file}: " + ", ".join(f"{counts[file, word]} {word}" for word in words)


def draw(source: str, file: str, count: int, seed: int) -> list[Bug]:
    """Draw `count` functions (or classes) of a file, in each of them a place that cosmic-ray can
    change, and one of its changes there. Raises ImportError where it is not installed."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    changes: Any = defaultdict(list)  # (line, column): operators, each with its own number of it
    nodes = [*ast_nodes(get_ast(source))]
    for name in plugins.operator_names():
        operator = plugins.get_operator(name)
        if operator.arguments():  # it would have to be told which variables to exchange
            continue
        starts = [start for node in nodes for start, _ in operator().mutation_positions(node)]
        for number, start in enumerate(starts):
            changes[start].append((operator(), number))
    places = {}
    for function, (first, after) in definitions(source).items():
        own = [place for place in sorted(changes) if first < place[0] <= after]
        if own:
            places[function] = own
    chosen = random.Random(f"{seed} {file}").sample([*places], min(count, len(places)))
    bugs = []
    for function in sorted(chosen, key=[*places].index):
        rng = random.Random(f"{seed} {file} {function}")  # whatever else the file holds
        planted, changed = "", None
        while planted != changed:  # the text may not be unique, the change no valid Python
            operator, number = rng.choice(changes[rng.choice(places[function])])
            changed = mutate_code(source, operator, number)
            pairs = zip(source.splitlines(), changed.splitlines())
            old, new = next((a.strip(), b.strip()) for a, b in pairs if a != b)
            bug = Bug(f"drawn-{function}", file, function, "drawn", old, new)
            with contextlib.suppress(ValueError):
                planted = plant(source, bug)
        bugs.append(bug)
    return bugs


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    bugs = {bug.name: bug for bug in read_bugs(LIST)}
    parser = argparse.ArgumentParser("plant_bugs.py", description=str(__doc__).splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="plant the bugs of the list, and test")
    run.add_argument("--only", metavar="NAME", nargs="+", choices=bugs, help="these bugs alone")
    run.add_argument("--jobs", type=int, default=1, help="bugs tested at a time (default: 1)")
    new = actions.add_parser("draw", help="print new bugs in functions drawn from a file")
    new.add_argument("file")
    new.add_argument("count", type=int, help="number of functions, with one bug in each")
    new.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args(arguments)
    try:
        if args.action == "draw":
            source = (HERE.parent / args.file).read_text(encoding="utf-8")
            for bug in draw(source, args.file, args.count, args.seed):
                print(bug.name, bug.file, bug.function, bug.origin)
                print(f"- {bug.old}\n+ {bug.new}\n")
        else:
            chosen = [bugs[name] for name in args.only or bugs]
            for line in try_bugs(HERE.parent, chosen, args.jobs):
                print(line, flush=True)
    except (ImportError, ValueError) as error:
        print(f"plant_bugs.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
