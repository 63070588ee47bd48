"""What the README and the pages of docs/ say is what the program does."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import re
import shlex
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from meftbench.cli import _VERBS, main
from meftbench.plan.budgets import load_budgets
from meftbench.plan.suite import parse_suite, shipped_suites
from meftbench.records.store import load_run
from meftbench.report.render.terminal import print_summary
from meftbench.strict_yaml import read

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PREDICTION = (DOCS / "howto" / "prediction.md").read_text(encoding="utf-8")
EXACT = (DOCS / "exact.md").read_text(encoding="utf-8")
SCORES = (DOCS / "scores.md").read_text(encoding="utf-8")
ALL = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))])


@pytest.mark.parametrize(
    ("block", "run"), [("table", "minilm-cpu"), ("smollm2", "smollm2-cpu"), ("quality", "quality-minilm")]
)
def test_a_table_is_what_the_program_prints(block, run):
    """Each line stands in the output of `meftbench show reports/RUN` on a terminal 100 columns wide."""
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    print_summary(load_run(ROOT / "reports" / run), console)
    printed = {line.rstrip() for line in console.export_text().splitlines()}
    table = re.search(rf"<!-- {block}:.*?-->\n```\n(.*?)\n```\n<!-- end", ALL, re.DOTALL)[1].splitlines()

    assert 11 <= len(table)
    assert [] == [line for line in table if line not in printed]


def shares_of_checkpointing(run, methods, **shape):
    """Counted activation memory of methods as whole percents of LoRA's with checkpointing, of its default rank."""
    records = [r for r in load_run(ROOT / "reports" / run).records if shape.items() <= r.cell.items()]
    peaks = {r.method_label: r.value("activation_peak_bytes") for r in records}
    [of] = [peak for label, peak in peaks.items() if label.split("+")[:2] == ["lora", "checkpoint"]]
    return sorted(round(100 * peaks[method] / of) for method in methods)


def test_the_shares_it_names_are_those_of_the_records():
    """Of LoRA with checkpointing: MiniLM at 8 x 128 in 4 and in 16 tiles, SmolLM2 at 2 x 256 in 4."""
    shape = {"batch_size": 8, "sequence_length": 128}
    four = shares_of_checkpointing("minilm-cpu", ["meft1-exact(tiles=4)", "meft3-exact(tiles=4)"], **shape)
    [sixteen] = shares_of_checkpointing("minilm-cpu", ["meft1-exact(tiles=16)"], **shape)
    names = [f"meft{n}-exact(tiles=4)+chunked_loss" for n in (1, 2, 3)]
    deep = shares_of_checkpointing("smollm2-cpu", names, batch_size=2, sequence_length=256)

    holds = f"they hold {four[0]} to {four[-1]} % of what LoRA with checkpointing holds in four tiles"
    assert f"{holds}, and {sixteen} % in 16" in " ".join(README.split())
    assert f"Exact reversal holds {deep[0]} to {deep[-1]} % of what LoRA" in " ".join(EXACT.split())


def test_the_memory_table_is_what_the_campaign_counted():
    """Streams by layers, to the digit shown; the bold row is meft1-exact at 16 tiles."""
    depth = pd.read_csv(ROOT / "reports" / "exact-memory" / "depth.csv")
    counted = depth[depth.precision == "fp32"].pivot_table(index="method", columns="layers", values="streams")
    block = re.search(r"<!-- memory.*?-->\n(.*?)\n<!-- end of memory", EXACT, re.DOTALL)[1]
    rows = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]

    assert 4 <= len(rows)
    for method, *values in rows:
        assert [f"{counted.loc[method, layers]:.1f}" for layers in (12, 24, 48)] == values


def test_every_file_it_links_to_is_there():
    """Links within the repository lead somewhere."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]

    assert 5 <= len(links)
    assert [] == [link for link in links if not (ROOT / link).exists()]


def test_every_command_it_shows_is_one():
    """Verbs exist, and the suites it runs by name are shipped."""
    lines = [line for line in ALL.splitlines() if re.match(r"\s*meftbench \w", line)]
    commands = [shlex.split(line, comments=True) for line in lines]

    verbs = {
        "run",
        "report",
        "show",
        "compare",
        "check",
        "list",
        "doctor",
        "estimate",
        "fit",
        "plan",
        "inspect",
        "validate",
        "export",
        "finetune",
        "init",
    }
    assert verbs == {words[1] for words in commands}
    assert {words[1] for words in commands} <= set(_VERBS)
    named = [words[2] for words in commands if words[1] == "run" and not words[2].endswith(".yaml")]
    assert {"smoke", "sweep-bert-base"} <= set(named) <= set(shipped_suites())


def test_the_estimate_is_what_the_program_prints(capsys):
    """To the digit, but for the last line: how long it took."""
    block = re.search(r"<!-- estimate.*?-->\n```\n(.*?)\n```\n<!-- end of estimate", PREDICTION, re.DOTALL)[
        1
    ].splitlines()
    command = re.search(r"^meftbench (estimate .*)$", PREDICTION, re.MULTILINE)[1]
    with pytest.raises(SystemExit):
        main([*shlex.split(command), "--quiet"])
    printed = capsys.readouterr().out.splitlines()

    assert 10 < len(block)
    assert block[:-1] == printed[:-1]


def test_the_plan_it_shows_is_the_committed_one():
    """The table of each method's best lever set, and the command that is typed for it, whose answer was verified."""
    folder = ROOT / "reports" / "plan" / "qwen2.5-1.5b"
    block = re.search(r"<!-- plan:.*?-->\n(.*?)\n<!-- end of plan", README, re.DOTALL)[1]
    rows = pd.read_csv(folder / "plan.csv")
    [best] = rows[(rows.method == "parallel+liger_loss") & (rows.capacity_index == 0)].itertuples()

    assert 9 + 2 == len(block.splitlines())
    assert block in (folder / "plan.md").read_text(encoding="utf-8")
    assert "meftbench plan qwen2.5-1.5b@random --memory 24GiB --sequence-length 4096 --profile rtx4090" in README
    assert best.verified
    assert f"| {best.method} | {best.micro_batch_size} | {best.process_device_bytes / 2**30:.1f} |" in block


@pytest.mark.slow
def test_a_committed_plan_is_what_the_command_writes(tmp_path):
    """But for the last line: how long it took. 8-bit optimizers are among the candidates where they are installed, as
    they were for the committed one."""
    pytest.importorskip("bitsandbytes")
    asked = ("--memory", "24GiB", "--sequence-length", "4096", "--profile", "rtx4090")
    with pytest.raises(SystemExit) as ended:
        main(["plan", "mistral-7b@random", *asked, "--out", str(tmp_path), "--quiet"])
    written = (tmp_path / "plan.md").read_text(encoding="utf-8").splitlines()

    assert 0 == ended.value.code
    assert (ROOT / "reports" / "plan" / "mistral-7b" / "plan.md").read_text("utf-8").splitlines()[:-1] == written[:-1]


def test_what_predictions_were_held_against_is_the_table():
    """Figures with complete settings: how many, the median and the worst error."""
    from pandas import read_csv

    table = read_csv(ROOT / "reports" / "published" / "table.csv")
    quantities = {
        "peaks of training steps": "peak_allocated",
        "memory between steps": "allocated_after_step",
        "peaks of single operators": "operator_peak",
        "peaks of a loss over a vocabulary": "loss_peak",
    }
    for name, quantity in quantities.items():
        errors = (table[(table.setting == "complete") & (table.quantity == quantity)].ratio - 1).abs()
        row = f"| {name} | {len(errors)} | {100 * errors.median():.3f} % | {100 * errors.max():.3f} % |"
        assert row in PREDICTION


@pytest.mark.parametrize(("page", "cells"), [("task", 2 * 3 * 2 * 3), ("own_code", 3), ("suite", 24 - 4)])
def test_its_suites_are_accepted(page, cells, tmp_path):
    """They parse, into as many cells as their axes say, but for those that are excluded."""
    file = tmp_path / "it.yaml"
    [block] = re.findall(r"```yaml\n(schema.*?)```", (DOCS / "howto" / f"{page}.md").read_text("utf-8"), re.DOTALL)
    file.write_text(block)

    assert cells == len(parse_suite(read(file)).cells)


def test_its_budgets_are_accepted(tmp_path):
    """Those in the list of steps, without its margin."""
    [block] = re.findall(r"```yaml\n(.*?)```", (DOCS / "howto" / "ci.md").read_text("utf-8"), re.DOTALL)
    file = tmp_path / "it.yaml"
    file.write_text(textwrap.dedent(block))

    assert 2 == len(load_budgets(file).rows)


def test_it_is_short():
    """What it is for, how to install it, two tables, a picture, four commands, links: the rest is in docs/."""
    assert len(README.splitlines()) <= 160


def test_ci_runs_its_test_command():
    """The line that .ci/run looks for stands in the README once."""
    assert 1 == len(re.findall(r"^pip install .*&& pytest$", README, re.MULTILINE))


def test_the_start_is_that_of_the_committed_csv():
    """The rows of docs/exact.md are the first three columns of reports/start/start.csv."""
    block = EXACT.split("<!-- start:")[1].split("<!-- end of start -->")[0]
    with (ROOT / "reports" / "start" / "start.csv").open(encoding="utf-8") as file:
        expected = [row[:3] for row in list(csv.reader(file))[1:]]

    lines = [line for line in block.splitlines() if line.startswith("|")][2:]
    assert expected == [[part.strip() for part in line.strip("|").split("|")] for line in lines]


def test_no_report_holds_a_folder_of_the_machine_it_was_made_on():
    """Neither a record nor a page: a name that only one machine has says nothing to a reader."""
    folder = re.compile(rb"[\"' >(](/(?:work|home|root|tmp|Users|mnt)/[\w./-]+)")
    packed = re.compile(rb'<script type="text/plain" id="[\w-]+">([A-Za-z0-9+/=]+)</script>')
    files = [
        file
        for file in (ROOT / "reports").rglob("*")
        if file.suffix in (".jsonl", ".json", ".html", ".yaml", ".md", ".csv")
    ]

    def content(file):
        text = file.read_bytes()
        return b"\n".join([text, *(gzip.decompress(base64.b64decode(data)) for data in packed.findall(text))])

    assert 50 < len(files)
    assert {} == {str(file.relative_to(ROOT)): found[:2] for file in files if (found := folder.findall(content(file)))}


def rows_of(run: str) -> dict[str, dict[str, list[str]]]:
    """Of each task in a run's table.md, the cells of each method's row."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in (ROOT / "reports" / run / "table.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            task = found.setdefault(line[3:].split(":")[0].replace("\\", ""), {})
        elif line.startswith("| ") and not line.startswith(("| method", "| ---")):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            task[name] = cells
    return found


def test_the_scores_it_names_are_those_of_the_records():
    """To the digit of table.md: the table of GLUE, and what is said of question answering."""
    said = " ".join(SCORES.split())
    glue = rows_of("quality-glue-minilm")
    titles = {"MRPC": "mrpc", "STS-B": "stsb", "SST-2": "sst2", "CoLA": "cola", "RTE": "rte"}
    for title, task in titles.items():
        [row] = [line for line in SCORES.splitlines() if line.startswith(f"| {title} |")]
        parallel, exact = (glue[task][method] for method in ("parallel", "meft1-exact"))
        memory = ", ".join(cells[1].split()[0] for cells in (parallel, exact))
        assert [parallel[0], exact[0], memory] == [cell.strip() for cell in row.strip("|").split("|")][3:]
    full = {task: glue[task]["full"][0].split(" (")[0] for task in glue}
    assert f"three seeds, has {full['mrpc']} on MRPC, {full['stsb']} on STS-B, {full['sst2']} on SST-2 and" in said
    assert f"SST-2 and {full['cola']} on CoLA, where" in said
    assert f"full fine-tuning ({full['rte']}, three seeds)" in said


def test_the_scores_of_question_answering_are_those_of_the_records():
    """To the digit of table.md; before any training all methods but meft1 answer as the pre-trained model does."""
    tasks = rows_of("quality-qa-smollm2")
    names = ("ARC-Easy", "SciQ", "PIQA", "ARC-Challenge", "OpenBookQA")
    titles = {name: name.lower().replace("-", "_") for name in names}
    block = SCORES.split("<!-- qa:")[1].split("<!-- end of qa -->")[0]
    head, _, *lines = [line for line in block.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    assert ["", *titles] == [cell.strip() for cell in head.strip("|").split("|")]
    assert ["before training", *(tasks[task]["parallel"][1].split()[0] for task in titles.values())] == rows[0]
    assert [f"`{method}`" for method in tasks["arc_easy"]] == [row[0] for row in rows[1:]]
    for name, *scores in rows[1:]:
        assert [tasks[task][name.strip("`")][0].split(" (")[0] for task in titles.values()] == scores
    lora, parallel, exact = (tasks["arc_easy"][method][2] for method in ("lora", "parallel", "meft1-exact"))
    assert f"LoRA, `parallel` and `meft1-exact` have {lora}, {parallel} and {exact}." in " ".join(SCORES.split())


def test_the_step_times_it_names_are_those_of_the_records():
    """Ratios to LoRA with checkpointing, the lowest and the highest of shapes and threads, to two digits."""
    with (ROOT / "reports" / "exact-speed-cpu" / "speed.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))

    def span(method, ratio):
        named = f"{method}-exact, adapters of 64"
        found = [float(row[ratio]) for row in rows if row["method"] == named]
        assert len(found) == 4
        return f"{min(found):.2f} to {max(found):.2f}"

    said = " ".join(EXACT.split())
    meft1, meft2, meft3 = (span(method, "ratio_at_equal_weights") for method in ("meft1", "meft2", "meft3"))
    equal = f"`meft1-exact` takes {meft1} times as long, `meft2-exact` {meft2}, `meft3-exact` {meft3};"
    assert f"at as many trained weights, adapters of 64, {equal}" in said
    usual = [span(method, "ratio_to_lora_checkpoint") for method in ("meft1", "meft2", "meft3")]
    assert f"beside LoRA of rank 8, which trains an eighth of that, {usual[0]}, {usual[1]} and {usual[2]};" in said
    spread = max(float(row["highest"]) - float(row["lowest"]) for row in rows)
    assert f"rounds differ by up to {round(100 * spread)} %" in said


def least_peaks(run):
    """By tokens and method, the least peak over its levers and settings, bytes."""
    found = {}
    with (ROOT / "reports" / run / "table.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "ok":
                peak = float(row["peak_allocated_bytes [byte]"])
                key = int(row["sequence_length"]), row["method_name"]
                found[key] = min(peak, found.get(key, peak))
    return {tokens: {m: p for (t, m), p in found.items() if t == tokens} for tokens in (2048, 16384, 65536)}


def test_where_rivals_win_is_what_the_tables_say():
    """docs/choosing.md, sentence by sentence."""
    on_device, with_host = least_peaks("best-levers"), least_peaks("best-levers-host")
    exact, without_reversal = ("meft1-exact", "meft2-exact", "meft3-exact"), ("lora", "lora-fa", "parallel", "full")

    for tokens, peaks in on_device.items():
        assert "mezo" == min(peaks, key=peaks.get)
        assert max(peaks["midpoint"], peaks["leapfrog"]) <= peaks["bdia"] < min(peaks[m] for m in exact)
        assert peaks["meft1-exact"] < min(peaks[m] for m in without_reversal), tokens
    frozen = {method: peak for method, peak in on_device[2048].items() if method != "full"}
    assert max(frozen.values()) < 1.06 * min(frozen.values())
    assert "lora-fa" == min(with_host[2048], key=with_host[2048].get)
    for tokens in (16384, 65536):
        reversible = [with_host[tokens][m] for m in (*exact, "bdia", "midpoint", "leapfrog")]
        assert max(reversible) < 1.02 * min(reversible)
        assert max(reversible) < min(with_host[tokens][m] for m in without_reversal)
