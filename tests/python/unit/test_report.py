import html
import json
import re

import numpy as np
import pandas as pd

from micro.experts import COLOURS, NAMES
from micro.report import Page, TokenView, table_html, token_views_html


def view(tokens):
    probs = np.tile(np.eye(4)[[0, 1, 3]], (2, 1, 1))
    return TokenView("a <title>", tokens, probs, list(NAMES), [0, 1, -1], prompt_length=1)


def test_text_of_users_never_becomes_markup():
    page = Page("<b>", "<i>")
    page.section("<u>")
    page.text("<script>alert(1)</script>")
    page.verdict(True, "<img>")
    page.html(table_html(pd.DataFrame({"<th>": ["<td>"]})))
    page.html(token_views_html([view(["</script>", "<b>", '"&'])]))
    text = page.render()
    for tag in ("<b>&", "<i>", "<u>", "<img>", "alert(1)</script>", "<th><th>", "</script></span>"):
        assert tag not in text
    assert "&lt;/script&gt;" in text


def test_the_page_needs_nothing_from_elsewhere():
    text = token_views_html([view(["a", "b", "c"])]) + Page("t").render()
    assert not re.search(r"(src|href)\s*=\s*['\"](https?:)?//", text)


def test_each_token_has_the_colour_of_its_vote():
    text = view(["a", "b", "c"]).to_html()
    assert re.findall(r"--c:(#\w+)'>[abc]<", text) == [COLOURS[0], COLOURS[1], COLOURS[3]]
    assert text.count("class='t prompt'") == 1


def test_the_data_of_the_box_are_json():
    data = re.search(r'data-view="([^"]*)"', view(["a", "b", "c"]).to_html()).group(1)
    content = json.loads(html.unescape(data))
    assert content["layers"] == 2 and content["slots"] == 3 and content["labels"] == [0, 1, -1]


def test_the_terminal_shows_the_answer_with_a_mark_at_each_change():
    assert re.sub(r"\x1b\[[^m]*m", "", view(["p", "b", "c"]).to_ansi()) == "[S]b[L]c"


def test_the_page_is_written_whole(tmp_path):
    Page("t").write(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
