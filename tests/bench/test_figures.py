"""Figures of made-up results: what they show is what the rows say, and every word on them can be read."""

import itertools
import xml.etree.ElementTree as ElementTree

import matplotlib.text
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support import made_up_results as made_up

from bench import figures, page
from bench.tables import provenance

GPU_FREE = {"saved", "accesses", "host"}
NEEDS_GPU = {"training-step", "roofline", "optimizers"}
LONG_CPU = "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"


@pytest.fixture(scope="module")
def drawn():
    machine, rows = made_up.with_gpu()
    return figures.draw(machine | {"cpu": LONG_CPU, "torch": "2.13.0.dev20260131+cu130"}, rows)


def texts_on(figure, monkeypatch) -> list:
    """The texts that are drawn, with their boxes in pixels: a tick beyond an axis' end exists but is not."""
    found = []
    draw = matplotlib.text.Text.draw

    def recorded(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            found.append((text, text.get_window_extent(renderer)))

    with monkeypatch.context() as patched:
        patched.setattr(matplotlib.text.Text, "draw", recorded)
        FigureCanvasAgg(figure).draw()
    return found


def collisions(figure, monkeypatch) -> list[str]:
    """Pairs of texts whose boxes share pixels, and texts that reach beyond the page."""
    found = []
    texts = texts_on(figure, monkeypatch)
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > 0.5 and height > 0.5:
            found.append(f"{one.get_text()!r} and {other.get_text()!r}")
    page_box = figure.bbox
    for text, box in texts:
        if box.x0 < page_box.x0 or box.y0 < page_box.y0 or box.x1 > page_box.x1 or box.y1 > page_box.y1:
            found.append(f"{text.get_text()!r} leaves the page")
    return found


def test_each_figure_is_drawn_only_from_the_rows_it_needs(drawn):
    assert drawn.keys() == GPU_FREE | NEEDS_GPU
    assert figures.draw(*made_up.without_gpu()).keys() == GPU_FREE
    assert figures.draw(made_up.machine(), []) == {}


@pytest.mark.parametrize("name", sorted(GPU_FREE | NEEDS_GPU))
def test_no_text_covers_another_and_the_legend_covers_nothing(drawn, name, monkeypatch):
    figure = drawn[name]
    assert collisions(figure, monkeypatch) == []
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) >= 2
    for axes in figure.axes:
        assert not box.overlaps(axes.get_tightbbox())
    width, _ = figure.get_size_inches()
    assert width == 9  # README's width


def test_covered_text_and_text_beyond_the_page_are_found(monkeypatch):
    figure = figures.draw(*made_up.without_gpu())["host"]
    assert collisions(figure, monkeypatch) == []
    figure.text(0.02, 0.97, "covers the title", va="top")
    figure.text(0.95, 0.5, "reaches beyond the right edge of the page")
    covered, beyond = collisions(figure, monkeypatch)
    assert "covers the title" in covered
    assert "leaves the page" in beyond


@pytest.mark.parametrize("name", sorted(GPU_FREE | NEEDS_GPU))
def test_saved_as_svg_with_title_axis_labels_and_machine(drawn, name, tmp_path):
    path = tmp_path / "figure.svg"
    page.save(drawn[name], path)
    svg = ElementTree.parse(path).getroot()
    namespace = {"": "http://www.w3.org/2000/svg"}
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert svg.find("title", namespace).text == page.title_of(drawn[name])
    texts = {"".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    labelled = [axes for axes in drawn[name].axes if axes.axison]
    assert {axes.get_xlabel() for axes in labelled} - {""} <= texts
    assert {axes.get_ylabel() for axes in labelled} - {""} <= texts
    assert any(axes.get_xlabel() for axes in labelled)
    assert any(axes.get_ylabel() for axes in labelled)
    assert any("commit 0123abc" in text and "2001-02-03" in text for text in texts)
    assert "fill: #ffffff" in path.read_text()  # the page: white in a dark README, too


def test_training_bars_end_at_the_rows_ratios_with_their_bounds_beside(drawn):
    ours = [row for row in made_up.training_steps() if row["implementation"] == "fastnn" and row["feature"] == "mlp"]
    panels = [(graphed, baseline) for graphed in (False, True) for baseline in ours[graphed]["ratios"]]
    assert [graphed for graphed, _ in panels] == [False] * 3 + [True] * 2
    for axes, (graphed, baseline) in zip(drawn["training-step"].axes, panels, strict=True):
        assert ("ungraphed" in axes.get_title()) == (not graphed)
        assert f"over {baseline}," in axes.get_title().replace("\n", "")
        rows = [row for row in ours if row["graphed"] == graphed]
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert sorted(ends) == pytest.approx(sorted(row["ratios"][baseline] for row in rows))
        bounds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
        assert sorted(bounds) == pytest.approx(sorted(row["bounds"][baseline] for row in rows))
        assert any(list(line.get_xdata()) == [1, 1] for line in axes.lines)


def test_a_slower_rows_bar_points_the_other_way():
    row = made_up.timed("fastnn", 10.0, ratios={"eager": 0.5}, bounds={"eager": 1.2})
    (axes,) = figures.draw(made_up.machine(), [row])["training-step"].axes
    (bar,) = axes.patches
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == (1, 0.5)
    assert axes.get_xlim()[0] < 0.5


def test_saved_accesses_and_host_time_show_the_rows_numbers(drawn):
    _, rows = made_up.without_gpu()
    counts = [row for row in rows if row["kind"] == "counted"]
    saved = {(row["case"], row["implementation"]): row["value"] for row in counts if "saved" in row["figure"]}
    expected = [100 * saved[case, "fastnn"] / saved[case, "eager"] for case, name in saved if name == "eager"]
    (axes,) = drawn["saved"].axes
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx(sorted(expected))
    (axes,) = drawn["accesses"].axes
    expected = [row["value"] for row in counts if "accesses of [M, N]" in row["figure"]]
    assert sorted(bar.get_width() for bar in axes.patches) == sorted(expected)
    (axes,) = drawn["host"].axes
    best = {(row["case"], row["implementation"]): row["best_us"] for row in rows if row["kind"] == "host"}
    expected = [100 * best[case, "fastnn"] / time for (case, name), time in best.items() if name != "fastnn"]
    lines = [line for line in axes.lines if len(line.get_ydata()) == 3]
    assert sorted(value for line in lines for value in line.get_ydata()) == pytest.approx(sorted(expected))


def test_roofline_and_optimizers_show_every_row_once(drawn):
    _, rows = made_up.with_gpu()
    timed = [row for row in rows if row["kind"] == "timed"]
    (axes,) = drawn["roofline"].axes
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    ours = [row for row in timed if row["implementation"] == "fastnn" and row["flops"]]
    assert sorted(dots) == sorted((row["flops"] / row["bytes"], row["tflop_s"]) for row in ours)
    roofs = [line.get_ydata()[1] for line in axes.lines if len(line.get_xdata()) == 2]
    assert sorted(set(roofs)) == [50, 400, 700]
    values = [y for axes in drawn["optimizers"].axes for line in axes.lines for y in line.get_ydata()]
    assert sorted(values) == sorted(row["median_us"] for row in timed if row["feature"] == "optimizer")


def test_the_host_figure_names_the_processor_and_the_others_the_device():
    machine, rows = made_up.without_gpu()
    for name, figure in figures.draw(machine, rows).items():
        texts = [text.get_text() for text in figure.texts]
        assert (provenance(machine, host=True) in texts) == (name == "host")
        assert (provenance(machine) in texts) == (name != "host")
