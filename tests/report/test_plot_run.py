"""plot_run.py: every logged quantity reaches its panel, runs overlay; what all pictures share."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.pyplot
import pandas as pd
import pytest

import plot_run
from opsd.errors import ArtefactError, UsageError, run_cli
from opsd.objectives import METHODS
from opsd.report import plots, run_plots
from opsd.report.run_plots import PANELS, load_run, load_runs, panels_of, smoothed

COMMON = {
    "loss": 0.5,
    "learning_rate": 1e-3,
    "loss/divergence": 0.2,
    "rollout/truncated_share": 0.1,
    "student/entropy": 0.6,
    "teacher/entropy": 0.4,
}


def log_run(folder: Path, *, steps: int = 6, tail: str = "", **extra: float | None) -> Path:
    """A run folder whose metrics.jsonl holds `steps` lines."""
    folder.mkdir(parents=True)
    rows = [{"step": k, **{n: v + 0.01 * k for n, v in COMMON.items()}, **extra} for k in range(1, steps + 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


def drawn(monkeypatch, folders: list[Path], path: Path, **options):
    """The figure that `draw` would have saved."""
    figures = []
    monkeypatch.setattr(run_plots.plots, "save", lambda figure, path: figures.append(figure))
    run_plots.draw(load_runs(folders), path, **options)
    return figures[0]


def panel(figure, title: str):
    return next(axis for axis in figure.axes if axis.get_title(loc="left") == title)


@pytest.mark.parametrize(("ending", "magic"), [("svg", b"<?xml"), (None, b"\x89PNG")])
def test_runs_become_a_picture(tmp_path, capsys, ending, magic):
    runs = [log_run(tmp_path / r"a$\frac{$b")]  # no formula
    output, flags = runs[0] / "metrics.png", []
    if ending:
        runs.append(log_run(tmp_path / "b"))
        output = tmp_path / "pictures" / f"both.{ending}"
        flags = ["--output", str(output), "--smooth", "3"]
    assert plot_run.main([*map(str, runs), *flags]) == 0
    assert output.read_bytes().startswith(magic)
    assert capsys.readouterr().out == f"{output}\n"


def test_the_lines_hold_the_logged_values(tmp_path, monkeypatch):
    runs = [log_run(tmp_path / "one"), log_run(tmp_path / "two", steps=4, **{"method/mean_weight": 0.77})]
    figure = drawn(monkeypatch, runs, tmp_path / "x.png")
    entropy = panel(figure, "Entropy").lines
    assert [(list(line.get_xdata()), line.get_linestyle()) for line in entropy] == [
        ([1, 2, 3, 4, 5, 6], "-"),
        ([1, 2, 3, 4, 5, 6], "--"),
        ([1, 2, 3, 4], "-"),
        ([1, 2, 3, 4], "--"),
    ]
    assert list(entropy[0].get_ydata()) == pytest.approx([0.6 + 0.01 * k for k in range(1, 7)])
    assert list(entropy[3].get_ydata()) == pytest.approx([0.4 + 0.01 * k for k in range(1, 5)])
    # One colour a run, the same in every panel.
    colours = [line.get_color() for line in entropy]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    weight = panel(figure, "PW-OPSD: mean position weight").lines
    assert [line.get_color() for line in weight] == [colours[2]]
    # The constant stays inside its panel, which starts at 0.
    low, high = panel(figure, "PW-OPSD: mean position weight").get_ylim()
    assert low == 0 < 0.77 < high
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_the_running_mean_lies_over_the_faint_raw_values(tmp_path, monkeypatch):
    figure = drawn(monkeypatch, [log_run(tmp_path / "one")], tmp_path / "x.png", smooth=3)
    raw, mean = panel(figure, "Loss (each method has its own)").lines
    assert raw.get_alpha() < 0.5
    assert list(mean.get_ydata()) == pytest.approx(list(smoothed(pd.Series(raw.get_ydata()), 3)))
    assert "running mean over 3 steps" in figure.get_suptitle()
    # The schedule of the learning rate is no noise.
    (rate,) = panel(figure, "Learning rate").lines
    assert list(rate.get_ydata()) == pytest.approx([1e-3 + 0.01 * k for k in range(1, 7)])


def test_the_mean_looks_back_and_passes_over_what_is_missing():
    assert list(smoothed(pd.Series([1.0, 2.0, 6.0, 4.0]), 3)) == pytest.approx([1.0, 1.5, 3.0, 4.0])
    found = smoothed(pd.Series([1.0, math.nan, 3.0]), 2)
    assert list(found.isna()) == [False, True, False]
    assert list(found.dropna()) == [1.0, 3.0]


def test_a_left_out_step_is_a_gap(tmp_path):
    """The trainer writes null where a step had no finite number."""
    run = load_run(log_run(tmp_path / "one", loss=None))
    assert run["loss"].isna().all()
    assert len(run["loss"]) == 6
    assert "Loss (each method has its own)" not in [title for title, _ in panels_of([run])]


def test_every_metric_of_the_methods_has_a_title(tmp_path):
    """What a reduction logs is drawn under a name and unit of its own, and nothing has a title in vain."""
    import torch

    from opsd.objectives import Hyperparameters, ReductionInput, TokenStats

    ones = torch.ones(4)
    names = dict.fromkeys(vars(TokenStats(**dict.fromkeys(TokenStats.__annotations__, ones))), ones)
    logged = set()
    for method in METHODS.values():
        reduction = method.reduce(
            ReductionInput(TokenStats(**names), torch.tensor([1, 3])), Hyperparameters()
        )
        logged |= set(reduction.metrics)
    assert logged == {key for key in PANELS if key.startswith("method/")}


def test_the_trainer_logs_what_the_panels_show():
    """Every key of a panel is one that the trainer or transformers writes: a renamed one would go missing."""
    folder = Path(run_plots.__file__).parents[1]
    source = "".join((folder / name).read_text("utf-8") for name in ("trainer.py", "step_metrics.py"))
    for key in PANELS:
        written_elsewhere = key in ("loss", "grad_norm", "learning_rate") or key.startswith("method/")
        assert written_elsewhere or f'"{key}"' in source, key


def test_an_unknown_method_metric_is_drawn_under_its_key(tmp_path, monkeypatch):
    figure = drawn(monkeypatch, [log_run(tmp_path / "one", **{"method/novel": 2.0})], tmp_path / "x.png")
    assert panel(figure, "method/novel").lines


def test_a_run_in_progress_is_drawn_without_the_line_being_written(tmp_path, caplog):
    run = load_run(log_run(tmp_path / "one", tail='{"step": 7, "lo'))
    assert list(run["loss"].index) == [1, 2, 3, 4, 5, 6]
    assert "incomplete" in caplog.text


DAMAGED = (
    '{"step": 7, "lo',
    "[1, 2]",
    '{"loss": 0.5}',
    '{"step": 7, "loss": "high"}',
    '{"step": 7, "loss": true}',
    "",
    "\x00\x00",
    '{"step": 7, "loss": 1e999}',
    '{"step": 7, "loss": 1' + 400 * "0" + "}",
    '{"step": 1' + 400 * "0" + ', "loss": 1}',
    '{"step": -7, "loss": 1}',
    '{"step": 7, "\\ud800": 1}',
)


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_named(tmp_path, line):
    run = log_run(tmp_path / "one", tail=f"{line}\n")
    with pytest.raises(ArtefactError, match=r"line 7 of .*metrics\.jsonl' is damaged"):
        load_run(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no folder", "is no folder"),
        (None, "holds no metrics.jsonl"),
        ("", "holds no logged step yet"),
        ('{"step": 1, "lo', "holds no logged step yet"),
        ('{"step": 3, "train_runtime": 2.0}\n', "holds no logged step yet"),
    ],
)
def test_no_logged_step(tmp_path, capsys, content, message):
    run = tmp_path / "one\x1b[2J"
    if content != "no folder":
        run.mkdir()
        if content is not None:
            (run / "metrics.jsonl").write_text(content)
    assert run_cli(lambda: plot_run.main([str(run)])) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "\x1b" not in error
    assert not (run / "metrics.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--smooth", "0"], "--smooth is 0"),
        (["x"] * 8 + ["--output", "x.png"], "at most 8"),
        (["--output", "x.gif"], r"must end in \.png"),
        (["SECOND"], "need --output"),
        (["SAME", "--output", "x.png"], "given twice"),
    ],
)
def test_wrong_arguments(tmp_path, flags, message):
    run = log_run(tmp_path / "one")
    names = {"SECOND": log_run(tmp_path / "two"), "SAME": run}
    with pytest.raises(UsageError, match=message):
        plot_run.main([str(run), *(str(names.get(flag, flag)) for flag in flags)])


def test_equal_names_are_told_apart(tmp_path):
    runs = load_runs([log_run(tmp_path / seed / "small_opsd") for seed in ("t1", "t2")])
    assert list(runs) == ["t1/small_opsd", "t2/small_opsd"]


@pytest.mark.parametrize(("panels", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (4, 2, 3), (7, 3, 3)])
def test_panels_stand_in_rows_of_three(monkeypatch, panels, rows, columns):
    monkeypatch.delenv("DISPLAY", raising=False)
    before = matplotlib.pyplot.get_fignums()
    figure, axes = plots.small_multiples(panels)
    assert matplotlib.pyplot.get_fignums() == before, "no global state"
    assert len(axes) == panels
    assert axes[0].get_subplotspec().get_gridspec().get_geometry() == (rows, columns)
    assert list(figure.get_size_inches()) == [4.2 * columns, 3.0 * rows]
    # The places that are left over show nothing.
    assert [axis.axison for axis in figure.axes] == [True] * panels + [False] * (rows * columns - panels)


@pytest.mark.parametrize("ending", plots.FORMATS)
def test_a_picture_appears_complete_or_not_at_all(tmp_path, monkeypatch, ending):
    figure, (axis,) = plots.small_multiples(1)
    axis.plot([0, 1], [0, 1])
    plots.label(axis, title="t", x="x", y="y")
    path = tmp_path / "new" / f"picture{ending}"
    plots.save(figure, path)
    before = path.read_bytes()
    assert len(before) > 1000
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        plots.save(figure, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.png.txt", "folder.PNG"])
def test_a_wrong_ending_and_a_folder_are_refused(tmp_path, name):
    (tmp_path / "folder.PNG").mkdir()
    with pytest.raises(UsageError, match=r"is a folder|must end in \.png, \.pdf, \.svg"):
        plots.check_picture(tmp_path / Path(name))


def test_names_are_plain_and_colours_differ():
    assert plots.plain("a$b$") == r"a\$b\$"
    assert plots.plain("x" * 50) == "x" * 39 + "…"
    assert len(set(plots.COLOURS)) == len(plots.COLOURS) == 8
