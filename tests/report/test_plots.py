"""What all pictures share: panels in rows, names as plain text, files that appear whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsd.errors import UsageError
from opsd.report import plots


@pytest.mark.parametrize(
    ("panels", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 3), (7, 3, 3)]
)
def test_panels_stand_in_rows_of_three(panels, rows, columns):
    figure, axes = plots.small_multiples(panels)
    assert len(axes) == panels
    assert axes[0].get_subplotspec().get_gridspec().get_geometry() == (rows, columns)
    assert list(figure.get_size_inches()) == [4.2 * columns, 3.0 * rows]
    # The places that are left over show nothing.
    assert [axis.axison for axis in figure.axes] == [True] * panels + [False] * (rows * columns - panels)


def test_no_display_and_no_global_state_is_needed(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    import matplotlib.pyplot

    before = matplotlib.pyplot.get_fignums()
    plots.small_multiples(2)
    assert matplotlib.pyplot.get_fignums() == before


@pytest.mark.parametrize("ending", plots.FORMATS)
def test_a_picture_appears_whole(tmp_path, ending):
    figure, (axis,) = plots.small_multiples(1)
    axis.plot([0, 1], [0, 1])
    plots.label(axis, title="t", x="x", y="y")
    path = tmp_path / "new" / f"picture{ending}"
    plots.save(figure, path)
    assert path.stat().st_size > 1000
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    figure, _ = plots.small_multiples(1)
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        plots.save(figure, path)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.png.txt"])
def test_an_ending_that_is_no_picture(name):
    with pytest.raises(UsageError, match=r"must end in \.png, \.pdf, \.svg"):
        plots.check_picture(Path(name))


def test_a_folder_is_no_picture(tmp_path):
    (tmp_path / "x.PNG").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        plots.check_picture(tmp_path / "x.PNG")


def test_a_legend_shows_names_as_they_are():
    assert plots.plain("a$b$") == r"a\$b\$"
    assert plots.plain("x" * 50) == "x" * 39 + "…"


def test_the_colours_differ():
    assert len(set(plots.COLOURS)) == len(plots.COLOURS) == 8
