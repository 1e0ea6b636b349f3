"""The coloured tokens: what stands on the page is what the router chose."""

import base64
import html
import json
import re

import numpy as np

from micro.experts import COLOURS, NAMES
from micro.report import TokenView, token_views_html
from micro.report.tokens import visible

CHOSEN = [[0, 1, 1, 3], [0, 2, 1, 3], [2, 2, 1, 0]]  # [L,S]
VOTES = [0, 2, 1, 3]


def view(tokens=("a", " b", "\n", "c")):
    probs = 0.7 * np.eye(4)[CHOSEN] + 0.075
    return TokenView("title", list(tokens), probs, list(NAMES), prompt_length=1)


def content(box):
    return json.loads(html.unescape(re.search(r'data-view="([^"]*)"', box).group(1)))


def decoded(text):
    return np.frombuffer(base64.b64decode(text), np.uint8)


def test_decisions_are_sent_as_they_are_and_not_read_from_rounded_probabilities():
    probs = np.full((1, 1, 4), 0.24)
    probs[0, 0, 2] += 0.04
    probs[0, 0, 1] += 0.04 - 1e-9  # the same byte as the winner's, and a lower id
    box = TokenView("t", ["x"], probs, list(NAMES))
    sent = content(box.to_html())
    p = decoded(sent["probs"])
    assert p[1] == p[2]
    assert decoded(sent["first"]).tolist() == [2] and decoded(sent["votes"]).tolist() == box.votes() == [2]


def test_there_is_a_line_for_each_layer_and_then_the_vote():
    box = view().to_html()
    assert decoded(content(box)["first"]).reshape(3, 4).tolist() == CHOSEN
    rows = re.findall(r"<tr data-layer='(-?\d+)'><td>(\w+)</td><td class='line'>(.*?)</td></tr>", box)
    assert [(layer, name) for layer, name, _ in rows] == [("0", "0"), ("1", "1"), ("2", "2"), ("-1", "vote")]
    for (_, _, line), experts in zip(rows, [*CHOSEN, VOTES], strict=True):
        stretches = re.findall(r"<i style='--c:(#\w+)' title='(\w+)'>(.*?)</i>", line)
        assert "".join(text for _, _, text in stretches) == "a b↵c"  # the same text in every line, without breaks
        changes = [e for s, e in enumerate(experts) if s == 0 or e != experts[s - 1]]
        assert [name for _, name, _ in stretches] == [NAMES[e] for e in changes]
        assert [colour for colour, _, _ in stretches] == [COLOURS[e] for e in changes]


def test_white_space_is_visible_and_control_characters_do_nothing():
    assert visible("a\tb\r\nc\x1b[2J") == "a⇥\tb↵\nc\ufffd[2J"
    assert visible("\n\t", one_line=True) == "↵⇥"
    box = view(("a", "\t", "\n", "\x07")).to_html()
    assert ">⇥\t<" in box and ">↵\n<" in box and "\x07" not in box
    assert "\x1b[2J" not in view(("a", "\x1b[2J", "b", "c")).to_ansi()


def test_text_is_escaped_in_every_line():
    box = view(("<b>", "</i>", "&", "'\"")).to_html()
    body = re.sub(r'data-view="[^"]*"', "", box)
    assert "<b>" not in body and body.count("&lt;b&gt;") == 5  # the text, three layers, the vote
    assert body.count("</i>") == body.count("<i ")


def test_a_notebook_shows_the_box_with_its_own_style_and_script():
    shown = view()._repr_html_()
    assert shown.startswith("<style>") and shown.endswith("</script>") and shown.count("data-view=") == 1
    assert not re.search(r"var\(--(line|quiet)\)", shown)  # a notebook does not define the page's colours
    assert "dataset.ready" in shown  # shown twice, it is set up once


def test_an_empty_text_has_a_box_too():
    empty = TokenView("t", [], np.zeros((2, 0, 4)), list(NAMES))
    assert "data-view" in token_views_html([empty]) and empty.votes() == []
