"""What the bar says about the pace."""

import pytest

from modes_fx.progress import progress_bar, rate


@pytest.mark.parametrize(
    ("speed", "said"), [(None, ""), (0.0, ""), (12.34, "12.3/s"), (1.0, "1.0/s"), (0.25, "4.0 s each")]
)
def test_a_rate_is_said_in_the_unit_that_is_easier_to_read(speed, said):
    assert rate(speed) == said


def test_the_bar_shows_steps_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("measure", 4, enabled=True) as bar:
        for _ in range(3):
            bar.step()
        bar.note("a note")
    shown = capsys.readouterr().err
    assert "3/4" in shown and "/s" in shown and "0:00:0" in shown and "a note" in shown


def test_what_is_left_may_be_known_later(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("search", None, enabled=True) as bar:
        bar.step(2)
        bar.expect(5)
        bar.step()
    assert "3/7" in capsys.readouterr().err
