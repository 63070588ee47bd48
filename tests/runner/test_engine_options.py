"""`--engine` and what each engine needs; an engine whose package is not installed is one line."""

import socket
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meftbench.cli.run import engine_named
from meftbench.errors import UserError
from meftbench.plan.protocol import Protocol
from meftbench.runner.engine import COUNTED, CUDA, Work
from meftbench.runner.local_engine import LocalEngine
from meftbench.runner.ray_connection import _refuse_unreachable, ray_module
from meftbench.runner.ray_engine import RayEngine, _what_there_is, first_sentence, places
from meftbench.runner.slurm_engine import SlurmEngine


def named(name, jobs=None, gpus=(), address="", slurm=""):
    return engine_named(name, jobs=jobs, gpus=gpus, address=address, slurm=slurm)


def test_each_engine_has_its_name():
    engines = [named("local"), named("ray", address="10.0.0.1:6379"), named("slurm", slurm="partition=gpu")]

    assert [LocalEngine, RayEngine, SlurmEngine] == [type(engine) for engine in engines]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "rey"}, r"--engine: unknown engine 'rey'; did you mean 'ray'"),
        ({"name": "ray", "gpus": (0,)}, "--gpus: is for --engine local, not ray"),
        ({"name": "local", "address": "a:1"}, "--address: is for --engine ray, not local"),
        ({"name": "ray", "slurm": "partition=a"}, "--slurm: is for --engine slurm, not ray; write --engine slurm"),
        ({"name": "slurm", "slurm": "partition="}, "--slurm: 'partition=' is no list of NAME=VALUE"),
        ({"name": "slurm", "slurm": "a=,b=1"}, "is no list of NAME=VALUE"),
        ({"name": "slurm", "slurm": "=gpu"}, "is no list of NAME=VALUE"),
        ({"name": "slurm", "slurm": "--"}, "is no list of NAME=VALUE"),
        ({"name": "slurm", "slurm": f"mem_gb={'9' * 5000}"}, "--slurm: mem_gb is a number of 5,000 digits, which no"),
        ({"name": "slurm", "slurm": f"--cpus-per-task={'9' * 10}"}, "cpus_per_task is a number of 10 digits"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, said):
    with pytest.raises(UserError, match=said):
        named(**options)


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_package_that_is_missing_is_one_line(monkeypatch, name, package, cli, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)

    code, out, err = cli("run", "ci", "--engine", name, "--out", tmp_path / "run")

    assert (2, "") == (code, out)
    assert f"pip install 'meftbench[{name}]'" in err
    assert 1 == len(err.splitlines())
    assert not (tmp_path / "run").exists()


def test_slurm_without_sbatch_is_one_line(monkeypatch, cli, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))

    code, _, err = cli("run", "ci", "--engine", "slurm", "--out", tmp_path / "run")

    assert 4 == code
    assert "there is no `sbatch` on this machine" in err


def test_ray_reports_nothing_to_its_makers(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)

    ray_module()

    import os

    assert "0" == os.environ["RAY_USAGE_STATS_ENABLED"]


@pytest.mark.parametrize(
    "address",
    [f"x:{'9' * 5000}", "a..b:1", f"{'é' * 300}:1", ":1", "a:", "a", "a:-1", "a:1:", "a\x00b:1", "[::1]:99999"],
)
def test_an_address_that_is_none_is_one_line(address, cli, tmp_path):
    """Without a word to Ray, and shortened."""
    pytest.importorskip("ray")

    code, out, err = cli("run", "ci", "--engine", "ray", "--address", address, "--out", tmp_path / "run")

    assert (4, "", 1) == (code, out, len(err.splitlines()))
    assert "--address: no Ray cluster answers at " in err
    assert len(err) < 400


@settings(max_examples=50, deadline=None)
@given(host=st.text(st.sampled_from("a.é-[]:\ud800 \u0660%"), max_size=80), port=st.text("09\u0660+- _", max_size=8))
def test_no_address_is_more_than_refused(host, port):
    """Names in which every kind of sign is that resolvers and numbers trip over; no host has such a name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", unknown_host)
        with pytest.raises(UserError):
            _refuse_unreachable(f"{host}:{port}")


def unknown_host(host, *arguments, **options):
    host.encode("idna")  # as the function itself does first
    raise socket.gaierror(-2, "Name or service not known")


def a_node(name, **resources):
    return {"NodeID": name * 8, "NodeManagerHostname": name, "Resources": resources}


def found(nodes, kinds, jobs=None, threads=None):
    work = Work(frozenset(kinds), False, Protocol(threads=threads))
    return [(p.host, p.gpu, p.cpus, p.threads, p.slots_of_node) for p in places(nodes, work, jobs)]


def test_places_are_a_gpu_or_the_cpus_that_a_cell_takes():
    """Without `threads` a cell has all the CPUs of a machine; a machine of too few has no place."""
    nodes = [a_node("a", CPU=8.0), a_node("b", CPU=16.0, GPU=4.0), a_node("head")]

    assert [("a", False, 8, 8, 1), ("b", False, 16, 16, 1)] == found(nodes, {COUNTED})
    assert [("a", False, 4, 4, 2)] * 2 + [("b", False, 4, 4, 4)] * 4 == found(nodes, {COUNTED}, threads=4)
    assert [("b", False, 12, 12, 1)] == found(nodes, {COUNTED}, threads=12)
    assert [("b", True, 0, 4, 4)] * 4 == found(nodes, {CUDA})
    assert [("b", True, 0, 4, 5), ("a", False, 8, 8, 1)] == found(nodes, {CUDA, COUNTED}, jobs=1)
    assert [] == found(nodes, {COUNTED}, threads=64)


def test_what_a_cluster_lacks_is_said_with_what_decides_it():
    """`threads` decide where cells without a GPU fit, not where there is a GPU."""
    nodes, work = [a_node("a", CPU=4.0)], Work(frozenset({COUNTED, CUDA}), False, Protocol(threads=8))

    assert "4 CPUs and 0 GPUs (others may use them), and `threads` is 8" in _what_there_is(nodes, work, True)
    assert _what_there_is(nodes, work, False).endswith("(others may use them)")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("Its node has died. Node Id: 0123\n\tip: 10.0.0.1", "Its node has died"),
        ("The actor died unexpectedly.\n\tclass_name: Node\n\tactor_id: 1", "The actor died unexpectedly"),
        ("ray::Node.run() (pid=1)\nTraceback (most recent call last):\nOSError: no 1.5 GB", "OSError: no 1.5 GB"),
        ("", "RuntimeError"),
        ("a" * 900, "a" * 300),
    ],
)
def test_of_what_ray_says_a_message_has_the_first_sentence(said, sentence):
    assert sentence == first_sentence(RuntimeError(said))
