"""`meftbench run`: bad input is one line and nothing written; a sweep's end is its exit code."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meftbench.cli.run import sbatch_options
from meftbench.records.store import load_run
from stand_in import BROKEN, ENDLESS, FINE, OUT_OF_MEMORY
from sweeps import WORKER, alive, statuses, told, wait_until

SUITE = {
    "schema": 1,
    "name": "toy",
    "protocol": {"on_oom": "record"},
    "grid": {"model": "bert-tiny@random", "method": ["full", "lora"], "batch_size": [1, 2], "sequence_length": 16},
}


def a_file(text="", name="toy.yaml", **changes):
    """A suite file: `text` as it stands, or SUITE with changed keys; a dotted key goes into the grid."""
    content = SUITE | {"grid": SUITE["grid"] | {key: value for key, value in changes.items() if key in GRID}}
    content |= {key: value for key, value in changes.items() if key not in GRID}
    Path(name).write_text(text or yaml.safe_dump(content, sort_keys=False))
    return name


GRID = ("model", "method", "batch_size", "sequence_length", "seed", "btach_size", "device")


def refused(cli, *arguments, code=2):
    """The one line on stderr with which the command line refuses; nothing on stdout, nothing written."""
    before = sorted(Path.cwd().rglob("*"))

    ended, out, err = cli(*arguments)

    assert (code, "") == (ended, out)
    assert re.fullmatch(r"meftbench: [^\n]+\n", err)
    assert before == sorted(Path.cwd().rglob("*"))
    return err


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": ["full", "meft11"]}, "toy.yaml:9: grid.method[1]: unknown method 'meft11'; did you mean 'meft1'?"),
        ({"method": "lora+chekpoint"}, "unknown lever 'chekpoint'; did you mean 'checkpoint'?"),
        ({"btach_size": 8}, "grid.btach_size: unknown key 'btach_size'; did you mean 'batch_size'?"),
        ({"batch_size": 0}, "grid.batch_size"),
        ({"batch_size": "8"}, "YAML read '8' as text"),
        (
            {"sequence_length": 513},
            "sequence_length 513 is longer than the 512 positions of 'bert-tiny@random'; use at",
        ),
        ({"model": "bert-tyni@random"}, "unknown model 'bert-tyni'; did you mean 'bert-tiny'?"),
        ({"model": "./nowhere"}, "no model folder 'nowhere'; check the path"),
        ({"method": False}, "put the word in quotes"),
        ({"device": "predicted:h10"}, "grid.device: unknown profile 'h10'; did you mean 'h100'?"),
        ({"device": "prediction"}, "grid.device: unknown device 'prediction'"),
        ({"protocol": {"timeout": "10x"}}, "protocol.timeout: '10x' is not a duration; write 600s, 10m or 1h\n"),
        ({"schema": 2}, "toy.yaml:1: schema: schema 2 is newer than this program (1); update meftbench"),
        ({"budgets": "none.yaml"}, "no such file 'none.yaml'; the path is relative to the suite file"),
        ({"description": [1]}, "toy.yaml:14: description: input should be a valid string; it is [1]"),
        ({"description": True}, "input should be a valid string; YAML read the value as True: put it in quotes if"),
        ({"batch_size": True}, "input should be a valid integer; YAML read the value as True: write a plain number"),
        ({"protocol": 3}, "protocol: input should be a mapping of keys to values; it is 3"),
        ({"include": 3}, "include: input should be a list; it is 3"),
        ({"exclude": [{"method": "full"}, {"method": "lora"}]}, "no cell is left"),
    ],
)
def test_a_suite_with_a_fault_is_refused_with_its_place_and_cure(cli, changes, said):
    assert said in refused(cli, "run", a_file(**changes))


def test_a_key_given_twice_is_refused(cli):
    file = a_file("schema: 1\nname: toy\ngrid:\n  model: bert-tiny@random\n  model: bert-mini@random\n")

    assert "toy.yaml:5: duplicate key 'model'; it stands on line 4 already" in refused(cli, "run", file)


def test_a_file_that_is_no_yaml_is_refused(cli):
    assert "toy.yaml:2: not valid YAML" in refused(cli, "run", a_file("schema: 1\nname: a: b\n"))


def test_a_missing_file_is_refused(cli):
    assert "nowhere.yaml: no such file; check the path" in refused(cli, "run", "nowhere.yaml")


def test_a_typo_in_the_name_of_a_suite_is_refused_with_the_nearest(cli):
    Path("suites").mkdir()
    a_file(name="suites/nightly.yaml")

    assert "unknown suite 'nightyl'; did you mean 'nightly'?" in refused(cli, "run", "nightyl")


def test_a_name_with_letters_in_other_places_is_nearest(cli):
    """Not another name that has as many of them in order."""
    assert "unknown method 'lroa'; did you mean 'lora'?" in refused(cli, "run", a_file(method="lroa"))


def test_several_methods_are_a_list(cli):
    """Commas within brackets belong to a setting."""
    said = "'full, lora+checkpoint(every=2)' is 2 methods; write them as a list: [full, lora+checkpoint(every=2)]"
    assert said in refused(cli, "run", a_file(method="full, lora+checkpoint(every=2)"))
    code, _, err = cli("init", "bert-tiny@random", "--method", "full,lora")
    assert (2, True) == (code, "'full,lora' is 2 methods; name one here" in err)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("partition=gpu, account=me", {"partition": "gpu", "account": "me"}),
        ("--cpus-per-task=8,exclusive", {"cpus_per_task": "8", "exclusive": ""}),
        ("gres=gpu:h100:2,comment=a=b", {"gres": "gpu:h100:2", "comment": "a=b"}),
    ],
)
def test_options_of_sbatch_are_named_as_sbatch_names_them(text, options):
    assert options == sbatch_options(text)


def test_a_model_folder_without_weights_is_refused(cli):
    folder = Path("model")
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 64}')

    assert "model folder 'model' has no weights; put model.safetensors there" in refused(
        cli, "run", a_file(model="./model")
    )


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--where", "batch_size"], 2, "'batch_size' has no `=`"),
        (["--where", "btach_size=8"], 2, "did you mean 'batch_size'?"),
        (["--where", "batch_size=99"], 5, "none of the 4 cells matches"),
        (["--where", "batch_size=99", "--dry-run"], 5, "none of the 4 cells matches"),
        (["--device", "cuda"], 4, "use `--device counted`"),
        (["--device", "cdua"], 2, "did you mean 'cuda'?"),
        (["--gpus", "0"], 2, "no cell of the suite runs on cuda"),
        (["--gpus", "first"], 2, "'first' is not a list of indices"),
        (["--retry", "eror"], 2, "did you mean 'error'?"),
        (["--timeout", "soon"], 2, "'soon' is not a duration; write 600s, 10m or 1h"),
        (["--timeout", "0s"], 2, "leaves no time"),
        (["--resume"], 2, "no run of suite 'toy' under runs/; name its folder with --out"),
        (["--jobs", "0"], 2, "--jobs"),
        (["--egnine", "ray"], 2, "--egnine"),
    ],
)
def test_an_option_with_a_fault_is_refused(cli, monkeypatch, options, code, said):
    file = a_file()

    assert said in refused(cli, "run", file, *options, code=code)


def test_an_unwritable_folder_is_refused(cli):
    """Also for root, whom permissions do not stop: a folder cannot be made below a file."""
    Path("file").write_text("")

    assert "cannot be written" in refused(cli, "run", a_file(), "--out", "file/run")


def test_a_folder_without_permission_is_refused(cli, monkeypatch):
    """The line names the folder and the way out, wherever the system refuses."""
    file = a_file()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "run: cannot be written (Permission denied); choose another folder with --out" in refused(
        cli, "run", file, "--out", "run"
    )


def test_a_file_as_folder_is_refused(cli):
    Path("file").write_text("")

    assert "file: is a file; name a folder with --out" in refused(cli, "run", a_file(), "--out", "file")


def test_a_folder_that_is_no_run_is_refused(cli):
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("")

    assert "thesis: is not empty" in refused(cli, "run", a_file(), "--out", "thesis")
    assert "thesis: is not a run folder" in refused(cli, "run", a_file(), "--out", "thesis", "--resume")


def test_a_run_of_another_suite_is_refused(cli):
    cli("run", a_file(), "--out", "run")

    assert "holds a run of another suite" in refused(
        cli, "run", a_file(batch_size=[1, 3]), "--out", "run", "--resume", code=4
    )


# --- running ---


def test_a_sweep_prints_its_table_its_folder_and_what_to_do_next(cli):
    """Results go to stdout, a line a cell to stderr."""
    code, out, err = cli("run", a_file(), "--out", "run")

    assert 0 == code
    assert "lora" in out
    assert "run folder: run" in out
    assert "next:" not in out + err
    assert "at batch 2 × 16 tokens, all 2 cells ended ok" in out  # the answer in a sentence
    assert err.startswith("4 cells; no like cell has run on this machine: the time is not known yet")
    err = err.partition("\n")[2]
    assert re.match(r"\[1/4\] ok +bert-tiny@random/full/b1/s16  activation 1,000 B counted  [0-9.]+ m?s\n", err), err
    assert 4 == len(err.splitlines())
    assert ["ok"] * 4 == statuses(load_run("run"))


def test_at_a_terminal_a_run_says_what_to_type_next(cli, monkeypatch):
    monkeypatch.setattr("meftbench.cli.options.at_terminal", lambda: True)
    *_, err = cli("run", a_file(), "--out", "run", "-q")

    assert err == "next: meftbench report run · meftbench show run CELL\n"


def test_a_run_says_how_long_the_same_cells_took_before(cli):
    cli("run", a_file(), "-q")
    _, out, _ = cli("run", a_file(), "--dry-run")
    _, answer, _ = cli("run", a_file(), "--dry-run", "--json")
    _, summary, err = cli("run", a_file(), "--json", "--out", "again")

    assert "(from 4 like cells measured on this machine)" in out
    assert err.startswith("4 cells, about ")
    assert 0 < json.loads(answer)["expected_s"] < 60
    assert json.loads(summary)["expected_from"] == {"same": 4, "scaled": 0, "unknown": 0}
    assert json.loads(summary)["answer"][0].startswith("at batch ")


def test_the_default_folder_is_named_after_suite_and_time(cli):
    cli("run", a_file(), "-q")

    [folder] = Path("runs").iterdir()
    assert re.fullmatch(r"toy-\d{8}-\d{6}", folder.name)


def test_quiet_tells_nothing_on_stderr(cli):
    code, _, err = cli("run", a_file(), "--quiet")

    assert (0, "") == (code, err)


def test_quiet_hides_no_note(cli):
    """What the results lack, or that files were lost, is no progress."""
    cli("run", a_file(method=["full"]), "--quiet", "--out", "run")

    code, _, err = cli("run", a_file(), "--quiet", "--out", "run", "--resume")

    assert (0, "note: the suite has 2 more cells than the run began with\n") == (code, err)


def test_json_is_one_object_on_stdout(cli):
    code, out, _ = cli("run", a_file(seed=[FINE, OUT_OF_MEMORY]), "--json", "--out", "run")

    content = json.loads(out)
    assert (0, 0) == (code, content["exit_code"])
    assert {"ok": 4, "oom": 4} == content["counts"]
    assert load_run("run").records[0].to_json() == content["records"][0]


@pytest.mark.parametrize(
    ("behaviour", "code", "line"),
    [
        (OUT_OF_MEMORY, 0, "asked for 4.0 KiB more"),
        (BROKEN, 3, "ZeroDivisionError: a bug in a probe"),
        (ENDLESS, 3, "Timeout: took longer than 0.3 s and was killed"),
    ],
)
def test_failed_cells_give_exit_code_3_but_out_of_memory_is_a_result(cli, behaviour, code, line):
    file = a_file(seed=behaviour, batch_size=1, method="full")

    ended, _, err = cli("run", file, "--timeout", "0.3s")

    assert code == ended
    assert line in err


def test_verbose_shows_the_traceback(cli):
    *_, err = cli("run", a_file(seed=BROKEN, batch_size=1, method="full"), "-v")

    assert "Traceback" in err
    assert "stand_in.py" in err


def test_dry_run_lists_cells_and_writes_nothing(cli):
    file = a_file()

    code, out, _ = cli("run", file, "--dry-run", "--where", "method=lora", "--repeats", "3")
    assert 0 == code
    assert ["bert-tiny@random/lora/b1/s16", "bert-tiny@random/lora/b2/s16"] == re.findall(r"bert\S+", out)
    assert "2 cells, 6 processes; nothing was run" in out
    listed = json.loads(cli("run", file, "--dry-run", "--json", "--limit", "1")[1])["cells"]
    assert ["bert-tiny@random/full/b1/s16"] == [cell["label"] for cell in listed]
    assert [Path(file)] == list(Path().iterdir())


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["method=lora,batch_size=2"], ["lora/b2"]),
        (["method=f*"], ["full/b1", "full/b2"]),
        (["method=lora,batch_size=2", "method=full,batch_size=1"], ["full/b1", "lora/b2"]),
        (["label=*/b1/*"], ["full/b1", "lora/b1"]),
        (["sequence_length=16,precision=fp32,method=full,batch_size=1"], ["full/b1"]),
    ],
)
def test_where_chooses_by_any_field(cli, where, expected):
    """All parts of one --where must match; another --where adds the cells of its own."""
    options = [part for condition in where for part in ("--where", condition)]

    _, out, _ = cli("run", a_file(), "--dry-run", *options)

    assert expected == re.findall(r"@random/(\w+/b\d)/s16", out)


def test_resume_without_a_folder_takes_up_the_newest_run_of_the_suite(cli):
    file = a_file()
    cli("run", file, "--limit", "1")

    code, *_ = cli("run", file, "--resume")

    [folder] = Path("runs").iterdir()
    assert 0 == code
    assert 4 == len(load_run(folder).records)


def test_resume_without_a_folder_passes_over_newer_runs_that_it_cannot_resume(cli):
    """Of another protocol, or of cells that the suite no longer has."""
    cli("run", a_file(), "--limit", "1", "--out", "runs/toy-first")
    cli("run", a_file(protocol={"warmup": 7}), "--limit", "1", "--out", "runs/toy-second")
    cli("run", a_file(batch_size=[1, 64]), "--limit", "1", "--out", "runs/toy-third")

    code, *_ = cli("run", a_file(), "--resume")

    assert 0 == code
    assert [4, 1, 1] == [len(load_run(Path("runs") / f"toy-{name}").records) for name in ("first", "second", "third")]


def test_retry_names_the_statuses_to_try_again(cli):
    file = a_file(seed=BROKEN, batch_size=1, method="full")
    cli("run", file, "--out", "run")

    assert cli("run", file, "--out", "run", "--resume")[2].startswith("note: nothing was left to run; ")
    assert "[1/1] error" in cli("run", file, "--out", "run", "--resume", "--retry", "error,timeout")[2]


def test_auto_counts_where_there_is_no_gpu(cli):
    cli("run", a_file(), "--device", "auto", "--out", "run", "--limit", "1")

    assert "counted" == load_run("run").records[0].cell["device"]


# --- interruptions ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_keeps_finished_records_and_says_how_to_go_on(tmp_path, number, code):
    """The running cell is killed, its exit code says why, and --resume finishes the run."""
    file, told_file = a_file(seed=[FINE, ENDLESS], batch_size=1, method="full"), tmp_path / "told.txt"
    # A shell starts what it puts into the background with SIGINT ignored, and this test may be run so.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    program += "from meftbench.runner import process; process.WORKER = tuple(sys.argv[1:]);"
    program += f"from meftbench.cli import main; main(['run', {file!r}, '--out', 'run'])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *WORKER],
        env=os.environ | {"STAND_IN_TOLD": str(told_file)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(told(told_file)) == 2)

    process.send_signal(number)
    _, err = process.communicate()

    assert code == process.returncode
    assert err.endswith(f"finished records are kept in run; `meftbench run {file} --out run --resume` goes on\n")
    assert "Traceback" not in err
    assert ["ok"] == statuses(load_run("run"))
    wait_until(lambda: not any(alive(int(pid)) for _, pid in told(told_file)))
