"""Pictures hold the figures that were logged."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from ulmfit import plots

HISTORY = {
    "train_loss_step": [(0, 3.0), (1, 2.0), (2, 1.0)],
    "valid_loss": [(1, 2.5), (2, 2.25)],
    "lr_0": [(0, 0.1), (1, 0.2)],
    "lr_10": [(0, 0.5), (1, 0.6)],
    "lr_2": [(0, 0.3), (1, 0.4)],
}


def picture_size(path: Path) -> tuple[int, int]:
    """Reads a PNG to its end, each chunk's checksum included."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds, size = 8, [], (0, 0)
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        assert struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        kinds.append(kind)
        position += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and b"IDAT" in kinds
    return size


def lines(figure: Any) -> dict[str, list[tuple[float, float]]]:
    (axes,) = figure.axes
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.lines}


def test_losses() -> None:
    figure = plots.plot_losses(HISTORY)
    drawn = lines(figure)
    raw = next(points for label, points in drawn.items() if label.startswith("_"))
    assert raw == [(0, 3), (1, 2), (2, 1)]
    assert drawn["validation"] == [(1, 2.5), (2, 2.25)]
    # Exponential average, 0.9 of the past, divided by the weight so far: (0.1 * 2 + 0.09 * 3) / 0.19 and so on.
    smooth = [3.0, 0.47 / 0.19, 0.523 / 0.271]
    assert [y for _, y in drawn["training"]] == pytest.approx(smooth)
    assert figure.axes[0].get_xlabel() == "step"


def test_losses_of_a_history_without_steps() -> None:
    assert set(lines(plots.plot_losses({"valid_loss": [(3, 1.0)]}))) == {"validation"}
    assert lines(plots.plot_losses({})) == {}


def test_rates_of_the_groups_in_their_order() -> None:
    figure = plots.plot_rates(HISTORY)
    assert list(lines(figure).values()) == [HISTORY["lr_0"], HISTORY["lr_2"], HISTORY["lr_10"]]
    assert figure.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(lines(figure))
    assert lines(plots.plot_rates({"valid_loss": [(1, 1.0)]})) == {}


def test_confusion_matrix() -> None:
    matrix = [[8, 2, 0], [1, 3, 0], [0, 0, 0]]
    (axes,) = plots.plot_confusion(matrix, ["a", "b", "c"]).axes
    (image,) = axes.images
    assert image.get_array().tolist() == [[0.8, 0.2, 0], [0.25, 0.75, 0], [0, 0, 0]]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "8"),
        ((1, 0), "2"),
        ((0, 1), "1"),
        ((1, 1), "3"),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_range_test() -> None:
    figure = plots.plot_lr_find([0.01, 0.1, 1.0], [3.0, 2.0, 9.0], 0.05)
    curve, mark = figure.axes[0].lines
    assert curve.get_xydata().tolist() == [[0.01, 3], [0.1, 2], [1, 9]]
    assert list(mark.get_xdata()) == [0.05, 0.05]
    assert figure.axes[0].get_xscale() == "log"
    assert len(plots.plot_lr_find([0.1], [1.0], None).axes[0].lines) == 1


def test_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plots.plot_losses(HISTORY)
    path = plots.save(figure, tmp_path / "new" / "loss.png")
    width, height = picture_size(path)
    assert 400 < height < width < 2000

    def disk_full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(type(figure), "savefig", disk_full)
    with pytest.raises(OSError, match="No space"):
        plots.save(figure, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]


def test_many_classes_and_names_in_any_script(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(40)]
    matrix = [[int(i == j) for j in range(40)] for i in range(40)]
    figure = plots.plot_confusion(matrix, names)
    assert not figure.axes[0].texts  # too small to read
    assert picture_size(plots.save(figure, tmp_path / "many.png"))[0] < 3000
    picture_size(plots.save(plots.plot_confusion([[1, 0], [0, 1]], ["Größe $x", "a_b^{c"]), tmp_path / "signs.png"))


def test_pictures_of_a_run(trained: Path) -> None:
    for name in ("lm/loss.png", "lm/learning_rates.png", "classifier/loss.png", "classifier/confusion_matrix.png"):
        assert min(picture_size(trained / name)) > 200
    history = plots.read_history(trained / "classifier")
    assert {"train_loss_step", "train_loss_epoch", "valid_loss", "valid_accuracy", "lr_0", "lr_3"} <= set(history)
    assert [step for step, _ in history["valid_loss"]] == [3, 7]


def test_history_of_a_folder_without_logs(tmp_path: Path) -> None:
    assert plots.read_history(tmp_path) == {}


def test_later_attempts_win(tmp_path: Path) -> None:
    for attempt, rows in ((0, "1,0.5\n2,0.4\n"), (2, "2,0.3\n3,0.2\n"), (10, "3,0.1\n")):
        folder = tmp_path / "log" / f"attempt-{attempt}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,valid_loss\n{rows}")
    assert plots.read_history(tmp_path) == {"valid_loss": [(1, 0.5), (2, 0.3), (3, 0.1)]}
