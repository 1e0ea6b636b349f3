import ast
import html
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_models import small_model

import micro
from micro.analysis.alignment import ReadingTimesResult
from micro.cli.main import BAD_INPUT, DONE, run
from micro.evaluation.harness import HarnessResult
from micro.experts import COLOURS, NAMES
from micro.report import KINDS, Page, TokenView, build_report, collect, table_html, token_views_html, update_card
from micro.report.card import BEGIN, END, markdown_table


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


def reading_times(**settings):
    model = {"name": "intact <b>", "gain": 0.3, "gain_held_out": 0.25, "interval": [0.1, 0.4], "null_95": 0.01}
    model |= {"null_mean": 0.0, "p": 0.01, "coefficient": 12.0, "standard_error": 1.0, "f": 9.0, "f_p": 0.001}
    return ReadingTimesResult(90, 10, {"without a time": 2}, ["length"], [model], settings={"seed": 11, **settings})


def planted(folder):
    """Results of two kinds, a run, a demo, an unknown kind, a broken file and files that are none of these."""
    reading_times(note="<script>").save(folder / "b" / "first")
    reading_times().save(folder / "second")
    HarnessResult(rows=[]).save(folder / "a")
    (folder / "a" / "harness.html").write_text("more")
    (folder / "run").mkdir()
    lines = [{"stage": "induce", "step": step, "loss": 3 / step} for step in (1, 2, 3)]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "ind')
    plan = {"stages": [{"name": "induce", "steps": 3, "rows": 5, "tokens": 1234}]}
    record = {"seed": 7, "plan": plan, "stages": [{"status": "done"}], "data": [{"files_sha256": {"own.jsonl": "0"}}]}
    (folder / "run" / "run.json").write_text(json.dumps(record))
    (folder / "demo").mkdir()
    verdicts = [{"claim": "Tokens <i>follow</i>", "holds": True}, {"claim": "Ablation hurts", "holds": False}]
    (folder / "demo" / "summary.json").write_text(json.dumps({"verdicts": verdicts}))
    (folder / "unknown.json").write_text('{"kind": "tea<u>leaves", "rows": 3}')
    (folder / "broken.json").write_text('{"kind": "ablation", "rows": ')
    (folder / "config.json").write_text('{"model_type": "kind"}')
    (folder / ".hidden.json").write_text('{"kind": "ablation"}')


def test_the_page_joins_all_results_in_the_order_of_the_registry(tmp_path):
    planted(tmp_path)
    page, found = build_report(tmp_path, "A <title>")
    text = page.render()
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert headings == ["Demo", "Training", "LM evaluation harness", "Reading times", "Not in this page"]
    assert len(found) == 5 and [f.path.parent.name for f in found.of("reading_times")] == ["first", "second"]
    assert re.findall(r"<h3[^>]*>([^<]*)</h3>", text)[-2:] == ["b/first", "second"]
    anchors, links = re.findall(r'<h[23] id="([^"]*)"', text), re.findall(r'<a href="#([^"]*)"', text)
    assert anchors == links and len(set(anchors)) == len(anchors)
    assert text.count("data:image/svg+xml;base64,") == 4  # run, harness, two reading times
    for words in (
        "0.250",
        "90 words of 10 sentences",
        "seed 11",
        "seed 7",
        "1234",
        "does not hold",
        "@media print",
        "a/harness.html",
    ):
        assert words in text
    for tag in ("<b>", "<i>", "<u>", "<title>A <t"):
        assert tag not in text.replace("<b>holds</b>", "").replace("<b>does not hold</b>", "")
    assert "note: </dt>" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href)\s*=\s*['\"](https?:)?//", text)


def test_what_cannot_be_shown_is_listed_and_not_fatal(tmp_path):
    planted(tmp_path)
    found = collect(tmp_path)
    assert {path.name: why.split(":")[0] for path, why in found.unread.items()} == {
        "unknown.json": "unknown kind of result",
        "broken.json": "JSONDecodeError",
    }
    page = build_report(tmp_path)[0].render()
    assert "tea&lt;u&gt;leaves" in page and "broken.json" in page


def test_a_figure_that_fails_does_not_cost_the_numbers(tmp_path, monkeypatch):
    reading_times().save(tmp_path)
    monkeypatch.setattr(ReadingTimesResult, "plot", lambda self: 1 / 0)
    text = build_report(tmp_path)[0].render()
    assert "could not be drawn: ZeroDivisionError" in text and "0.250" in text


def test_the_same_results_give_the_same_page(tmp_path):
    planted(tmp_path)
    assert build_report(tmp_path)[0].render() == build_report(tmp_path)[0].render()


def test_tables_are_cut_and_texts_that_repeat_stand_once(tmp_path):
    from micro.report.join import limited_table

    frame = pd.DataFrame({"x": np.arange(60) / 1e6, "note": ["the same long text in every row"] * 60})
    text = limited_table(frame, "all.csv")
    assert text.count("<tr>") == 25 and text.count("the same long text") == 1 and "first 24 of 60 rows" in text
    assert "<td>1e-06</td>" in text  # a column of small numbers is not a column of zeros
    markdown = markdown_table(pd.DataFrame({"a_b": ["x|y\n<b>"], "n": [float("nan")]}))
    assert markdown.splitlines()[0] == "| a b | n |" and markdown.splitlines()[2] == "| x\\|y \\<b\\> | – |"


def result_classes():
    """(name, module:class) of every class below Result in the package, from the sources."""
    root = Path(micro.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "Result" in {ast.unparse(base) for base in node.bases}:
                names = [
                    n.value.value for n in node.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "name"
                ]
                module = ".".join(("micro", *path.relative_to(root).with_suffix("").parts))
                yield names[0], f"{module}:{node.name}"


def test_every_kind_of_result_is_in_the_registry():
    known = {name: kind.path for name, kind in KINDS.items()}
    assert dict(result_classes()) == known
    for name, kind in KINDS.items():
        assert kind.load_class().name == name and kind.text[-1] in ".?" and kind.card in (None, "routing", "evaluation")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run" / "model"
    small_model(dtype=torch.float32).save_pretrained(folder)
    return folder


def test_the_card_takes_the_results_of_its_model(model_folder, tmp_path):
    reading_times(model=str(model_folder)).save(tmp_path / "own")
    reading_times(model=str(tmp_path / "another")).save(tmp_path / "other")
    (model_folder / "README.md").unlink(missing_ok=True)
    path = update_card(model_folder, collect(tmp_path))
    text = path.read_text()
    assert text.index("## Usage") < text.index(BEGIN) < text.index("## Evaluation") < text.index(END)
    assert text.index(END) < text.index("## Limits") and text.count("### ") == 1
    assert "### Reading times (own)" in text and "| intact \\<b\\> |" in text
    assert (model_folder / "report" / "own-reading_times.png").read_bytes().startswith(b"\x89PNG")
    update_card(model_folder, collect(tmp_path))
    assert path.read_text() == text  # a second time changes nothing
    path.write_text(f"mine before\n{BEGIN}\nold\n{END}\nmine after\n")
    again = update_card(model_folder, collect(tmp_path)).read_text()
    assert again.startswith("mine before\n") and again.endswith("\nmine after\n") and "old" not in again
    path.write_text(f"half {BEGIN}")
    with pytest.raises(ValueError, match="marks"):
        update_card(model_folder, collect(tmp_path))
    path.unlink()


def test_the_card_tells_the_training_that_made_the_model(model_folder):
    run_folder = model_folder.parent
    for name, text in (("metrics.jsonl", '{"stage": "s", "step": 1, "loss": 2.0}\n'), ("run.json", '{"seed": 5}')):
        (run_folder / name).write_text(text)
    text = update_card(model_folder, collect(run_folder)).read_text()
    assert "## Training" in text and "Seed 5; training data: unknown" in text


def test_the_command_writes_the_page_and_the_card(model_folder, tmp_path, capsys):
    assert run(["report", str(tmp_path / "nothing")]) == BAD_INPUT
    assert run(["report", str(tmp_path)]) == BAD_INPUT
    planted(tmp_path)
    page = tmp_path / "page.html"
    assert run(["report", str(tmp_path), "-o", str(page), "--card", str(model_folder)]) == DONE
    out = capsys.readouterr()
    assert "(5 results)" in out.out and "not shown: unknown.json" in out.err and page.stat().st_size > 10_000
    assert "## Evaluation" in (model_folder / "README.md").read_text()
    assert run(["report", str(tmp_path), "--card", str(tmp_path / "b")]) == BAD_INPUT
    assert "no model folder" in capsys.readouterr().err
