"""What the pages say can be followed: links lead somewhere, every command line is taken by the
script's own parser, and the README's Python runs. `GRPO_SLOW=1 pytest` runs the last two."""

import argparse
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import grpo  # noqa: E402

slow = pytest.mark.skipif(not os.environ.get("GRPO_SLOW"), reason="slow: set GRPO_SLOW=1")

PAGES = ["README.md", "benchmarks/README.md", "benchmarks/reference.md", "grpo.py"]
SCRIPTS = "experiment", "tables", "make_tasks", "warm_start", "vs_trl", "neighbours"
PAGES += [f"benchmarks/{name}.py" for name in SCRIPTS]
COMMAND = re.compile(
    r"(?:python|torchrun --nproc_per_node 2) ((?:benchmarks/)?\w+\.py)([^\n;&|#`]*)"
)
LOOPS = {"$study": "letters", "$n": "std", "$s": "1"}  # what stands for one value after another
texts = [re.sub(r"\\+\n", " ", (ROOT / page).read_text(encoding="utf-8")) for page in PAGES]
commands = {command for text in texts for command in COMMAND.findall(text)}


class Parsed(Exception):
    """The command line has been taken; nothing else is to happen."""


@slow
@pytest.mark.parametrize(("script", "arguments"), sorted(commands))
def test_every_command_line_is_one(script, arguments, monkeypatch):
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(parser, *given):
        _, unknown = parse(parser, *given)  # exits with 2 where it does not take them
        if unknown:
            parser.error(f"unrecognized arguments: {unknown}")
        raise Parsed

    for name, value in LOOPS.items():
        arguments = arguments.replace(name, value)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    monkeypatch.setattr("signal.signal", lambda number, act: None)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments)])
    for name, value in vars(grpo).items():  # neighbours.py replaces functions
        monkeypatch.setattr(grpo, name, value)
    with pytest.raises((Parsed, SystemExit)) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.args or ended.value.args == (0,)  # --help


@pytest.mark.parametrize("page", PAGES[:3])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)(.*?)\)", (ROOT / page).read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        headings = (
            re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M) if anchor else []
        )
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target


def save_byte_model(path: Path) -> None:
    """A model of two layers that takes any text, byte by byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({"<end>": 0} | {c: i for i, c in enumerate(letters, 1)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>").save_pretrained(path)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=257, eos_token_id=0, bos_token_id=0, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)


@slow
def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_byte_model(tmp_path / "model")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    train, copy = re.findall(r"```python\n(.*?)```", text, re.S)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert name in train and "steps=100" in train
    exec(train.replace(name, f"{tmp_path}/model").replace("steps=100", "steps=2"), {})
    assert len((tmp_path / "runs/twice/metrics.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    exec(copy, {})
    # Deviations sqrt(3)/4 and 1/2: 3/4 and 1/2 divided by them.
    values = [float(x) for x in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    a, b = 3**0.5, 3**-0.5
    assert values == pytest.approx([a, -b, -b, -b, 1, 1, -1, -1], abs=1e-4)
