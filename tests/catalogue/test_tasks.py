"""Tasks by name, and folders that say what task they are."""

import pytest

from meftbench.catalogue.task import SCORES
from meftbench.catalogue.tasks import TASKS, find_task
from meftbench.errors import UserError


def a_task_file(folder, text):
    (folder / "task.yaml").write_text(text)
    return str(folder)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_task_knows_its_published_size(task):
    """Of every split that is used a row count is known, so that cut data are recognised."""
    assert {task.train, *task.evaluations.values()} == set(task.rows)
    assert (task.kind in ("classification", "images")) == (task.labels is not None)
    assert (task.kind == "choices") == bool(task.choices) == bool(task.template)
    assert (task.kind == "regression") == (task.scores == SCORES["regression"])


def test_the_tasks_of_the_paper_are_there():
    glue = {"rte", "mrpc", "cola", "stsb", "sst2", "qnli", "qqp", "mnli"}
    qa = {"openbookqa", "piqa", "arc_easy", "arc_challenge", "sciq"}

    assert glue == {name for name, task in TASKS.items() if task.family == "glue"}
    assert qa == {name for name, task in TASKS.items() if task.family == "qa"}


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match=r"^q\.yaml:3: unknown task 'mprc'; did you mean 'mrpc'\?$"):
        find_task("q.yaml:3", "mprc")


def test_a_folder_says_what_it_is(tmp_path):
    """kind, texts and label suffice; a single column may be written without brackets."""
    (tmp_path / "dev.csv").write_text("title,spam\n")
    name = a_task_file(tmp_path, "kind: classification\ntexts: title\nlabel: spam\nlabels: [ham, spam]\nscores: [f1]\n")

    task = find_task("here", name)

    assert ("classification", ("title",), "spam", ("ham", "spam")) == (task.kind, task.texts, task.label, task.labels)
    assert ("f1",) == task.scores
    assert str(tmp_path) == task.folder
    assert {"validation": "validation"} == task.evaluations


def test_the_prompt_of_choices_is_their_texts(tmp_path):
    """Where no template is written the decoder reads the texts, a line each."""
    name = a_task_file(tmp_path, "kind: choices\ntexts: [passage, question]\nlabel: answer\nchoices: options\n")

    assert "{passage}\n{question}" == find_task("here", name).template


def test_a_folder_of_images_needs_no_file(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cats").mkdir(parents=True)

    task = find_task("here", str(tmp_path))

    assert "images" == task.kind
    assert {"test": "test"} == task.evaluations


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("kind: classification\nlabel: y\n", "task.yaml:1: texts: is missing; add it"),
        ("kind: poetry\ntexts: t\nlabel: y\n", "task.yaml:1: kind: input should be 'classification'"),
        ("kind: regression\ntexts: t\nlabel: y\nscore: f1\n", "task.yaml:4: score: unknown key 'score'; did you mean"),
        ("kind: choices\ntexts: t\nlabel: y\n", "task.yaml:1: choices: name the columns of the choices"),
        ("kind: regression\ntexts: t\nlabel: y\nscores: [f1]\n", "task.yaml:4: scores: pearson and spearman are"),
        ("kind: regression\ntexts: t\nlabel: y\nlabels: [a, b]\n", "task.yaml:4: labels: must be two class names"),
        (
            "kind: classification\ntexts: t\nlabel: y\nlabels: [bad, good, bad]\n",
            "task.yaml:4: labels: names the class 'bad' twice",
        ),
        ("[]\n", "task.yaml:1: is not a mapping of keys to values; start with `kind: classification`"),
        ("kind: images\ntexts: [a, b]\nlabel: y\n", "task.yaml:2: texts: must be one column"),
        (
            "kind: choices\ntexts: t\nlabel: y\nchoices: c\ntemplate: 'Q: {question}'\n",
            "task.yaml:5: template: names {question}, which is not among texts",
        ),
    ],
)
def test_a_fault_in_task_yaml_is_a_line(tmp_path, text, line):
    with pytest.raises(UserError) as caught:
        find_task("here", a_task_file(tmp_path, text))

    assert line in str(caught.value)
    assert 1 == len(str(caught.value).splitlines())


def test_a_folder_that_says_nothing(tmp_path):
    with pytest.raises(UserError, match=r"^here: task folder .* has no task\.yaml and no images; write kind"):
        find_task("here", str(tmp_path))
    with pytest.raises(UserError, match=r"^here: no task folder '/nowhere'; check the path"):
        find_task("here", "/nowhere")
