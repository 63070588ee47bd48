"""The suites that rerun the paper: every setting that is known of it (docs/paper.md), as a number here."""

from __future__ import annotations

import pytest

from meftbench.plan.suite import load_suite, shipped_suites

PAPER = sorted(name for name in shipped_suites() if name.startswith("sweep-paper-"))
MEFT = ("meft1", "meft2", "meft3")


def cells_of(name, method=None):
    return [cell for cell in load_suite(name).cells if method in (None, cell.method)]


def test_what_the_paper_shows_has_a_suite():
    """Memory, GLUE, question answering, images; and reconstruction, which its factors are chosen for."""
    assert ["glue", "images", "memory", "qa", "reconstruction"] == [name.removeprefix("sweep-paper-") for name in PAPER]


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_suite_wants_a_gpu_pretrained_weights_and_says_what_is_unknown(name):
    suite = load_suite(name)

    assert {"cuda"} == {cell.device for cell in suite.cells}
    assert {"pretrained"} == {cell.weights for cell in suite.cells}
    assert "nknown" in suite.description


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("method", MEFT)
def test_meft_is_the_published_one(name, method):
    """The paper's arithmetic, coupling and output, all layers reversible, adapters of 8; 64 and 16 of 24 on OPT."""
    cells = [cell for cell in cells_of(name, method) if not {"lambda", "beta"} & cell.method_params.keys()]
    if name == "sweep-paper-qa" and method != "meft1":
        assert [] == cells  # MEFT1 only
        return
    size, layers = {"sweep-paper-qa": (64, {16})}.get(name, (8, {"all"}))
    if name == "sweep-paper-reconstruction":
        layers = {2, 4, 6, 8, 10}  # where no factor is named, the number of layers is varied

    settings = [cell.settings() for cell in cells]
    assert layers == {setting.reversible_layers for setting in settings}
    assert all(setting.adapter_size == size and setting.arithmetic == "float" for setting in settings)
    assert all(setting.coupling == "paper" and setting.output == "mean" for setting in settings)


def test_memory_is_of_bert_base_in_fp32_at_512_tokens():
    cells = cells_of("sweep-paper-memory")

    assert {("bert-base", "fp32", 512)} == {(cell.model, cell.precision, cell.sequence_length) for cell in cells}
    assert {16, 32} == {cell.batch_size for cell in cells}
    assert {"sdpa", "eager"} == {cell.attention_requested for cell in cells}
    assert {"full", "lora", "houlsby", "meft1", "meft2", "meft3"} <= {cell.method for cell in cells}
    assert {"lora+checkpoint", "full+checkpoint"} <= {cell.method_label for cell in cells}


def test_glue_is_trained_as_the_papers_bert_code_trains_it():
    cells = cells_of("sweep-paper-glue")
    eight = {"rte", "mrpc", "cola", "stsb", "sst2", "qnli", "qqp", "mnli"}

    assert eight == {cell.training.task for cell in cells}
    assert {"bert-base", "roberta-base", "bart-base"} == {cell.model for cell in cells}
    assert {("fp32", 512)} == {(cell.precision, cell.sequence_length) for cell in cells}
    assert {16, 32} == {cell.batch_size for cell in cells}
    for training in (cell.training for cell in cells):
        assert training.evaluations == training.epochs
        assert training.group_by_length
        assert (0.9, 0.98) == training.adam_betas
        assert (1e-6, 0.1, 0.06, 1.0, 8) == (
            training.adam_epsilon,
            training.weight_decay,
            training.warmup_ratio,
            training.clip,
            training.patience,
        )


@pytest.mark.parametrize(
    ("task", "low", "high", "epochs"), [("rte", 5e-4, 8e-4, {20, 40}), ("mnli", 3e-4, 5e-4, {10, 20})]
)
def test_rates_and_epochs_of_glue_are_those_of_its_scripts(task, low, high, epochs):
    """Full fine-tuning has rates of its own: the paper's code has no baselines."""
    trainings = [cell.training for cell in cells_of("sweep-paper-glue", "meft1") if cell.training.task == task]

    assert (low, high) == (min(t.learning_rate for t in trainings), max(t.learning_rate for t in trainings))
    assert epochs == {t.epochs for t in trainings}
    assert all(cell.training.learning_rate < 1e-4 for cell in cells_of("sweep-paper-glue", "full"))


def test_qa_is_trained_as_the_papers_opt_code_trains_it():
    cells = cells_of("sweep-paper-qa", "meft1")

    assert {"openbookqa", "piqa", "arc_easy", "arc_challenge", "sciq"} == {cell.training.task for cell in cells}
    assert {("opt-1.3b", "fp16-autocast", 128)} == {(c.model, c.precision, c.sequence_length) for c in cells}
    assert {1e-4, 3e-4, 5e-4, 7e-4} == {cell.training.learning_rate for cell in cells}
    assert {8, 16, 32} == {cell.batch_size for cell in cells}
    assert {3.0, 5.0, 10.0} == {cell.training.epochs for cell in cells}
    assert 5 * 4 * 3 * 3 == len(cells)
    # The bottom 8 of 24 layers are plain and frozen.
    assert {("top", "frozen")} == {(c.settings().reversible_at, c.settings().remaining) for c in cells}


def test_reconstruction_has_the_papers_factors_among_its_own():
    """0.1 is the paper's; with it all 12 layers are reversible."""
    for method, small in (("meft1", {"lambda"}), ("meft2", {"beta"}), ("meft3", {"lambda", "beta"})):
        said = [cell.method_params for cell in cells_of("sweep-paper-reconstruction", method)]

        assert {"adapter_size": 8} | dict.fromkeys(small, 0.1) in said
        assert [2, 4, 6, 8, 10] == [params["reversible_layers"] for params in said if "reversible_layers" in params]
