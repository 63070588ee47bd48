"""What to type for a row of a plan is accepted where it is typed, as far as that can be tried here."""

from __future__ import annotations

import ast
import shlex

import pytest
import typer.main
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from meftbench.asked import asked_cell
from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.choices import PRECISIONS
from meftbench.catalogue.elsewhere import (
    AXOLOTL,
    LEVERS_ELSEWHERE,
    LORA_TARGETS,
    OPTIMIZERS_ELSEWHERE,
    PRECISIONS_ELSEWHERE,
    TRAINER,
    TRL,
    UNSLOTH,
    levers_in,
)
from meftbench.catalogue.labels import read_label
from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.cli import app
from meftbench.methods import prepare
from meftbench.plan.planning import candidates
from meftbench.plan.ranking import method_of
from meftbench.plan.suite import parse_suite
from meftbench.report.views.commands import elsewhere, estimate_command, snippet, suite_of
from meftbench.strict_yaml import read
from models import TINY, a_model
from planned_rows import a_row, about

CANDIDATES = candidates(precisions=["bf16", "fp32", "bf16-autocast", "nf4"], depth=28, explain=True)
ROWS = [a_row(c.label, precision=c.precision, optimizer=c.optimizer, micro_batch_size=4) for c in CANDIDATES]
ROWS += [a_row(f"lora+{lever}") for lever in LEVERS]
ROWS += [a_row(label) for label in ("lora+checkpoint(every=2)", "lora+checkpoint(keep=attention)", "full+offload")]
ROWS += [a_row("full", optimizer=optimizer) for optimizer in OPTIMIZERS]


def calls(text, name):
    """The arguments of each call of `name` in Python text, as values."""
    found = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    ]
    return [{word.arg: ast.literal_eval(word.value) for word in node.keywords} for node in found]


@given(st.sampled_from(ROWS), st.sampled_from([None, 16]), st.booleans())
@settings(max_examples=60)
def test_the_estimate_command_is_read_as_the_row(row, batch, attention):
    """Parsed by the command line, it is a cell with the row's label, precision, optimizer and shape."""
    if "optimizer_in_backward" in row["method"]:
        batch = None  # its micro-batch is the batch
    asked = about(batch_size=batch, config={"attention_dropout": 0.0}, profile_name="t4",
                  options={"attention": "sdpa", "allow-code": True} if attention else {})  # fmt: skip
    program, verb, *words = shlex.split(estimate_command(row, asked))
    command = typer.main.get_command(app).commands[verb]
    given_options = command.make_context(verb, words).params

    axes = ("precision", "optimizer", "attention", "batch_size", "micro_batch_size", "sequence_length")
    fields = {name: given_options[name] for name in axes}
    model, method, profile = (given_options[name] for name in ("model", "method", "profile"))
    cell = asked_cell("estimate", model, method, profile, {"attention_dropout": 0.0}, None, **fields)
    assert ("meftbench", "t4", ["attention_dropout=0.0"]) == (program, profile, given_options["config"])
    assert (row["method"], row["precision"], row["optimizer"]) == (cell.method_label, cell.precision, cell.optimizer)
    assert (batch or 4, 4, 512) == (cell.batch_size, cell.micro_batch_size, cell.sequence_length)
    assert attention == given_options["allow_code"]


@pytest.mark.parametrize("label", ["lora+checkpoint", "meft1-exact(reversible_layers=7)+chunked_loss", "mezo"])
def test_the_suite_measures_the_row(tmp_path, label):
    """One cell, with the row's own label."""
    file = tmp_path / "answer.yaml"
    row = a_row(label, precision="fp32")
    file.write_text(yaml.safe_dump(suite_of(row, about(batch_size=8, config={"num_hidden_layers": 9}))))

    (cell,) = parse_suite(read(file)).cells
    assert (label, 8, 4, 512) == (cell.method_label, cell.batch_size, cell.micro_batch_size, cell.sequence_length)
    assert {"num_hidden_layers": 9} == cell.model_config_overrides


@pytest.mark.parametrize("method", sorted({method_of(row) for row in ROWS}))
def test_what_is_typed_elsewhere_is_valid(method):
    """The snippet and each library's Python compile, YAML is a mapping; transformers and peft take their arguments."""
    for row in ROWS:
        if method_of(row) == method:
            check_texts(row)


def check_texts(row):
    texts = elsewhere(row, about(batch_size=16))
    compile(snippet(row, about(batch_size=16)), "snippet", "exec")

    for library in (TRAINER, TRL, UNSLOTH):
        if not texts[library].startswith("not offered there: "):
            compile(texts[library], library, "exec")
    if not texts[TRAINER].startswith("not offered"):
        (arguments,) = calls(texts[TRAINER], "TrainingArguments")
        taken = TrainingArguments(**arguments, use_cpu=True)
        assert (4, 4) == (taken.per_device_train_batch_size, taken.gradient_accumulation_steps)
        layers = [lever for lever, _ in read_label("test", row["method"])[1:] if lever == "checkpoint"]
        of_meftbench = "apply_method" in texts[TRAINER]
        assert bool(taken.gradient_checkpointing) == bool(layers and not of_meftbench)
        for lora in calls(texts[TRAINER], "LoraConfig"):
            assert ["q_proj", "v_proj"] == sorted(LoraConfig(**lora).target_modules)
    if not texts[AXOLOTL].startswith("not offered"):
        keys = yaml.safe_load(texts[AXOLOTL])
        assert ("Qwen/Qwen2.5-1.5B", 512, 4, 4) == tuple(
            keys[name] for name in ("base_model", "sequence_len", "micro_batch_size", "gradient_accumulation_steps")
        )
        assert (row["precision"] == "nf4") == keys.get("load_in_4bit", False) == (keys.get("adapter") == "qlora")


def test_what_is_not_offered_is_said():
    """Of methods, of precisions, of levers one by one; and for models that are no language models."""
    meft = elsewhere(a_row("meft1-exact"), about())
    assert "not offered there: meft1-exact" == meft[TRL] == meft[AXOLOTL] == meft[UNSLOTH]
    assert "apply_method" in meft[TRAINER]
    assert "version 2 of the paper" in elsewhere(a_row("lora-fa"), about())[TRL]
    assert "not offered there: precision fp64" == elsewhere(a_row(precision="fp64"), about())[AXOLOTL]
    assert "axolotl: not offered there: chunked_loss" in elsewhere(a_row("lora+chunked_loss"), about())[AXOLOTL]
    assert "for language models" in elsewhere(a_row(), about(head="classification"))[TRL]
    assert "function of your own" in elsewhere(a_row(), about(model_name="mine.models:net", head=None))[TRL]
    assert "offload is not part of a model" in snippet(a_row("lora+offload"), about())


def test_defaults_of_others_are_switched_off():
    """TRL checkpoints and takes the loss in chunks unless told otherwise; what it cannot do, it does for all layers."""
    assert {"gradient_checkpointing": False, "loss_type": "nll"} == levers_in(TRL, {}).flags
    every = levers_in(TRL, {"checkpoint": {"every": 2}})
    assert (["checkpoint(every)"], True) == (every.missing, every.flags["gradient_checkpointing"])
    both = levers_in(AXOLOTL, {"liger_loss": {}, "cut_loss": {}}).flags["plugins"]
    assert 2 == len(both)
    every = levers_in(TRAINER, {"checkpoint": {"every": 3}}).flags["activation_checkpointing_kwargs"]
    assert {"use_reentrant": False, "every_n_layers": 3} == every


def test_the_table_has_everything_that_can_be_chosen():
    assert set(LEVERS) <= set(LEVERS_ELSEWHERE)
    assert set(PRECISIONS) == set(PRECISIONS_ELSEWHERE)
    assert set(OPTIMIZERS) == set(OPTIMIZERS_ELSEWHERE)
    assert set(LORA_TARGETS) == set(BACKBONES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_transformers_makes_the_optimizer_of_that_name(name):
    """Of bitsandbytes' Trainer takes the general class, and says by arguments which it is."""
    if OPTIMIZERS[name].of_bitsandbytes:
        pytest.importorskip("bitsandbytes")
    arguments = TrainingArguments("out", use_cpu=True, **OPTIMIZERS_ELSEWHERE[name])
    made, given_arguments = Trainer.get_optimizer_cls_and_kwargs(arguments)

    wanted = OPTIMIZERS[name].home.partition(":")[2]
    if OPTIMIZERS[name].of_bitsandbytes:
        assert ("Paged" in wanted) == bool(given_arguments.get("is_paged"))
        assert ("8bit" in wanted) == (8 == given_arguments["optim_bits"])
        assert made.__name__.removesuffix("8bit") in wanted
    else:
        assert wanted == made.__name__
        assert OPTIMIZERS[name].arguments.items() <= given_arguments.items()


@pytest.mark.parametrize("head", [None, "classification"])
@pytest.mark.parametrize("backbone", TINY)
def test_peft_trains_the_parameters_that_lora_trains_here(backbone, head):
    """By the LoraConfig that is printed, on every backbone: the same projections, and a new head."""
    theirs, ours = a_model(backbone=backbone, layers=4), a_model(backbone=backbone, layers=4)
    kind = ours.config.model_type
    if head is not None:
        if head not in BACKBONES[kind].heads:
            pytest.skip(f"{kind} has no {head} head")
        theirs, ours = (a_model(backbone=backbone, layers=4, head=head) for _ in range(2))
    asked = about(model_name=f"{TINY[backbone][0]}@random", head=head or BACKBONES[kind].heads[0])
    (config,) = calls(elsewhere(a_row("lora(rank=4)"), asked)[TRAINER], "LoraConfig")

    assert trained(get_peft_model(theirs, LoraConfig(**config))) == trained(prepare(ours, "lora(rank=4)").model)


def trained(model):
    return sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)


def test_the_label_of_a_snippet_is_applied():
    """To a model of four layers: what the snippet says is put in by apply_method."""
    for label in ("lora+checkpoint+offload+chunked_loss", "mezo+chunked_loss", "meft1-exact(reversible_layers=2)"):
        (call,) = [
            node
            for node in ast.walk(ast.parse(snippet(a_row(label), about())))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "meftbench.apply_method"
        ]
        applied = prepare(a_model(backbone="llama"), ast.literal_eval(call.args[1]))
        assert set(applied.levers) == {name for name, _ in read_label("test", label)[1:]} - {"offload"}
