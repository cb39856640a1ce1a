"""history.py: the record of ranks over time, as text, as a plot, and through plain containers."""

from __future__ import annotations

import copy
import pickle

import pytest

from minirank.allocators.history import History, Update


def history():
    names = [f"layer.{i}" for i in range(7)]
    result = History(dict.fromkeys(names, 2))
    result.updates.append(Update(10, result.initial, {}, {}, 1400))
    moved = {**result.initial, "layer.0": 1, "layer.1": 4, "layer.2": 2, "layer.3": 1}
    result.updates.append(
        Update(20, moved, {"layer.0": 1, "layer.3": 2}, {"layer.1": 2, "layer.3": 1}, 1500)
    )
    given = dict.fromkeys(names, 1)
    result.updates.append(
        Update(
            30, {n: r + 1 for n, r in moved.items()}, {}, given, 11600, ("layer.0.x", "layer.1.x")
        )
    )
    return result


def test_text():
    lines = str(history()).splitlines()
    assert lines[0] == "14 ranks over 7 modules, 3 updates"
    assert lines[1].split() == ["step", "ranks", "parameters", "pruned", "from", "→", "to"]
    assert lines[2].split() == ["10", "14", "1,400", "0", "nothing", "moved"]
    assert lines[3].split(maxsplit=4) == [
        "20",
        "14",
        "1,500",
        "3",
        "layer.0, 2× layer.3 → 2× layer.1, layer.3",
    ]
    assert [line.strip() for line in lines[4:]] == [
        "30     21      11,600       0  none",
        "→ layer.0, layer.1, layer.2, layer.3, 3 more",
        "(optimizer state reset: 2 entries)",
    ]
    assert str(History({"a": 1})) == "1 ranks over 1 modules, 0 updates"


def test_totals():
    assert [update.total_rank for update in history().updates] == [14, 14, 21]


def test_state_dict_is_plain_and_complete():
    original = history()
    state = pickle.loads(pickle.dumps(original.state_dict()))
    kept = copy.deepcopy(state)
    again = History.from_state_dict(state)
    assert again == original
    again.updates.clear()
    assert state == kept


def test_the_plot_shows_every_module_at_every_update(tmp_path):
    pytest.importorskip("matplotlib")
    figure = history().plot(str(tmp_path / "ranks.png"))
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"layer.{i}" for i in range(7)
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "10", "20", "30"]
    image = axes.images[0].get_array()
    assert image.shape == (7, 4)
    assert image[1].tolist() == [2, 2, 4, 5]
    shown = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert shown[1, 0] == "2"
    assert (1, 1) not in shown  # nothing changed there
    assert shown[1, 2] == "4"
