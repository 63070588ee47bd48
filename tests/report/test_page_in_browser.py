"""The page in a real browser, headless: what a reader clicks, sees and hears."""

from __future__ import annotations

import os
import shutil

import pytest

from builders import a_measured_cell, a_record, a_run, a_sweep, measured
from meftbench.report.render.report import write_report
from meftbench.report.results import frame_of
from meftbench.report.views.scores import results, tables
from scored_runs import scored_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None and not os.environ.get("CI_BROWSER"):
    pytest.skip("no Chromium is installed", allow_module_level=True)

HOSTILE = '"><script>document.title="broken"</script><img src=x onerror=alert(2)>\x1b[31m\u202e=cmd|1'
READY = "document.documentElement.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def records():
    """Four methods over four shapes, one cell of which ran out of memory, and one whose texts are hostile."""
    buffers = [
        {"bytes": 2**20, "count": 2, "category": "activations", "op": "mm.default", "shape": [8, 64],
         "dtype": "float32", "place": "layer 0"},
        {"bytes": 2**19, "count": 1, "category": "parameters", "op": "empty.default", "shape": [64],
         "dtype": "float32", "place": "model"},
    ]  # fmt: skip
    swept = a_sweep(["full", "lora", "meft1", "meft1-exact"], (1, 8), (16, 32))
    out_of_memory = a_record("oom", method="parallel", batch_size=8, micro_batch_size=8, sequence_length=32)
    hostile = a_measured_cell(
        "lora",
        batch_size=4,
        micro_batch_size=4,
        sequence_length=16,
        observed={"label": f"{HOSTILE}/lora/b4/s16", "model": HOSTILE},
        metrics={"peak_buffers": buffers},
    )
    return [*swept, out_of_memory, hostile]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = a_run(folder / "run", *records(), name="toy")
    write_report([run], folder / "out", {"html"})
    return folder / "out" / "report.html"


class Opened:
    """A page in a tab. said: what it wrote to the console.  requested: what it asked for beside itself."""

    def __init__(self, browser, file, width=1280, scheme="light", **context):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **context)
        self.tab = self.context.new_page()
        self.said, self.requested = [], []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.requested.append(request.url))
        self.tab.goto(file.as_uri())
        if context.get("java_script_enabled", True):
            self.tab.wait_for_function(READY)


@pytest.fixture
def opened(browser, file):
    pages = []

    def open_page(of=file, **options):
        pages.append(Opened(browser, of, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


def rows(tab):
    """Label and first columns of the rows that are shown, without opened details."""
    return tab.locator("#table-steps tbody tr[id]").all_inner_texts()


def test_it_opens_from_a_file_without_a_request_or_an_error(opened, file):
    """Nor does text from records run, or become an element."""
    page = opened()

    assert [] == page.said
    beside = {url for url in page.requested if not url.startswith(("data:", "blob:"))}
    assert beside == {file.as_uri()}
    assert "meftbench: toy" == page.tab.title()
    assert 0 == page.tab.locator("img[onerror]").count()


def test_without_scripts_it_has_answer_pictures_and_tables(opened):
    """Better with JavaScript, readable without."""
    page = opened(java_script_enabled=False)

    assert page.tab.locator(".answer p").first.inner_text()
    assert 18 == len(rows(page.tab))
    assert page.tab.locator("figure img").first.is_visible()
    assert not page.tab.locator("#old").is_visible()


def test_a_table_sorts_both_ways_and_what_is_not_taken_comes_last(opened):
    """By number, not by text."""
    page = opened()
    button = page.tab.locator("#table-steps thead th", has_text="activation").first.locator("button")

    def column():
        texts = page.tab.locator('#table-steps tbody tr[id] td[data-label="activation MiB"]').all_inner_texts()
        return [text.split()[0] if text.strip() else "-" for text in texts]

    button.click()
    rising = column()
    button.click()
    falling = column()

    for values in (rising, falling):
        assert 18 == len(values)
        assert "-" == values[-1]
    numbers = [float(text.replace(",", "")) for text in rising if text != "-"]
    assert numbers == sorted(numbers) != [float(text.replace(",", "")) for text in falling if text != "-"]
    assert "descending" == page.tab.locator("#table-steps thead th[aria-sort]").get_attribute("aria-sort")


def test_a_table_is_filtered_by_words_and_by_choice(opened):
    """And says how many cells are left."""
    page = opened()
    page.tab.locator("#table-steps input[type=search]").fill("meft1-exact s32")
    assert 2 == len(rows(page.tab))
    assert "2 cells" == page.tab.locator("#table-steps [role=status]").inner_text()

    page.tab.locator("#table-steps input[type=search]").fill("")
    page.tab.locator("#table-steps").get_by_label("method name").select_option("lora")
    assert 5 == len(rows(page.tab))


def test_a_row_opens_what_show_knows_of_the_cell(opened):
    """With the command that runs it again, as text, and the buffers as boxes within boxes."""
    page = opened()
    page.tab.locator("#table-steps input[type=search]").fill("b4/s16")
    row = page.tab.locator("#table-steps tbody tr[id]").first
    row.locator("button").click()
    detail = page.tab.locator("#table-steps .detail")
    detail.wait_for()

    assert "meftbench run" in detail.inner_text()
    assert "peak_allocated_bytes" in detail.inner_text()
    assert 6 == detail.locator(".flame .part").count()
    assert "true" == row.locator("button").get_attribute("aria-expanded")
    row.locator("button").click()
    assert 0 == page.tab.locator("#table-steps .detail").count()


def a_row(size, module, op="mm.default", category="activations", **more):
    return {"bytes": size, "count": 2, "category": category, "op": op, "shape": [8, 64], "dtype": "float32",
            "place": "modeling:forward", "module": module} | more  # fmt: skip


MODULES = [
    a_row(6 * 2**20, "bert.encoder.layer.*.attention.query"),
    a_row(2**20, "bert.encoder.layer.*.attention.query", op="add.Tensor"),
    a_row(3 * 2**20, "bert.encoder.layer.*.output"),
    a_row(2**20, "", op="loss.default"),
    a_row(4 * 2**20, "bert.encoder.layer.*.output", category="gradients"),
    a_row(2**20, None, op="given", category="inputs"),
]


@pytest.fixture
def with_modules(tmp_path):
    """The page of a cell whose buffers name modules."""
    record = a_measured_cell("lora", metrics={"peak_buffers": MODULES})
    write_report([a_run(tmp_path / "run", record, name="toy")], tmp_path / "out", {"html"})
    return tmp_path / "out" / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (320, "dark"), (1280, "light"), (1280, "dark")])
def test_buffers_lie_in_the_boxes_of_their_modules(opened, with_modules, width, scheme):
    """Category, then the path of the module level by level, then the operator: each with its bytes and its share of all
    16 MiB, the largest first. Levels that lead to one module alone are one box. Nothing is wider than the page."""
    page = opened(with_modules, width=width, scheme=scheme)
    page.tab.locator("#table-steps tbody tr[id] button.open").first.click()
    flame = page.tab.locator(".flame")
    flame.wait_for()

    nested = page.tab.evaluate(
        """() => { const texts = part => [part.querySelector(":scope > span").textContent,
          [...part.querySelectorAll(":scope > .within > .part")].map(texts)];
        return [...document.querySelectorAll(".flame > .part")].map(texts); }"""
    )
    assert [
        ["activations: 11 MiB, 69 %", [
            ["bert.encoder.layer.*: 10 MiB, 63 %", [
                ["attention.query: 7 MiB, 44 %", [
                    ["mm.default 8 × 64 float32: 6 MiB, 38 %", []], ["add.Tensor 8 × 64 float32: 1 MiB, 6.3 %", []]]],
                ["output: 3 MiB, 19 %", [["mm.default 8 × 64 float32: 3 MiB, 19 %", []]]]]],
            ["the model itself: 1 MiB, 6.3 %", [["loss.default 8 × 64 float32: 1 MiB, 6.3 %", []]]]]],
        ["gradients: 4 MiB, 25 %", [
            ["bert.encoder.layer.*.output: 4 MiB, 25 %", [["mm.default 8 × 64 float32: 4 MiB, 25 %", []]]]]],
        ["inputs: 1 MiB, 6.3 %", [["no module: 1 MiB, 6.3 %", [["given 8 × 64 float32: 1 MiB, 6.3 %", []]]]]],
    ] == nested  # fmt: skip
    title = flame.locator(".part", has_text="add.Tensor").last.get_attribute("title")
    whole = "bert.encoder.layer.*.attention.query"
    assert (
        f"add.Tensor 8 × 64 float32: 1 MiB, 6.3 % of these buffers, 2 of them, of {whole}, in modeling:forward" == title
    )
    assert "by category, module and operator" in flame.get_attribute("aria-label")
    table = page.tab.locator("#table-steps .detail table", has_text=whole)
    assert "7.0 MiB (counted)" in table.last.locator("tr", has_text=whole).inner_text()
    assert width >= page.tab.evaluate("document.documentElement.scrollWidth")
    if width == 320:  # each box has a line of its own, in which its whole text can be read
        cut = page.tab.evaluate(
            "[...document.querySelectorAll('.flame span')].filter(s => s.scrollWidth > s.clientWidth).length"
        )
        assert 0 == cut


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "wide"), [(320, False), (1280, False), (1280, True)])
def test_the_head_of_a_long_table_stays_in_view(opened, tmp_path, width, wide, scheme):
    """At the top of the screen, or of the part that scrolls where the table is wider than the page; nothing shines
    through. On a telephone, where rows are cards, it is a strip of buttons to sort by."""
    cells = [a_measured_cell("lora", batch_size=b, micro_batch_size=b) for b in range(1, 60)]
    write_report([a_run(tmp_path / "run", *cells, name="toy")], tmp_path / "out", {"html"})
    page = opened(tmp_path / "out" / "report.html", width=width, scheme=scheme)
    if wide:
        page.tab.add_style_tag(content="table.cells { min-width: 3000px; }")
        page.tab.wait_for_function("!document.querySelector('#table-steps .scroll.fits')")

    places = page.tab.evaluate(
        """() => {
        const box = document.querySelector("#table-steps .scroll");
        box.scrollIntoView();
        box.scrollTop = 700;
        if (box.scrollTop === 0) scrollBy(0, 700);
        box.scrollLeft = 200;
        const head = box.querySelector("thead th");
        const at = head.getBoundingClientRect();
        const under = document.elementFromPoint(Math.max(at.left, 20) + 5, at.top + at.height / 2);
        const whole = box.querySelector("thead");
        const back = getComputedStyle(getComputedStyle(head).position === "sticky" ? head : whole).backgroundColor;
        const below = at.top - Math.max(0, box.getBoundingClientRect().top);
        return [Math.round(below), box.scrollTop > 0, whole.contains(under), back,
          getComputedStyle(document.body).backgroundColor];
        }"""
    )

    assert 0 <= places[0] < 12
    assert [wide, True] == places[1:3]
    assert places[3] == places[4]
    page.tab.locator("#table-steps thead button", has_text="method").click()
    assert "ascending" == page.tab.locator("#table-steps thead th[aria-sort]").get_attribute("aria-sort")
    assert [] == page.said


def test_axes_are_offered_by_group_with_heading_and_unit(opened, file):
    """As the tables call them, not by their names in records; each once."""
    page = opened()
    groups = page.tab.evaluate(
        """() => [...document.querySelectorAll("#chart select")[0].children].map(group =>
        [group.label, Object.fromEntries([...group.children].map(option => [option.value, option.textContent]))])"""
    )

    assert ["shape", "memory", "speed", "exactness", "other"] == [label for label, _ in groups]
    by_group = dict(groups)
    assert "activation (MiB)" == by_group["memory"]["activation_peak_bytes"]
    assert "step time (ms)" == by_group["speed"]["step_time_s"]
    assert "reconstruction error" == by_group["exactness"]["reconstruction_rel_max"]
    assert "trained parameters" == by_group["other"]["parameters_trainable"]
    texts = [text for _, names in groups for text in names.values()]
    assert len(texts) == len(set(texts))
    assert [] == [text for text in texts if "_" in text]


def test_a_link_to_a_cell_opens_it(opened, file):
    """Also where the table is filtered, or on another page of the table."""
    page = opened()
    anchor = page.tab.locator("#table-steps tbody tr[id]").last.get_attribute("id")
    page.tab.locator("#table-steps input[type=search]").fill("nothing at all")
    page.tab.evaluate(f"location.hash = '{anchor}'")
    page.tab.locator("#table-steps .detail").wait_for()

    assert page.tab.locator(f"#{anchor}").is_visible()


def test_the_chart_changes_axes_and_says_a_point_with_its_sources(opened):
    """Under the pointer: label, both numbers, unit, and where each comes from."""
    page = opened()
    chart = page.tab.locator("#chart")
    chart.locator("select").nth(0).select_option("sequence_length")
    chart.locator("select").nth(1).select_option("activation_peak_bytes")
    chart.locator("select").nth(2).select_option("")
    assert "activation against sequence length" in chart.locator(".canvas").get_attribute("aria-label")
    chart.scroll_into_view_if_needed()
    x, y = page.tab.evaluate(
        """() => { const { plot, points, units } = window.meftbench.chart;
        const [point, box] = [points.at(-1), plot.over.getBoundingClientRect()];
        const at = axis => plot.valToPos(point[axis] / units[axis].size, axis);
        return [box.left + at("x"), box.top + at("y")];
        }"""
    )
    page.tab.mouse.move(x, y)

    said = chart.locator(".tip").inner_text()
    assert "MiB (counted)" in said
    assert "sequence length (tokens): " in said
    assert "null" not in said
    chart.locator("input[type=checkbox]").nth(1).check()
    assert [] == page.said


def test_the_legend_filters_methods(opened):
    """One, all, none."""
    page = opened()
    chart = page.tab.locator("#chart")
    count = "window.meftbench.chart.points.length"
    whole = page.tab.evaluate(count)
    chart.locator(".legend button", has_text="none").click()
    assert 0 == page.tab.evaluate(count)
    chart.locator(".legend button", has_text="full").last.click()
    assert 1 <= page.tab.evaluate(count) < whole
    chart.locator(".legend button", has_text="all").first.click()
    assert whole == page.tab.evaluate(count)
    assert [] == page.said


def test_what_is_shown_is_saved_as_csv_and_png(opened):
    """No field of the CSV is a formula."""
    page = opened()
    with page.tab.expect_download() as download:
        page.tab.locator("#chart button", has_text="CSV").click()
    text = download.value.path().read_text()
    assert text.startswith("label,peak_allocated_bytes [byte],peak_allocated_bytes_source,")
    assert not [line for line in text.splitlines() if line.startswith(("=", "+", "@"))]
    with page.tab.expect_download() as download:
        page.tab.locator("#chart button", has_text="PNG").click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_the_map_shows_where_memory_ends(opened):
    """A field for each shape; those that did not end ok say how they ended."""
    page = opened()
    fields = page.tab.locator("#heat td button")

    assert 4 == fields.count()
    fields.first.click()
    page.tab.locator("#table-steps .detail").wait_for()


@pytest.mark.parametrize("width", [320, 1280, 3840])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_at_any_width(opened, width, scheme):
    """What is wider than the page scrolls within itself; the page does not. No two rows or controls overlap."""
    page = opened(width=width, scheme=scheme)

    assert width >= page.tab.evaluate("document.documentElement.scrollWidth")
    overlapping = page.tab.evaluate(
        """() => {
        const controls = document.querySelectorAll("#chart .controls > *, #table-steps .controls > *, .legend button");
        const boxes = [...controls].map(each => [each, each.getBoundingClientRect()]).filter(([, box]) => box.width);
        const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
        return boxes.flatMap(([one, box], i) => boxes.slice(i + 1)
          .filter(([other, its]) => !one.contains(other) && !other.contains(one) && meet(box, its))
          .map(([other]) => [one.textContent, other.textContent]));
        }"""
    )
    assert [] == overlapping


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_axe_finds_nothing_serious(opened, scheme, width):
    """With an opened row, in both schemes."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened(scheme=scheme, width=width)
    page.tab.locator("#table-steps tbody tr[id] button").first.click()
    page.tab.locator("#table-steps .detail").wait_for()

    found = axe.run(page.tab).response["violations"]
    serious = [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found
               if each["impact"] in ("serious", "critical")]  # fmt: skip
    assert [] == serious


def test_two_runs_begin_with_what_differs(opened, tmp_path):
    """Settings and environment first, then the numbers that changed."""
    before = a_run(tmp_path / "a", a_measured_cell(), name="before", run_id="a")
    grown = a_measured_cell(metrics={"activation_peak_bytes": 10**9, "step_time_s": measured(9.0)})
    after = a_run(tmp_path / "b", grown, name="after", run_id="b", protocol={"warmup": 1, "steps": 3})
    write_report([before, after], tmp_path / "out", {"html"})

    page = opened(tmp_path / "out" / "report.html")

    assert "What differs" == page.tab.locator("main h2").first.inner_text()
    assert "before and after" in page.tab.locator("main h3").first.inner_text()
    assert "activation_peak_bytes" in page.tab.locator("section").first.inner_text()


def test_seeds_of_a_training_are_one_point_with_their_spread(opened, tmp_path):
    """At the learning rate that validation chose; not the luckiest seed."""
    run = a_run(tmp_path / "run", *scored_run(("rte",)), name="toy")
    write_report([run], tmp_path / "out", {"html"})
    (table,) = tables(results(frame_of(run)))

    page = opened(tmp_path / "out" / "report.html")
    points = page.tab.evaluate("window.meftbench.chart.points.map(p => [p.name, p.y, p.deviation])")

    assert {line[0]: line[1] for line in table.lines} == {name: f"{y:.3f} ± {spread:.3f}" for name, y, spread in points}


def test_a_line_joins_cells_that_differ_in_the_axis_alone(opened):
    """Two batch sizes are two lines, not one that goes back and forth."""
    page = opened()
    page.tab.locator("#chart button", has_text="memory by length").click()

    paths = page.tab.evaluate("window.meftbench.chart.points.filter(p => p.name === 'full').map(p => [p.path, p.x])")
    lines = {path: [x for of, x in paths if of == path] for path, _ in paths}
    assert [[16, 32], [16, 32]] == list(lines.values())


@pytest.mark.parametrize("metric", ["gradient_rel_max", "reconstruction_rel_max"])
def test_zeros_on_a_logarithmic_axis_are_said(opened, metric):
    """They have no place there; the page does not fail."""
    page = opened()
    chart = page.tab.locator("#chart")
    chart.locator("select").nth(1).select_option(metric)
    chart.get_by_label("logarithmic up").check()

    zeros = page.tab.evaluate(f"window.meftbench.chart.data.numbers['{metric}'].filter(value => value === 0).length")
    assert zeros == 0 or "left out" in chart.locator("[role=status]").inner_text()
    assert [] == page.said
