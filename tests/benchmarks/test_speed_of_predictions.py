"""Benchmarks of predictions as whole processes; time and memory are recorded, seconds are never asserted."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

from meftbench.plan.cell import Cell
from meftbench.plan.defaults import FITTED_METHODS
from meftbench.prediction.pool import Kept, Pool


def answer_of(*arguments):
    ended = subprocess.run([sys.executable, "-m", "meftbench", *arguments, "--json"], capture_output=True)
    assert ended.returncode in (0, 1), ended.stderr.decode()
    return json.loads(ended.stdout)


@pytest.mark.parametrize("model", ["llama-3.2-1b@random", "llama-3.1-70b@random"])
@pytest.mark.parametrize("method", ["meft1-exact", "lora+checkpoint"])
def test_an_estimate_of_any_depth(benchmark, model, method):
    """Of 16 layers and of 80; the host's memory stays below 500 MiB."""
    found = benchmark.pedantic(answer_of, ("estimate", model, method), rounds=3)

    assert found["host_bytes"] < 500 * 2**20
    assert found["peak_allocated_bytes"] > 2 * found["parameters_total"]


@pytest.mark.parametrize("methods", ["lora,lora+checkpoint", "meft1-exact", ",".join(FITTED_METHODS)])
def test_what_fits(benchmark, methods):
    """Batch and length of a language model of 7 billion on four cards; last, all methods that are the default."""
    cards = ("--memory", "16GiB 24GiB 40GiB 80GiB", "--precision", "bf16")
    found = benchmark.pedantic(answer_of, ("fit", "mistral-7b@random", *cards, "--methods", methods), rounds=1)

    assert len(found["rows"]) == 8 * len(methods.split(","))


@pytest.mark.parametrize("method", ["lora+checkpoint", "meft1-exact", "meft1-exact+chunked_loss"])
def test_a_map(benchmark, method):
    """Memory for 64 shapes of a language model of 7 billion, by two processes, in which torch is imported already."""
    import_module("meftbench.measuring.requests")
    search = import_module("meftbench.prediction.search")
    lengths = [64 * 2**power for power in range(8)]
    bands = search._bands([(2**power, length) for power in range(8) for length in lengths])
    cell = Cell.of(method, model="mistral-7b@random", batch_size=1, sequence_length=512, precision="bf16")
    shared = {"cell": cell.model_dump(mode="json"), "profile": "a100-80gb", "versions": "", "allocator": ""}

    def mapped():
        with Pool(2, Kept(None)) as pool:
            return [sizes for _, sizes in pool.results(search.band_of_map, [shared | {"shapes": b} for b in bands])]

    assert 64 == sum(map(len, benchmark.pedantic(mapped, rounds=1)))


def test_a_plan(benchmark):
    """All methods and levers for a language model of 1.5 billion, 24 GiB, 4,096 tokens."""
    asked = ("--memory", "24GiB", "--sequence-length", "4096", "--profile", "rtx4090")
    found = benchmark.pedantic(answer_of, ("plan", "qwen2.5-1.5b@random", *asked), rounds=1)

    assert found["fastest"]["verified"]
