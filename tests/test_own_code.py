"""Functions of the user's own that make models and batches: found or not, and what they give."""

from __future__ import annotations

import os

import pytest
import torch
import yaml

from builders import a_cell
from meftbench import own_code
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.measuring.build import DTYPES, build_step
from meftbench.measuring.measurers import measure_cell
from meftbench.plan.factories import BATCH_ARGUMENTS
from meftbench.plan.protocol import Protocol
from meftbench.prediction.predict import predict
from own_models import SHAPE, line_of, the_line

# --- found or not ---


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("mine.models:biuld", (), "module 'mine.models' has no 'biuld'; did you mean 'mine.models:build'?"),
        ("mine.models:zzz", (), "define it there"),
        ("mine.models:number", (), "'number' is int, and cannot be called"),
        ("mine.modles:build", (), "'mine.modles' was not found in package 'mine'; did you mean 'mine.models:build'?"),
        ("mime.models:build", (), "or among installed packages; did you mean 'mine.models:build'?"),
        ("nowhere.at.all:f", (), "'nowhere' was not found in the working folder or among"),
        ("fine.py:f", (), "write fine:f, as Python imports it"),
        ("lacks:f", (), "failed at lacks.py:2: ModuleNotFoundError: No module named 'no_such_package'; mend it there"),
        ("spelled:f", (), "failed at spelled.py:2: SyntaxError:"),
        ("leaves:f", (), "failed at leaves.py:2: SystemExit: 3"),
        ("mine.models:Own", ("depth",), "got an unexpected keyword argument 'depth': it takes nothing"),
        ("mine.models:of_one_argument", BATCH_ARGUMENTS, "write def batch(batch_size, sequence_length)"),
        ("mine.models:batch", (), "missing a required argument: 'batch_size': it takes batch_size, sequence_length"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_called(name, arguments, said, allowed):
    (allowed / "lacks.py").write_text("\nimport no_such_package\n")
    (allowed / "fine.py").write_text("f = dict\n")
    (allowed / "spelled.py").write_text("x = 1\ndef f(:\n")
    (allowed / "leaves.py").write_text("import sys\nsys.exit(3)\n")

    assert said in the_line(own_code.checked_function, name, arguments)


def test_it_is_found_in_an_installed_package(allowed):
    """What it raises is said with the file below its package, and no folder of the machine."""
    assert own_code.load("yaml:safe_load") is yaml.safe_load
    with pytest.raises(UserError, match=r"^yaml:dump: raised at yaml/\w+\.py:\d+: .*; mend it there$") as caught:
        own_code.call("yaml:dump", data=1, Dumper=int)
    assert "site-packages" not in str(caught.value)


# --- what they give ---


def an_own_cell(model, batch=None, **fields):
    own = {"model": f"mine.models:{model}", "batch": batch and f"mine.models:{batch}", "attention_requested": "own"}
    return a_cell(**own | SHAPE | fields)


def build(model, batch=None, **fields):
    return build_step(an_own_cell(model, batch, **fields), torch.device("cpu"))


@pytest.mark.parametrize(
    ("model", "batch", "said"),
    [
        ("a_dict", None, "mine.models:a_dict: returned dict, no torch module"),
        ("of_nothing", None, "returned Identity, which has no parameters"),
        ("raising", None, f"raised at mine/models.py:{line_of('open(')}: FileNotFoundError: [Errno 2]"),
        ("elsewhere", None, "ValueError: no weights in mine/models.py; mend it there"),
        ("Own", None, "what Own takes is not known; name a function that makes a batch: `batch: my"),
        ("Lossless", "three", "was asked for 2 samples, and gives input of 3"),
        ("Lossless", "no_mapping", "the batch is list, no mapping"),
        ("Lossless", "squares", "its loss is float32 (2, 4), not one number"),
        ("Lossless", "batch", "does not take the batch (tokens, target)"),
    ],
)  # fmt: skip
def test_what_is_no_model_or_no_batch(model, batch, said, allowed):
    assert said in the_line(lambda: build(model, batch).run())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64", "bf16-autocast"])
def test_parameters_have_the_dtype_of_the_precision(precision, allowed):
    """Also where the function gives them another; floating-point samples are converted with them."""
    kinds = {parameter.dtype for parameter in build("build_in_bf16", precision=precision).model.parameters()}
    own = build("Looking", "squares", precision=precision)

    assert {DTYPES.get(precision, torch.float32)} == kinds
    assert {DTYPES.get(precision, torch.float32)} == {tensor.dtype for tensor in own.batch.values()}
    assert abs(own.run()) < 10
    assert torch.get_default_dtype() == torch.float32


def test_the_seed_makes_the_weights_and_the_batch(allowed):
    """Whatever was drawn before; what is drawn afterwards does not depend on it."""

    def loss(seed):
        step = build("Own", "batch", seed=seed)
        step.model.eval()
        with torch.no_grad():
            return step.loss()

    first, again, other = (loss(seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    build("Own", "batch")
    drawn = torch.rand(1)
    torch.manual_seed(5)

    assert first == again != other
    assert torch.rand(1) == drawn


def test_a_function_that_clears_its_environment_is_called_again(allowed):
    for _ in range(2):
        assert build("without_environment").batch_size == 2


@pytest.mark.parametrize("left", ["gradients", "device", "autocast", "threads", "dtype"])
def test_what_a_function_sets_in_torch_does_not_last(left, allowed):
    """A cell is measured under what its record says."""
    before = (torch.is_grad_enabled(), torch.get_default_device(), torch.get_num_threads(), torch.get_default_dtype())
    step = build("changing", model_config_overrides={"what": left})

    assert not torch.is_autocast_enabled("cpu")
    after = (torch.is_grad_enabled(), torch.get_default_device(), torch.get_num_threads(), torch.get_default_dtype())
    assert before == after
    assert step.run() > 0


def test_variables_of_ours_that_a_function_sets_do_not_last(allowed, monkeypatch):
    """Neither those that there were, nor new ones: they would steer the cells after it."""
    monkeypatch.setenv("MEFTBENCH_CACHE", "here")
    (allowed / "steers.py").write_text(
        "import os\n\n\ndef f():\n    os.environ.update(MEFTBENCH_CACHE='there', MEFTBENCH_DATA='there')\n"
    )
    own_code.call("steers:f")

    assert "here" == os.environ["MEFTBENCH_CACHE"]
    assert "MEFTBENCH_DATA" not in os.environ


@pytest.mark.parametrize("text", ["unsupported memory format option", "an illegal memory access was encountered"])
def test_a_fault_that_speaks_of_memory_is_said_where_it_is(text, allowed):
    """It is no end of memory, which would be a result of the cell."""
    (allowed / "formats.py").write_text(f"def f():\n    raise RuntimeError({text!r})\n")

    assert f"formats:f: raised at formats.py:2: RuntimeError: {text}" in the_line(own_code.call, "formats:f")


@pytest.mark.parametrize(("name", "said"), [("on_meta", "have no values (meta)"), ("lazy", "without a shape yet")])
def test_a_model_without_values_is_one_line(name, said, allowed):
    assert said in the_line(build, name, "squares")


def test_a_model_that_was_given_before_is_one_line(allowed):
    """A method of another cell may be in it, or the weights of its training."""
    build("the_same")
    assert "returned the model that it has returned before; make a new one" in the_line(build, "the_same")


def test_a_loss_that_is_no_number_is_said(allowed):
    """The cell is ok, and its memory is what it is; what broke down is beside it."""
    found = measure_cell(an_own_cell("Nowhere", "squares"), Protocol(warmup=1, steps=1))

    assert found.metrics["collapse"].value.startswith("the loss is nan: weights, inputs or labels are not finite")


def test_attention_is_set_where_it_is_asked_for(allowed):
    assert "eager" == build("build", attention_requested="eager").model.config._attn_implementation
    assert "eager" == build("Own", "batch", attention_requested="eager").model.trunk.config._attn_implementation
    line = the_line(build, "Lossless", "squares", attention_requested="eager")
    assert "gives a model whose attention is its own; leave attention out" in line


def test_a_cell_of_ones_own_module_is_measured(allowed):
    """All passes; parameters that its loss does not depend on are no error, and what is not known has a reason."""
    found = measure_cell(an_own_cell("Own", "batch"), Protocol(warmup=1, steps=1))

    assert found.metrics["activation_peak_bytes"].value > 0
    assert 1 == found.metrics["zero_grad_tensors"].value  # the bias of the keys; the pooler's have none
    assert "module of one's own" in found.metrics["starting_point_shift"].absent
    assert {"mine.models:Own", "mine.models:batch"} == set(found.observed["own_code"])
    assert "own" == found.observed["inputs"]


@pytest.mark.parametrize(
    ("model", "batch", "said"),
    [
        ("unbearable", "squares", "(its model was to be made without values, on torch's meta device); let it make"),
        ("Broken", "squares", f"its training step raised at mine/models.py:{line_of('[:, :3]')}: RuntimeError: "),
        ("Looking", "squares", "looks at values, which a trace has not; count it"),
        ("elsewhere", None, f"raised at mine/models.py:{line_of('no weights')}: ValueError: no weights"),
    ],
)
def test_what_cannot_be_predicted(model, batch, said, allowed):
    assert said in the_line(predict, an_own_cell(model, batch), find_profile("a100-80gb"))


def test_a_prediction_counts_what_the_cell_holds(allowed):
    """A function's model is predicted as the same model under a name is: to the byte."""
    config = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    named = a_cell(model="bert-tiny@random", model_config_overrides=config | {"vocab_size": 100}, **SHAPE)
    own = named.model_copy(
        update={"model": "mine.models:build", "model_config_overrides": {}, "attention_requested": "own"}
    )
    profile = find_profile("a100-80gb")

    assert predict(named, profile).metrics().keys() == predict(own, profile).metrics().keys()
    assert predict(named, profile).peak == predict(own, profile).peak
