import io

import pytest

from micro import progress
from micro.progress import Progress, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_without_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    out = io.StringIO()
    with Progress("training", total=4, file=out) as bar:
        bar.advance(note="loss 2.5")
        bar.update(3)
        bar.say("checkpoint written")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("training: 1/4 steps")
    assert "loss 2.5" in lines[0]
    assert lines[2] == "checkpoint written"
    assert lines[-1].startswith("training: 3/4 steps")
    assert "\x1b" not in out.getvalue()


def test_lines_are_rare():
    out = io.StringIO()
    assert list(track(range(1000), "reading", file=out)) == list(range(1000))
    assert out.getvalue().splitlines() == [f"reading: 1000/1000 steps, {0} s"]


def test_a_bar_on_a_terminal():
    out = Terminal()
    with Progress("reading", total=2, file=out) as bar:
        bar.advance(2, note="almost")
        bar.say("a [line] with brackets")
    assert "2/2" in out.getvalue()
    assert "a [line] with brackets" in out.getvalue()


def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with Progress("training", total=1) as bar:
        bar.advance()
        bar.say("never")
    assert list(track([1, 2], "x")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_an_unknown_total_and_an_error_inside():
    out = io.StringIO()
    with pytest.raises(RuntimeError):
        for item in track((i for i in range(5)), "counting", unit="rows", file=out):
            if item == 2:
                raise RuntimeError
    with Progress("counting", unit="rows", file=out) as bar:
        bar.advance(3)
    assert out.getvalue().splitlines()[-1].startswith("counting: 3 rows")
