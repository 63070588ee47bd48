"""A suite with tasks: its cells, and the line of each fault."""

import pytest

from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.suite import load_suite, parse_suite
from meftbench.plan.training import Training
from meftbench.plan.where import parse_where
from meftbench.strict_yaml import read

HEAD = """\
schema: 1
name: toy
defaults: {model: minilm@random, method: full, batch_size: 4}
"""


@pytest.fixture
def suite_of(tmp_path):
    """The suite of HEAD and what follows it."""

    def parsed(text):
        file = tmp_path / "toy.yaml"
        file.write_text(HEAD + text)
        return parse_suite(read(file))

    return parsed


@pytest.fixture
def fault_of(suite_of):
    """What is said of a suite with a fault, from the line on."""

    def said(text):
        with pytest.raises(UserError) as caught:
            suite_of(text)
        assert 2 == caught.value.exit_code
        return str(caught.value).partition("toy.yaml:")[2]

    return said


@pytest.mark.parametrize("content", ["{", "[1]", "", '{"model_type": 3}'])
@pytest.mark.parametrize("task", ["", "tasks: rte\n"])
def test_a_damaged_model_is_one_line_with_a_task_as_without(task, content, fault_of, tmp_path):
    """The task's head is looked for in the model's configuration, which is checked before."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text(content)
    named = f"include: [{{model: {tmp_path}/damaged@random, sequence_length: 16}}]\n"
    if task:
        named = f"grid: {{model: {tmp_path}/damaged@random}}\n"

    assert str(tmp_path / "damaged") in fault_of(task + named)


@pytest.mark.parametrize("config", ["[1]", "5", "{1: 2}"])
def test_a_configuration_that_is_none_is_one_line_with_a_task(config, fault_of):
    said = fault_of(f"tasks: rte\ngrid: {{model: {{name: minilm@random, config: {config}}}}}\n")

    assert "is no mapping of fields to values; write config: {num_hidden_layers: 4}" in said


# --- cells ---


def test_a_task_is_an_axis(suite_of):
    """A cell for each task, with the head that answers it and the task's own length."""
    cells = suite_of("tasks: [rte, stsb, openbookqa]\n").cells

    assert ["rte", "stsb", "openbookqa"] == [cell.training.task for cell in cells]
    assert [None, None, "multiple_choice"] == [cell.head for cell in cells]
    assert [256, 128, 128] == [cell.sequence_length for cell in cells]


def test_a_decoder_answers_questions_by_likelihood(suite_of):
    """Its usual head does, so that no head is said."""
    (cell,) = suite_of("tasks: piqa\ngrid: {model: opt-125m@random}\n").cells

    assert cell.head is None


def test_a_task_says_of_itself_what_training_says_of_all(suite_of):
    text = "tasks: [rte, {name: cola, epochs: 5, learning_rate: [1.0e-2, 2.0e-2]}]\ntraining: {epochs: 2.0}\n"

    cells = suite_of(text).cells

    expected = [("rte", 2, 5e-4), ("cola", 5, 1e-2), ("cola", 5, 2e-2)]
    assert expected == [(c.training.task, c.training.epochs, c.training.learning_rate) for c in cells]


def test_rates_by_method(suite_of):
    """The last pattern that matches counts; levers are part of the method's name."""
    text = """\
tasks: rte
training: {learning_rate: {"*": 1.0e-3, "lora*": [1.0e-4, 2.0e-4], lora+checkpoint: 3.0e-4}}
grid: {method: [full, lora, lora+checkpoint]}
"""

    cells = suite_of(text).cells

    expected = [("full", 1e-3), ("lora", 1e-4), ("lora", 2e-4), ("lora+checkpoint", 3e-4)]
    assert expected == [(cell.method_label, cell.training.learning_rate) for cell in cells]


def test_a_method_without_a_rate(fault_of):
    said = fault_of("tasks: rte\ntraining:\n  learning_rate: {lora: 1.0e-3}\n")

    assert said == """6: training.learning_rate: no pattern matches 'full'; add "*": 5.0e-4"""


def test_rates_as_an_axis(suite_of):
    """They stand for those of `training`; the first seed is trained with all of them before the next."""
    text = "tasks: rte\ntraining: {learning_rate: 1.0}\ngrid: {seed: [1, 0], learning_rate: [1.0e-3, 1.0e-4]}\n"

    cells = suite_of(text).cells

    assert [(0, 1e-3), (0, 1e-4), (1, 1e-3), (1, 1e-4)] == [(c.seed, c.training.learning_rate) for c in cells]


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("tasks: rte\n", 256),
        ("tasks: rte\ngrid: {sequence_length: 48}\n", 48),
        ("tasks: {name: rte, sequence_length: 32}\ngrid: {sequence_length: 48}\n", 32),
        ("tasks: cifar10\ngrid: {model: vit-base@random}\n", 197),
    ],
)
def test_whose_length(suite_of, text, length):
    """The task's entry before the axis, that before what an image has, that before the task's own."""
    assert [length] == [cell.sequence_length for cell in suite_of(text).cells]


def test_what_leaves_a_cell_the_same(suite_of):
    """Where the data lie, of which grid it is, and what is kept, are no part of what is run."""
    plain = suite_of("tasks: rte\n")
    other = suite_of("tasks: rte\ntraining: {data: elsewhere, grid: first-seed, keep: best}\n")
    longer = suite_of("tasks: rte\ntraining: {epochs: 4.0}\n")

    assert plain.cells[0].cell_id == other.cells[0].cell_id != longer.cells[0].cell_id


def test_ids_stay_what_they_were(suite_of):
    """Records of earlier runs are found by them: of cells without a task, and of those with one."""
    (trained,) = suite_of("tasks: {name: rte, sequence_length: 48, max_steps: 40}\n").cells

    assert "1b332cf71fcb2a01" == load_suite("smoke").cells[0].cell_id
    assert (
        "6223ab78ecededff" == next(c for c in load_suite("minilm").cells if c.label.endswith("/meft3/b8/s128")).cell_id
    )
    assert "3ff43a7eb466eaa0" == trained.cell_id


def test_a_label_says_what_differs():
    """Also of a task whose name is a path: its slashes are no borders."""
    training = Training(task="./my/task", learning_rate=1e-3, epochs=1.0, ordinary=True, tokenizer="a/b")

    assert ["tokenizer=a/b", "epochs=1", "ordinary"] == training.own
    assert training.label.startswith("./my/task/lr0.001/tokenizer=a/b/")


def test_cells_left_out_by_task(suite_of):
    text = "tasks: [rte, cola]\nexclude: [{task: cola, method: full}, {learning_rate: 1.0e-3, seed: 1}]\n"
    grid = "grid: {method: [full, lora], seed: [0, 1], learning_rate: [1.0e-3, 1.0e-4]}\n"

    cells = suite_of(text + grid).cells

    found = {(c.training.task, c.method, c.seed, c.training.learning_rate) for c in cells}
    assert ("rte", "full", 0, 1e-3) in found
    assert not any(task == "cola" and method == "full" for task, method, _, _ in found)
    assert not any(seed == 1 and rate == 1e-3 for _, _, seed, rate in found)


def test_an_included_point_with_a_task(suite_of):
    """Beside cells of which only steps are measured."""
    text = "grid: {sequence_length: 16}\ninclude: [{task: rte, learning_rate: 1.0e-2, sequence_length: 24}]\n"

    cells = suite_of(text).cells

    assert [(None, 16), (1e-2, 24)] == [(c.training and c.training.learning_rate, c.sequence_length) for c in cells]


def test_where_by_task_and_rate(suite_of):
    """A rate is a number, however it is written; a cell without a task is of none."""
    cells = suite_of(
        "tasks: [rte, cola]\ntraining: {learning_rate: [5.0e-4, 1.0e-3]}\ninclude: [{sequence_length: 8}]\n"
    ).cells

    def chosen(condition):
        return [(c.training.task, c.training.learning_rate) for c in cells if parse_where([condition])(c)]

    assert [("rte", 5e-4)] == chosen("task=rte,learning_rate=5e-4")
    assert [("rte", 5e-4), ("cola", 5e-4)] == chosen("learning_rate=0.00050")
    assert [("cola", 5e-4), ("cola", 1e-3)] == chosen("task=c*")


# --- faults ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks:\n  - rt\n", "5: tasks[0]: unknown task 'rt'; did you mean 'rte'?"),
        ("tasks:\n  - {name: rte, epoch: 3}\n", "5: tasks[0].epoch: unknown key 'epoch'; did you mean 'epochs'?"),
        ("tasks:\n  - {name: rte, task: cola}\n", "5: tasks[0].task: names a task again; leave it out: this is 'rte'"),
        ("tasks:\n  - {epochs: 3}\n", "5: tasks[0]: None is not the name of a task; write a name of"),
        (
            "tasks:\n  - {name: rte, sequence_length: long}\n",
            "5: tasks[0].sequence_length: input should be a valid integer; YAML read 'long' as text",
        ),
        ("tasks:\n  - {name: rte, sequence_length: 0}\n", "5: tasks[0].sequence_length: input should be greater"),
        ("tasks: rte\ntraining: {epochs: 0}\n", "5: training.epochs: input should be greater than 0; it is 0"),
        ("tasks: rte\ntraining: {learning_rate: []}\n", "5: training.learning_rate: "),
        ("tasks: rte\ntraining: {learning_rate: .inf}\n", "5: training.learning_rate: "),
        ("tasks: rte\ntraining: {learning_rates: 1.0}\n", "5: training.learning_rates: unknown key"),
        ("tasks: rte\ngrid:\n  learning_rate: -1.0\n", "6: grid.learning_rate: input should be greater than 0"),
        ("tasks: rte\ngrid:\n  learning_rate: .inf\n", "6: grid.learning_rate: input should be a finite number"),
        (
            "tasks: rte\ngrid:\n  device: predicted:a100-80gb\n",
            "6: grid.device: a training cannot be predicted; write device: counted or cuda",
        ),
        (
            "grid: {sequence_length: 8}\ninclude:\n  - learning_rate: 1.0e-3\n    sequence_length: 16\n",
            "6: include[0].learning_rate: says how to train, and there is no task; name one under `tasks`",
        ),
        (
            "training: {epochs: 2.0}\ngrid: {sequence_length: 8}\n",
            "4: training: says how to train, and there is no task; name one under `tasks`",
        ),
        (
            "tasks: openbookqa\ngrid:\n  head: classification\n",
            "6: grid.head: head 'classification' cannot answer 'openbookqa'; write multiple_choice or causal_lm",
        ),
        ("tasks: mnist\n", "4: tasks: task 'mnist' needs a head image_classification, and bert has none"),
        (
            "grid:\n  head: multiple_choice\n  sequence_length: 8\n",
            "5: grid.head: needs a task, whose choices it reads; name one under `tasks`",
        ),
        ("tasks: rte\ngrid:\n  precision: fp16-autocast\n", "6: grid.precision: fp16 is not trained in on a CPU"),
    ],
)
def test_faults(fault_of, text, said):
    """Each has its line."""
    assert fault_of(text).startswith(said)


def test_a_cell_on_a_command_line_has_no_task():
    """`meftbench fit` asks after memory, of a cell of steps."""
    assert Cell.of("full", model="minilm@random", batch_size=1, sequence_length=8).training is None
