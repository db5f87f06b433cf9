"""Tests of plant_bugs.py, and of the list of bugs: each can still be planted."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import plant_bugs  # noqa: E402
from plant_bugs import Bug  # noqa: E402
from test_analyze import slow  # noqa: E402

BUGS = plant_bugs.read_bugs(plant_bugs.LIST)
FILES = ("grpo.py", "analyze.py")
CALC = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
CAUGHT = Bug("thrice", "calc.py", "double", "hand", "2", "3")


def test_list_has_bugs_that_can_be_planted():
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
    errors = []  # all of them: an edit of the code may move several
    for bug in BUGS:
        try:
            assert plant_bugs.plant(sources[bug.file], bug) != sources[bug.file], bug.name
        except ValueError as error:
            errors.append(str(error))
    assert errors == []
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def test_list_has_a_bug_in_every_function():
    source = (ROOT / "grpo.py").read_text(encoding="utf-8")
    changed = {bug.function for bug in BUGS if bug.file == "grpo.py"}
    assert {*plant_bugs.definitions(source)} - changed == {"Batch"}  # it holds data alone


def test_read_bugs_keeps_indented_lines_and_reasons(tmp_path):
    path = tmp_path / "bugs.txt"
    path.write_text(
        "# two bugs\n\n\nthrice calc.py double hand\n- 2\n+ 3\n\n"
        "nothing calc.py half drawn\n-     a\n-\n-   b\n= no test sees it\n"
    )
    nothing = Bug("nothing", "calc.py", "half", "drawn", "    a\n\n  b", "", "no test sees it")
    assert plant_bugs.read_bugs(path) == [CAUGHT, nothing]


def test_plant_changes_the_named_function_alone():
    planted = plant_bugs.plant(CALC, CAUGHT)  # the other function has a 2, too
    assert planted == "def double(x):\n    return 3 * x\n\n\ndef half(x):\n    return x / 2\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": "4"}, "thrice: found 0 times in double of calc.py, not once: '4'"),
        ({"old": "x"}, "thrice: found 2 times in double of calc.py, not once: 'x'"),
        ({"function": "triple"}, "thrice: found 0 times in triple of calc.py, not once: '2'"),
        ({"new": "2 2"}, "thrice: invalid syntax"),
    ],
)
def test_plant_refuses_a_bug_without_one_place(changes, message):
    with pytest.raises(ValueError, match=message):
        plant_bugs.plant(CALC, replace(CAUGHT, **changes))


def test_try_bugs_tells_caught_missed_and_equivalent_ones_apart(tmp_path, monkeypatch):
    def run_tests(root, file, source, function):  # whose tests look at double alone
        return "" if "2 * x" in source else "test_double"

    monkeypatch.setattr(plant_bugs, "run_tests", run_tests)
    (tmp_path / "calc.py").write_text(CALC)
    missed = Bug("third", "calc.py", "half", "hand", "2", "3")
    same = replace(CAUGHT, name="same", new="2.0", equivalent="2.0 equals 2")
    said = plant_bugs.try_bugs(tmp_path, [CAUGHT, missed, same], jobs=2)
    assert [" ".join(line.split()) for line in said] == [
        "caught thrice double test_double",
        "missed third half",
        "equivalent same double 2.0 equals 2",
        "calc.py: 1 caught, 1 missed, 1 equivalent",
    ]
    (tmp_path / "calc.py").write_text(CALC.replace("2 *", "5 *"))
    with pytest.raises(ValueError, match="without a bug in calc.py a test fails: test_double"):
        list(plant_bugs.try_bugs(tmp_path, [missed], jobs=1))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with a module, two tests of it, and a test file that does not import it."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # twice as quick
    tests = "import calc\n\n\ndef test_half():\n    assert calc.half(6) == 3\n\n\n"
    tests += "def test_double():\n    assert calc.double(2) == 4\n"
    for name, text in {"calc": CALC, "test_calc": tests, "test_other": "assert False"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    for command in ("init", "add ."):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True, capture_output=True)
    return tmp_path


@slow
def test_run_tests_begins_with_those_that_name_the_function(tree):
    wrong = CALC.replace("2", "3")  # both tests fail
    assert plant_bugs.run_tests(tree, "calc.py", wrong, "double") == "test_calc.py::test_double"


@slow
def test_run_tests_finds_nothing_wrong_with_what_is_right(tree):
    assert plant_bugs.run_tests(tree, "calc.py", CALC, "double") == ""


@slow
def test_run_tests_that_hang_have_failed(tree):
    endless = CALC.replace("return 2 * x", "while True: pass")
    assert plant_bugs.run_tests(tree, "calc.py", endless, "double", 1) == "no end within 1 s"
