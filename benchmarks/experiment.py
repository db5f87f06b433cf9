"""The runs behind the results: grpo.py with other flags. Whole runs are kept, others resumed.

    python benchmarks/experiment.py letters        # the embedded task: four norms
    python benchmarks/experiment.py arith          # one skill in every problem
    python benchmarks/experiment.py foretell       # both on fresh seeds, progress in every step
    python benchmarks/experiment.py undo           # letters with less of AdamW
    python benchmarks/experiment.py rates          # learning rates, on seeds that nothing else uses
    python benchmarks/experiment.py norms          # each norm at its best rate; needs `rates`
    python benchmarks/experiment.py groups         # G = 4, 16, 64 at equal completions a step
    python benchmarks/experiment.py overlap        # letters that share one, two, all three digits
    python benchmarks/experiment.py neighbours     # the methods of neighbours.py
    python benchmarks/experiment.py drawn          # twenty tasks drawn anew, in four cells
    python benchmarks/experiment.py pretrained --model DIR --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/experiment.py ahead --model DIR --seeds 0 1 2   # the same starts, progress
    python benchmarks/experiment.py words --model DIR --svamp SVAMP.jsonl --seeds 0   # progress
    python benchmarks/experiment.py model --model DIR --svamp SVAMP.jsonl   # pairs of runs
    python benchmarks/experiment.py letters --pack  # no runs: their logs, thinned, into results/

Runs lie in OUT/STUDY/VARIANT/; tables.py prints what they say, and
`python analyze.py runs/experiment/letters/default/*` reports on them in full. SVAMP.jsonl (Patel et
al. 2021) has columns question, answer and equation; the first 700 problems train, the rest are held
out. Choose a rate for `model` by --lr and --seeds, on a seed that is not reported.
"""

import argparse
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]

import analyze  # noqa: E402

NORMS = ("none", "std", "var")
RATES = {
    "adamw": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3),
    "sgd": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
}
CLIP = {"adamw": 10, "sgd": 0}  # plain SGD has no clipping: it would act on the norms unequally
CHOOSING, COMPARING, TEN = (100, 101), (0, 1, 2, 3, 4), range(10)  # seeds
# Nothing is measured but pass rates; everything, in every step.
QUIET: dict[str, Any] = dict(measure_every=0, eval_every=0)
EVERY: dict[str, Any] = dict(measure_every=1, curvature=True)
PROGRESS: dict[str, Any] = dict(steps=120, measure_every=1, curvature=False, eval_every=0)
# What no table reads of the logs.
UNREAD = {"prompt", "scale", "prompt_grad_norm", "curvature_error", "logprob_gap", "lr"}
UNREAD |= {"seconds_rollout", "seconds_update", "tokens_per_second"}
# Of `drawn`: how many of three digits are one skill, and whether all letters start alike.
CELLS = {"separate-unequal": (0, False), "separate-equal": (0, True)}
CELLS |= {"shared-unequal": (3, False), "shared-equal": (3, True)}
Plan = Iterator[tuple[str, dict[str, Any]]]  # VARIANT/RUN, and its flags


# --------------------------------------------- Plans ----------------------------------------------


def paired(
    variant: str, norms: Sequence[str], seeds: Sequence[int] = COMPARING, **flags: Any
) -> Plan:
    """A run of each norm with each seed."""
    for seed in seeds:
        for norm in norms:
            yield f"{variant}/{norm}-{seed}", dict(norm=norm, seed=seed, **flags)


def letters(given: argparse.Namespace) -> Plan:
    """None, std and batch at the task's learning rate, and var for the first seeds; curvature of
    std alone, which is what the analysis reports."""
    for norm in ("none", "std", "batch"):
        flags = dict(measure_every=10, curvature=norm == "std")
        yield from paired("default", [norm], TEN, **flags)
    yield from paired("default", ["var"], measure_every=0)


def arith(given: argparse.Namespace) -> Plan:
    """The same where all prompts teach one skill."""
    yield from paired("default", NORMS[:2], TEN, task="arith", **EVERY)
    yield from paired("default", ["var"], task="arith", **EVERY)


def foretell(given: argparse.Namespace) -> Plan:
    """Fresh seeds of both embedded tasks, progress measured in every step."""
    for task in ("letters", "arith"):
        yield from paired(task, NORMS, range(40, 50), task=task, **PROGRESS)


def undo(given: argparse.Namespace) -> Plan:
    """Letters, to compare with AdamW in `foretell`: one second moment for all weights, at a rate at
    which 50 steps of none are as long (on seed 100), and plain SGD."""
    seeds = range(40, 45)
    more: dict[str, Any] = dict(task="letters", **PROGRESS)
    yield from paired("scalar", NORMS[:2], seeds, method="scalar", lr=1.77e-4, **more)
    for lr in (0.025, 0.05):
        sgd = dict(optimizer="sgd", max_grad_norm=0, lr=lr)
        yield from paired(f"sgd-{lr}", NORMS[:2], seeds, **sgd, **more)


def rates(given: argparse.Namespace) -> Plan:
    """Every norm and optimizer at several learning rates."""
    for optimizer, choices in RATES.items():
        for lr in choices:
            more: dict[str, Any] = dict(max_grad_norm=CLIP[optimizer], lr=lr, **QUIET)
            for name, flags in paired(optimizer, NORMS, CHOOSING, optimizer=optimizer, **more):
                yield f"{name}-{lr:g}", flags


def norms(given: argparse.Namespace) -> Plan:
    """Every norm and optimizer at its best rate."""
    for optimizer in RATES:
        for norm in NORMS:
            more: dict[str, Any] = dict(max_grad_norm=CLIP[optimizer])
            more["lr"] = best_rate(given.out, optimizer, norm)
            yield from paired(optimizer, [norm], optimizer=optimizer, **more)


def groups(given: argparse.Namespace) -> Plan:
    """Group sizes at 256 completions a step, at the task's learning rate."""
    for group in (4, 16, 64):
        yield from paired(f"{group}", NORMS[:2], group=group, prompts=256 // group, **QUIET)


def overlap(given: argparse.Namespace) -> Plan:
    """Letters with a part of the skill in common, by the number of digits; `letters` and `arith`
    are the two ends."""
    import make_tasks

    for shared in (1, 2, 3):
        folder = given.out / "tasks" / f"letters-{shared}"
        if not (folder / "model" / "tokenizer.json").exists():  # written last
            make_tasks.make(make_tasks.make_letters(shared=shared), folder)
        files = dict(data=folder / "train.jsonl", eval_data=folder / "test.jsonl")
        flags = dict(task="letters", model=folder / "model", **files)
        yield from paired(f"{shared}-of-3", NORMS[:2], **flags, **EVERY)


def neighbours(given: argparse.Namespace) -> Plan:
    """The methods of neighbours.py (nsgd at its best of three rates on seed 100), and the clip that
    vespo replaces."""
    changes: dict[str, dict[str, Any]] = {"vl-norm": {}, "nsgd": dict(lr=0.1)}
    changes["vespo"] = dict(epochs=2)
    for method, flags in changes.items():
        yield from paired(method, ["std"], COMPARING[:3], method=method, **flags)
    yield from paired("two-epochs", ["std"], COMPARING[:3], epochs=2, **QUIET)


def model(given: argparse.Namespace) -> Plan:
    """A language model with adapters on word problems, after a warm start on their equations: none
    against std."""
    start, flags = word_problems(given, "svamp")
    flags |= dict(lr=given.lr, prompts=4, group=8, steps=given.steps, save_every=10)
    flags |= dict(eval_every=150, eval_problems=150)
    yield from paired(f"{start.name}-{given.lr:g}", NORMS[:2], given.seeds, **flags)


def words(given: argparse.Namespace) -> Plan:
    """The same model from the same start, with groups large enough to measure progress in; GSM8K's
    completions take six times the tokens, so fewer of them, and every step measured."""
    more: dict[str, Any] = dict(curvature=False, eval_every=0, lr=1e-5, eval_problems=32)
    more["micro_batch"] = 2048  # a third faster with this vocabulary; logits of a gigabyte
    sizes: dict[str, dict[str, Any]] = {}
    sizes["svamp"] = dict(prompts=16, group=16, steps=40, measure_every=3, save_every=3)
    sizes["gsm8k"] = dict(prompts=8, group=8, steps=30, measure_every=1, save_every=1)
    for name, size in sizes.items():
        if getattr(given, name):
            start, flags = word_problems(given, name)
            flags |= more | size
            yield from paired(f"{name}-{start.name}", ["none"], given.seeds, **flags)


def word_problems(given: argparse.Namespace, name: str) -> tuple[Path, dict[str, Any]]:
    """The directory of a model warm-started on word problems, and the flags for them."""
    folder, instruction = given.out / "tasks" / name, "Question: {question}\nAnswer:"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in map(json.loads, getattr(given, name).read_text(encoding="utf-8").splitlines()):
        if name == "svamp":
            equation = re.sub(r"(\d+)\.0\b", r"\1", row["equation"])
            equation = equation.replace("( ", "(").replace(" )", ")")
            if equation.count("(") == 1:  # around all of it
                equation = equation.strip("()")
            solution = f"{equation} = {row['answer']}\n#### {row['answer']}"
        else:
            solution = re.sub(r"<<.*?>>", "", row["answer"])  # GSM8K's notes for a calculator
        rows.append({**row, "solution": solution})
    parts = {"train": rows[:700], "test": rows[700:]} if name == "svamp" else {"train": rows}
    for part, chosen in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    start = folder / Path(given.model).name
    # As many solutions of both: sixteen of GSM8K's at once, and their logits, exceed 20 GB.
    sizes = ("--steps=16", "--batch=16") if name == "svamp" else ("--steps=64", "--batch=4")
    instructed = f"--instruction={instruction}"
    warm_start(given.model, folder / "train.jsonl", start, instructed, *sizes)
    flags: dict[str, Any] = dict(task="gsm8k", model=start, instruction=instruction, chat=False)
    flags |= dict(data=folder / "train.jsonl", lora=64, dtype="bfloat16")
    flags["max_new_tokens"] = 28 if name == "svamp" else 256
    flags["max_grad_norm"] = 0  # a limit would act on std's larger gradients alone
    if name == "svamp":
        flags["eval_data"] = folder / "test.jsonl"
    return start, flags


def drawn(given: argparse.Namespace) -> Plan:
    """Five tasks in each cell, drawn from seeds of their own; batch tells std's common rate from
    what it does between prompts."""
    for k, (cell, kind) in enumerate(CELLS.items()):
        for n in range(5):
            folder = draw_task(given.out / "tasks", cell, 5 * k + n + 1, *kind)
            flags = dict(task="letters", model=folder / "model", data=folder / "train.jsonl")
            flags |= dict(eval_data=folder / "test.jsonl", **QUIET)
            yield from paired(f"{cell}/{folder.name}", ("none", "std", "batch"), (0, 1), **flags)


def draw_task(out: Path, cell: str, seed: int, shared: int, equal: bool) -> Path:
    """The directory of a task whose letters start within 0.1 of the intended pass rates. If a seed
    misses, its task stays, for the record, and the seed 20 above it is tried next."""
    import make_tasks

    while True:
        folder = out / cell / f"{seed}"
        if not (folder / "model" / "tokenizer.json").exists():  # written last
            task = make_tasks.make_letters(seed, shared, equal)
            make_tasks.make(task, folder, seed)
        skills = make_tasks.draw_skills(seed, equal)
        meant = pd.Series({letter: rate**3 for letter, (*_, rate) in skills.items()})
        rates = start_rates(folder)
        (folder / "start.json").write_text(pd.DataFrame({"meant": meant, "is": rates}).to_json())
        if (rates - meant).abs().max() <= 0.1:
            return folder
        seed += 20


def start_rates(folder: Path, samples: int = 8) -> pd.Series:
    """By letter the pass rate of a task's model on its held-out problems, sampled at temperature
    1."""
    import torch

    import grpo

    config = grpo.Config(task="letters", model=f"{folder / 'model'}", chat=False, device="cpu")
    config = grpo.resolve(config)
    policy = grpo.load_policy(config)
    rates = []
    rows = grpo.load_rows(f"{folder / 'test.jsonl'}", False)
    problems = grpo.encode_problems(rows, policy, config)
    seeded = torch.Generator().manual_seed(0)
    for start in range(0, len(problems), 16):
        part = problems[start : start + 16]
        uniforms = torch.rand(len(part), samples, config.max_new_tokens, generator=seeded)
        batch = grpo.rollout(policy, [problem.prompt for problem in part], uniforms, 1.0)
        rewards, _ = grpo.score(policy, batch, part, grpo.exact_match)
        rates += rewards.mean(dim=1).tolist()
    return pd.Series(rates).groupby([problem.level for problem in problems]).mean()


def pretrained(given: argparse.Namespace) -> Plan:
    """Letters, and letters that share all digits, in a language model that learned them in a warm
    start, slips included: none against std, training all weights; with adapters, letters alone.
    Not planned beforehand: batch, for a few seeds of letters."""
    starts = [pretrained_start(given, shared) for shared in (0, 3)]
    flags = dict(task="letters", chat=False, max_grad_norm=0, dtype="bfloat16", steps=120)
    flags |= dict(measure_every=10, curvature=False, eval_every=0, save_every=40)
    both = []
    for folder in starts:
        files = dict(data=folder / "train.jsonl", eval_data=folder / "test.jsonl")
        both.append(flags | files | dict(model=folder / "model"))
    for seed in given.seeds:  # in turn, so that a part of the study already compares the tasks
        for folder, of_task in zip(starts, both):
            yield from paired(folder.name, NORMS[:2], [seed], lr=7e-6, **of_task)
    yield from paired("letters-lora", NORMS[:2], given.seeds[:5], lr=1e-4, lora=64, **both[0])
    yield from paired("letters-batch", ["batch"], given.seeds[:6], lr=7e-6, **both[0])


def ahead(given: argparse.Namespace) -> Plan:
    """From the same warm starts, none alone, with progress measured: what it foretells. The control
    is solved by step 40."""
    starts = [pretrained_start(given, shared) for shared in (0, 3)]
    flags = dict(task="letters", chat=False, max_grad_norm=0, dtype="bfloat16")
    flags |= dict(measure_every=5, curvature=False, eval_every=0, eval_problems=32, save_every=20)
    for folder, steps in zip(starts, (60, 40)):
        files = dict(data=folder / "train.jsonl", eval_data=folder / "test.jsonl")
        more = dict(lr=7e-6, model=folder / "model", steps=steps)
        yield from paired(folder.name, ["none"], given.seeds, **more, **files, **flags)


def pretrained_start(given: argparse.Namespace, shared: int) -> Path:
    """The directory of a language model warm-started on letters of which the first `shared` digits
    are one skill, with its problems."""
    import make_tasks

    folder = given.out / "tasks" / f"{Path(given.model).name}-{shared}-of-3"
    task = make_tasks.make_letters(shared=shared)
    make_tasks.write_problems(task, folder)
    solved = (json.dumps(dict(question=q, solution=a)) + "\n" for q, a in task.solutions)
    (folder / "solved.jsonl").write_text("".join(solved), encoding="utf-8")
    sizes = ("--steps=300", "--batch=64", "--lr=1e-4", "--dtype=bfloat16")
    warm_start(given.model, folder / "solved.jsonl", folder / "model", *sizes)
    return folder


def warm_start(model: str, data: Path, out: Path, *flags: str) -> None:
    """A directory made by warm_start.py, whole or not there."""
    unfinished = out.with_name("unfinished")
    if not out.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        script = [sys.executable, HERE / "warm_start.py", model, data, unfinished]
        subprocess.run([*map(str, script), "--no-chat", *flags], check=True)
        unfinished.rename(out)


# -------------------------------------------- Running ---------------------------------------------


def run(path: Path, flags: dict[str, Any], jobs: int) -> str:
    """Make one run, or what is missing of it; returns a line on how it ended."""
    if (path / "model").exists() and not (path / "checkpoint").exists():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        differ = []
        for key, value in flags.items():
            wanted = str(value) if isinstance(value, Path) else value
            # Runs of an earlier grpo.py lack settings of what is measured, which alters no run.
            if key in config and config[key] != wanted:
                differ.append(key)
        if differ:
            return f"{path}: there already, but made with another {', '.join(differ)}: remove it"
        return f"{path}: there already"
    method = flags.get("method", "")
    path.parent.mkdir(parents=True, exist_ok=True)
    script = [HERE / "neighbours.py", method] if method else [HERE.parent / "grpo.py"]
    command = [sys.executable, *script]
    command += [f"--{key}={value}" for key, value in flags.items() if key != "method"]
    command += [f"--out={path}", *(["--resume"] if (path / "config.json").exists() else [])]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with Path(f"{path}.txt").open("a") as log:
        ended = subprocess.run(command, stdout=log, stderr=log, env=threads | os.environ)
    if ended.returncode == 0:
        shutil.rmtree(path / "checkpoint")  # what remains is a whole run
    return f"{path}: exit status {ended.returncode}"


def pack(folder: Path) -> None:
    """Write results/STUDY.tar.xz: settings and logs of the study's whole runs, without what no
    table reads, and numbers with four significant digits, of gradients with three."""
    with tarfile.open(HERE / "results" / f"{folder.name}.tar.xz", "w:xz") as archive:
        for model in sorted(folder.glob("*/*/model")):
            for name in ("config.json", "metrics.jsonl", "prompts.jsonl"):
                text = (model.parent / name).read_text(encoding="utf-8")
                if name == "config.json":  # as if made in the default place
                    text = text.replace(f"{folder.parent}/", "runs/experiment/")
                else:
                    text = "".join(f"{thinned(line)}\n" for line in text.splitlines())
                entry = tarfile.TarInfo(f"{(model.parent / name).relative_to(folder.parent)}")
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
            mark = tarfile.TarInfo(f"{model.relative_to(folder.parent)}")
            mark.type = tarfile.DIRTYPE  # a run with a model is whole
            mark.mode = 0o755
            archive.addfile(mark)


def thinned(line: str) -> str:
    """A line of a log, for `pack`."""
    row = {key: value for key, value in json.loads(line).items() if key not in UNREAD}
    for key, value in row.items():
        digits = 3 if key.startswith(("progress", "grad", "curvature", "fisher")) else 4
        if isinstance(value, float):
            row[key] = float(f"{value:.{digits}g}")
        elif isinstance(value, list):
            row[key] = [x if x is None else float(f"{x:.{digits}g}") for x in value]
    return json.dumps(row)


def whole_runs(folder: Path) -> list[analyze.Run]:
    """The runs in a variant's folder that have come to their end."""
    return [analyze.read_run(path.parent) for path in sorted(folder.glob("*/model"))]


@functools.cache
def best_rate(out: Path, optimizer: str, norm: str) -> float:
    """The rate with the highest mean training pass rate, over steps and seeds, among those that
    have all their runs in `rates`."""
    table = analyze.tabulate(whole_runs(out / "rates" / optimizer))
    means = table[table["norm"] == norm].groupby("lr")["rate"].agg(["mean", "size"])
    whole = means.loc[means["size"] == len(CHOOSING), "mean"]
    if whole.empty:
        missing = f"no learning rate has all its runs in {out}/rates: run `rates` first"
        sys.exit(f"experiment.py: error: {missing}")
    return float(whole.idxmax())


def main() -> None:
    """The command line."""
    toys = (letters, arith, foretell, undo, rates, norms, groups, overlap, neighbours, drawn)
    plans = {plan.__name__: plan for plan in (*toys, pretrained, ahead, words, model)}
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=about)
    add = parser.add_argument
    add("study", choices=[*plans])
    add("--out", type=Path, default=Path("runs/experiment"), help="where the runs lie")
    add("--pack", action="store_true", help="no runs: pack the logs of those made into results/")
    add("--jobs", type=int, default=2, help="runs at a time, which share the cores")
    add("--model", help="of studies of language models: directory or hub name")
    add("--svamp", type=Path, help="of model and words: JSONL file of SVAMP")
    add("--gsm8k", type=Path, help="of words: JSONL file of GSM8K")
    add("--lr", type=float, default=1e-5, help="of model")
    add("--steps", type=int, default=150, help="of model")
    add("--seeds", type=int, nargs="+", default=COMPARING[:3], help="of language models")
    given = parser.parse_args()
    folder = given.out / given.study
    if given.pack:
        pack(folder)
        return
    if given.study in ("model", "words", "pretrained", "ahead") and not given.model:
        parser.error(f"{given.study} needs --model")
    if given.study == "model" and not given.svamp:
        parser.error("model needs --svamp FILE.jsonl")
    if given.study == "words" and not (given.svamp or given.gsm8k):
        parser.error("words needs --svamp FILE.jsonl or --gsm8k FILE.jsonl")
    for file in (given.svamp, given.gsm8k):
        if file and not file.is_file():
            parser.error(f"no file {file}")
    failed = False

    def make(entry: tuple[str, dict[str, Any]]) -> str:
        return run(folder / entry[0], entry[1], given.jobs)

    with ThreadPoolExecutor(given.jobs) as pool:
        for line in pool.map(make, plans[given.study](given)):
            print(line, flush=True)
            failed = failed or not line.endswith(("exit status 0", "there already"))
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the runs have stopped with a checkpoint
        sys.exit(130)
