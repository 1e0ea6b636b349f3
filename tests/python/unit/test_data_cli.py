"""`micro data` and the previews."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from micro.cli.main import run
from micro.data import Record, Span, encode, encode_chat, preview, preview_html
from micro.data.previews import token_texts
from micro.testing import tiny_tokenizer

DATA = Path(__file__).parents[2] / "data"
RECORD = Record("<b>Who?</b>", "Mia’s café 😀.\nTom <i>smiles</i>.", [Span(0, 13, "DMN"), Span(14, 32, "ToM")])


def test_validate(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "validate", str(DATA / "records" / "good.json")]) == 0
    assert "usable: 2" in capsys.readouterr().out
    assert run(["data", "validate", str(DATA / "records" / "broken_line.jsonl"), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["problems"][0]["record"] == 1
    assert report["counts"]["usable"] == 2
    assert run(["data", "validate", str(DATA / "chat" / "two_users.jsonl")]) == 2
    assert "take turns" in capsys.readouterr().out
    assert run(["data", "validate", "--repair", str(DATA / "records" / "overlapping_span.jsonl")]) == 0


def test_generate_validate_preview_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "a.jsonl")
    assert run(["data", "generate", file, "-n", "4", "--domains", "logic,social", "--seed", "3"]) == 0
    before = Path(file).read_bytes()
    assert run(["data", "generate", file, "-n", "2"]) == 2  # what is there is kept
    assert Path(file).read_bytes() == before
    assert run(["data", "validate", file, "--json"]) == 0
    assert '"DMN": 0' in capsys.readouterr().out
    assert run(["data", "preview", file, "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- row") == 2
    assert "\x1b" not in out
    assert "⟦" in out
    assert run(["data", "build", file, str(tmp_path / "enc"), "--max-length", "300"]) == 0
    receipt = json.loads((tmp_path / "enc" / "build.json").read_text())
    assert receipt["counts"]["encoded"] == 4
    assert receipt["options"]["max_length"] == 300
    assert run(["data", "build", file, str(tmp_path / "enc")]) == 2
    assert "exists" in capsys.readouterr().err
    chats = str(tmp_path / "c.jsonl")
    assert run(["data", "generate", chats, "-n", "4", "--chat"]) == 0
    assert run(["data", "preview", chats, "--html", str(tmp_path / "p.html")]) == 0
    assert (tmp_path / "p.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run(["data", "build", chats, str(tmp_path / "enc2")]) == 0


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "generate", str(tmp_path / "a"), "--domains", "sums"]) == 2
    assert "unknown domain" in capsys.readouterr().err
    assert run(["data", "preview", str(DATA / "records" / "unknown_label.jsonl")]) == 2
    assert "record 1" in capsys.readouterr().err
    assert run(["data", "preview", str(DATA / "records" / "good.json"), "-t", str(tmp_path)]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_token_texts_join_to_the_row() -> None:
    tok = tiny_tokenizer()
    row = encode(RECORD, tok)
    assert row is not None
    texts = token_texts(row["input_ids"], tok)
    assert "".join(texts) == tok.decode(row["input_ids"])
    assert "😀" in texts


def test_preview_marks_experts_and_mask() -> None:
    tok = tiny_tokenizer()
    row = encode(RECORD, tok)
    assert row is not None
    plain = preview(row, tok, colour=False)
    assert re.sub(r"\[[MSWL]\]", "", plain).split("⟦")[1].split("⟧")[0] == (
        "Mia’s café 😀.␤\nTom <i>smiles</i>.<|im_end|>"
    )
    assert plain.index("[W]") < plain.index("Mia") < plain.index("[S]") < plain.index("Tom <i>")
    coloured = preview(row, tok)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain.replace("⟦", "").replace("⟧", "")
    assert "\x1b[38;2;255;171;64m\x1b[4m" in coloured  # social, trained on


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self.kind: str | None = None
        self.links = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += tag in ("script", "link", "img") or "src" in found or "href" in found
        kind = found.get("class") or ""
        self.kind = kind if kind.startswith("t ") else None
        if self.kind:
            self.tokens.append((self.kind, ""))

    def handle_data(self, data: str) -> None:
        if self.kind:
            self.tokens[-1] = (self.kind, self.tokens[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        self.kind = None


def test_preview_page_is_self_contained_and_escaped() -> None:
    tok = tiny_tokenizer()
    row, chat = encode(RECORD, tok), encode_chat(RECORD.messages(), tok)
    assert row is not None
    assert chat is not None
    page = _Text()
    page.feed(preview_html([row], tok))
    assert len(page.tokens) == len(row["input_ids"])
    assert [kind == "t trained" for kind, _ in page.tokens] == [label != -100 for label in row["labels"]]
    assert "<b>Who?</b>" in "".join(text for _, text in page.tokens)
    assert page.links == 0
    assert "no label" in preview_html([chat], tok)
