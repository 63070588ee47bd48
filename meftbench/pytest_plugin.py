"""The pytest plugin: memory budgets of one's own model and batch (docs/howto/own_repository.md).

pytest imports this file wherever meftbench is installed. So it imports nothing else before a test asks for a budget.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from torch import nn, optim

    from meftbench.own_model import Measurement
    from meftbench.plan.budgets import Budgets
    from meftbench.records.record import Record

MARKER = "memory_budget"
_UPDATE = "--memory-budgets-update"
_USE = "memory_budget(model, batch)"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The budgets file of tests whose budget is not in the code, and its update."""
    group = parser.getgroup("memory budgets (meftbench)")
    group.addoption(
        "--memory-budgets", metavar="FILE", help="Budgets of tests that have none in the code. Default: the ini value."
    )
    group.addoption(
        _UPDATE, action="store_true", help="Write into that file what these tests take, and show the difference."
    )
    parser.addini("memory_budgets", "Budgets file of tests, relative to the rootdir.", default="memory_budgets.yaml")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and refuse an update that could not be written at the end."""
    config.addinivalue_line(
        "markers",
        f'{MARKER}("512MiB", activation_peak="300MiB", ...): bounds of what the fixture {MARKER} measures in this test,'
        " by metric; without a name that of peak_allocated_bytes",
    )
    records: list[Record] = []
    config.stash[_RECORDS] = records
    config.stash[_REFUSED] = []
    if config.getoption(_UPDATE):
        if config.getoption("tx", None):
            raise pytest.UsageError(f"{_UPDATE}: the tests run in several processes; add -n0")
        file = budgets_file(config)
        if file.is_file():
            _load(file, in_test=False)


@pytest.fixture
def memory_budget(request: pytest.FixtureRequest) -> MemoryBudget:
    """Measures training steps of a model on a batch, and fails the test where they take more than its budget."""
    budget = MemoryBudget(request)
    request.node.stash[_FIXTURE] = budget
    return budget


class MemoryBudget:
    """What the fixture gives to a test: call it with a model and a batch. It may be called several times in a test.

    calls: how many times it was called.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.calls = 0
        self._request = request
        self._names: set[str] = set()

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        name: str = "",
        optimizer: optim.Optimizer | None = None,
        method: str | None = None,
        module: str | None = None,
        micro_batch_size: int | None = None,
        warmup: int = 1,
        steps: int = 2,
        time: bool = False,
        **bounds: Any,
    ) -> Measurement:
        """Memory of training steps of `model` on `batch`, counted on CPU and measured on CUDA, within its bounds.

        name: tells the calls of one test apart; default: their number, from the second on. No two may have the same,
            since one of them would be held to the budget of the other; then nothing is measured, and no file updated.
        optimizer, method, module, micro_batch_size, warmup, steps, time: as in `meftbench.measure`, which trains the
            model for warmup + steps steps.
        bounds: by metric, whose ending `_bytes` may be left out: peak_allocated="900MiB", drift_bytes_per_step=0. They
            are added to those of the test's marker. Where there are none, those of the budgets file hold.
        The test fails where a value is beyond its bound, there is no bound, or a bound is not an amount.
        Raises UserError as `meftbench.measure` does.
        """
        __tracebackhide__ = True
        import meftbench
        from meftbench.errors import UserError
        from meftbench.own_tests import record_of

        self.calls += 1
        config, node = self._request.config, self._request.node
        caller = sys._getframe(1)
        place = _relative(Path(caller.f_code.co_filename), config), caller.f_lineno
        budgets = _budgets_of(node, place, bounds)
        part = name or ("" if self.calls == 1 else str(self.calls))
        if part in self._names:
            what = f"{place[0]}:{place[1]}: {MARKER}: two calls of {node.nodeid} have the name {part!r}"
            config.stash[_REFUSED].append(f"{what}; give each a name of its own")
            _fail(config.stash[_REFUSED][-1])
        self._names.add(part)
        try:
            measurement = meftbench.measure(
                model,
                batch,
                optimizer=optimizer,
                method=method,
                module=module,
                micro_batch_size=micro_batch_size,
                warmup=warmup,
                steps=steps,
                time=time,
            )
        except UserError as error:
            if error.__cause__ is None:
                _fail(f"{place[0]}:{place[1]}: {error}")
            raise  # an error in the user's model, whose traceback says where
        record = record_of(f"{node.nodeid}/{part}" if part else node.nodeid, measurement)
        self._report(record, f"{part}." if part else "", budgets)
        if budgets is None and config.getoption(_UPDATE):
            config.stash[_RECORDS].append(record)
        else:
            _hold(record, budgets, config)
        return measurement

    def _report(self, record: Record, prefix: str, budgets: Budgets | None) -> None:
        """Put the numbers into JUnit's properties, and into `extra_info` where the test uses pytest-benchmark."""
        from meftbench.catalogue.metrics import METRICS
        from meftbench.own_tests import REPORTED
        from meftbench.records.outcome import as_number

        benchmark: Any = None
        if "benchmark" in self._request.fixturenames:
            benchmark = self._request.getfixturevalue("benchmark")
        bounded = [row.metric for row in budgets.rows] if budgets else []
        for metric in dict.fromkeys([*REPORTED, "peak_reserved_bytes", *bounded]):
            value = as_number(record.value(metric))
            if value is None:
                continue
            source = record.metrics[metric].source
            text = f"{value} {METRICS[metric].unit} ({source})"
            self._request.node.user_properties.append((f"{prefix}{metric}", text))
            if hasattr(benchmark, "extra_info"):
                benchmark.extra_info[f"{prefix}{metric} ({source})"] = value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that has a budget and measured nothing, which would otherwise pass whatever its model takes."""
    result = yield
    budget = item.stash.get(_FIXTURE, None)
    if budget is None and item.get_closest_marker(MARKER):
        _fail(f"{item.nodeid}: has the marker {MARKER} and measures nothing; take the fixture and call {_USE}")
    if budget is not None and not budget.calls:
        _fail(f"{item.nodeid}: has the fixture {MARKER} and measures nothing; call {_USE}")
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With --memory-budgets-update: write the file and show what changed."""
    records = config.stash[_RECORDS]
    if not records:
        return
    from meftbench.errors import UserError
    from meftbench.own_tests import run_of, updated_file

    terminalreporter.section("memory budgets")
    if refused := config.stash[_REFUSED]:
        terminalreporter.write_line(f"not written: {refused[0]}", red=True)
        return
    try:
        update = updated_file(budgets_file(config), run_of(records, {}))
        update.write()
    except UserError as error:
        terminalreporter.write_line(f"not written: {error}", red=True)
        return
    changes = [*filter(None, [update.diff().rstrip("\n")]), *update.kept]
    terminalreporter.write_line("\n".join(changes) or "nothing to update")


def budgets_file(config: pytest.Config) -> Path:
    """The budgets file of this session, relative to the working folder where it is below it. It need not exist."""
    given = config.getoption("--memory-budgets")
    file = config.invocation_params.dir / given if given else config.rootpath / config.getini("memory_budgets")
    return _relative(file, config)


_RECORDS = pytest.StashKey["list[Record]"]()
_REFUSED = pytest.StashKey["list[str]"]()  # why the budgets file is not to be written
_FIXTURE = pytest.StashKey[MemoryBudget]()


def _budgets_of(node: Any, place: tuple[Path, int], bounds: Mapping[str, Any]) -> Budgets | None:
    """The budgets that the test itself gives, by its markers and in the call; None: it gives none."""
    from meftbench.errors import UserError
    from meftbench.own_tests import UNNAMED, budgets_in_code, metric_named

    where = f"{place[0]}:{place[1]}: {MARKER}"
    of_test: dict[str, Any] = {}
    try:
        for marker in reversed(list(node.iter_markers(MARKER))):
            if len(marker.args) > 1:
                raise UserError(where, "the marker has several bounds without a name", "name the metric of each")
            of_test |= dict.fromkeys([UNNAMED], marker.args[0]) if marker.args else {}
            of_test |= {metric_named(where, name): bound for name, bound in marker.kwargs.items()}
        of_test |= {metric_named(where, name): bound for name, bound in bounds.items()}
        return budgets_in_code(*place, of_test) if of_test else None
    except UserError as error:
        _fail(str(error))


def _hold(record: Record, budgets: Budgets | None, config: pytest.Config) -> None:
    """Fail the test where the record is beyond its budgets: those of the code, or else those of the budgets file."""
    __tracebackhide__ = True
    from meftbench.own_tests import failure_text, run_of, verdicts_on

    cure = "If the test is to take more, raise the bound."
    if budgets is None:
        cure = f"If the test is to take more: pytest {_UPDATE}"
        file = budgets_file(config)
        if not file.is_file():
            _no_budget(record, f"there is no {file}")
        budgets = _load(file, in_test=True)
    verdicts = verdicts_on(run_of([record], _environment(record)), budgets)
    if not verdicts:
        _no_budget(record, f"no row of {budgets.file} matches it")
    if any(verdict.fails for verdict in verdicts):
        _fail(failure_text(record, verdicts, cure))


def _load(file: Path, in_test: bool) -> Budgets:
    """The budgets file. Where it is not valid, the test fails; outside of tests, pytest ends with a usage error."""
    __tracebackhide__ = True
    from meftbench.errors import UserError
    from meftbench.plan.budgets import load_budgets

    try:
        return load_budgets(file)
    except UserError as error:
        if in_test:
            _fail(str(error))
        raise pytest.UsageError(str(error)) from None


def _no_budget(record: Record, why: str) -> NoReturn:
    cure = f'give one, such as {MARKER}(model, batch, peak_allocated="900MiB"), or run pytest {_UPDATE}'
    _fail(f"{record.label}: has no memory budget: none is in the code, and {why}; {cure}")


def _fail(message: str) -> NoReturn:
    """Fail the test with the message alone, since it says where to look."""
    raise pytest.fail.Exception(message, pytrace=False) from None


def _relative(file: Path, config: pytest.Config) -> Path:
    """The path as pytest shows it: relative to the folder in which it was started, where it is below that."""
    start = config.invocation_params.dir
    return file.relative_to(start) if file.is_relative_to(start) else file


def _environment(record: Record) -> dict[str, Any]:
    """What the `environment` of a budgets row is compared with, as environment.json has it."""
    import torch

    if not str(record.cell["device"]).startswith("cuda"):
        return {}
    return {"gpus": {"devices": [{"name": torch.cuda.get_device_name()}]}, "torch": {"cuda": torch.version.cuda}}
