"""What all pictures share: panels in rows, names as plain text, files that appear complete."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot
import pytest

from opsd.errors import UsageError
from opsd.report import plots


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
