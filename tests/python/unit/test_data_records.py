"""Reading labelled answers: one small broken file per error, each named by path, record and field."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest

from micro.data import DataError, DataWarning, Record, Span, iter_records, load_records, save_records, validate

FILES = Path(__file__).parents[2] / "data" / "records"
GOOD = [Span(0, 11, "DMN"), Span(12, 22, "ToM")]

# file: (record, field, a word of the message)
ERRORS = {
    "overlapping_span.jsonl": (1, "continuation.12-22", "overlap"),
    "duplicate_span.jsonl": (1, "continuation.0-11", "the same"),
    "unknown_label.jsonl": (1, "continuation.0-11", "MD, ToM, DMN, LN"),
    "bad_span_key.jsonl": (1, "continuation", "0:11"),
    "negative_span.jsonl": (1, "continuation.-1-11", "before 0"),
    "byte_offsets.jsonl": (1, "continuation", "bytes"),
    "missing_prompt.jsonl": (1, "prompt", "missing"),
    "missing_answer.jsonl": (1, "assistant", "missing"),
    "missing_spans.jsonl": (1, "continuation", "missing"),
    "answer_is_a_list.jsonl": (1, "assistant", "a list"),
    "unknown_role.jsonl": (1, "prompt[0].role", "human"),
    "prompt_without_user.jsonl": (1, "prompt", "'user'"),
    "prompt_ends_in_answer.jsonl": (1, "prompt", "ends in a user message"),
    "broken_line.jsonl": (1, None, "line 2"),
    "not_an_object.jsonl": (1, None, "a list"),
    "two_objects_in_a_line.jsonl": (1, None, "goes on"),
    "repeated_key.jsonl": (1, None, "twice"),
    "empty.jsonl": (None, None, "no records"),
    "empty_list.json": (None, None, "no records"),
    "cut_off_list.json": (1, None, "broken JSON"),
    "no_comma.json": (0, None, "','"),
    "after_the_list.json": (0, None, "after the end"),
    "not_utf8.jsonl": (1, None, "not UTF-8"),
    "broken.parquet": (0, None, "Parquet"),
}
# file: (reason, field, spans of record 1, or None where it is dropped)
WARNINGS: dict[str, tuple[str, str, list[Span] | None]] = {
    "reversed_span.jsonl": ("empty_span", "continuation.11-0", [Span(12, 22, "ToM")]),
    "past_the_end.jsonl": ("clipped_span", "continuation.12-99", GOOD),
    "outside_span.jsonl": ("outside_span", "continuation.40-50", [Span(0, 22, "DMN")]),
    "unordered_spans.jsonl": ("reordered", "continuation", GOOD),
    "empty_answer.jsonl": ("empty_answer", "assistant", None),
    "lone_surrogate.jsonl": ("lone_surrogate", "assistant", [Span(0, 6, "MD")]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_names_file_record_and_field(name: str) -> None:
    record, field, word = ERRORS[name]
    with pytest.raises(DataError) as caught:
        load_records(FILES / name)
    error = caught.value
    assert isinstance(error, ValueError)
    assert (error.path, error.record, error.field) == (str(FILES / name), record, field)
    assert word in str(error)
    assert name in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", WARNINGS)
def test_each_repair_is_counted_and_named(name: str) -> None:
    reason, field, spans = WARNINGS[name]
    with pytest.warns(DataWarning) as caught:
        records = load_records(FILES / name)
    message = str(caught[0].message)
    assert all(part in message for part in (reason, name, "record 1", field))
    assert [r.spans for r in records] == ([GOOD] if spans is None else [GOOD, spans])
    report = validate(FILES / name)
    assert report.ok
    kind = "dropped" if spans is None else "repaired"
    assert report.counts[kind] == {reason: 1}
    assert [(p.record, p.field, p.severity) for p in report.problems] == [(1, field, "warning")]


def test_every_broken_file_is_tested() -> None:
    assert {f.name for f in FILES.iterdir()} == {*ERRORS, *WARNINGS, "good.json"}


def test_validate_reports_every_problem_and_goes_on() -> None:
    for name, (record, field, _) in ERRORS.items():
        report = validate(FILES / name)
        assert not report.ok
        assert [(p.record, p.field) for p in report.problems if p.severity == "error"] == [(record, field)]
    report = validate(FILES / "broken_line.jsonl")
    assert report.counts["records"] == 3
    assert report.counts["usable"] == 2
    assert "line 2" in str(report)


def test_several_problems_in_one_file(tmp_path: Path) -> None:
    names = ["unknown_label.jsonl", "broken_line.jsonl", "past_the_end.jsonl", "missing_answer.jsonl"]
    lines = [(FILES / n).read_text(encoding="utf-8").splitlines()[1] for n in names]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    report = validate(path)
    assert [p.record for p in report.problems] == [0, 1, 2, 3]
    assert report.counts["refused"] == 3


def test_a_list_with_bom_crlf_emoji_and_nul() -> None:
    first, second = load_records(FILES / "good.json")
    assert first == Record("Who?", "Tom did it. He smiles.", GOOD, "example")
    assert second.assistant == "A 😀 café\0."
    assert second.spans == [Span(0, 9, "LN")]
    assert second.meta == {"model": "x"}
    assert second.messages()[0] == {"role": "user", "content": "Be brief.\n\nWho?"}
    counts = validate(FILES / "good.json").counts
    assert counts["spans"] == {"MD": 0, "ToM": 1, "DMN": 1, "LN": 1}
    assert counts["characters"] == {"MD": 0, "ToM": 10, "DMN": 11, "LN": 9}


def test_repair_lets_the_later_start_win() -> None:
    with pytest.warns(DataWarning, match="overlapping_span"):
        assert load_records(FILES / "overlapping_span.jsonl", repair=True)[1].spans == [
            Span(0, 12, "DMN"),
            Span(12, 22, "ToM"),
        ]
    with pytest.warns(DataWarning, match="duplicate_span"):
        assert load_records(FILES / "duplicate_span.jsonl", repair=True)[1].spans == [Span(0, 11, "ToM")]


def test_long_prompts_keep_earlier_turns() -> None:
    prompt = [
        {"role": "system", "content": "A."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "system", "content": "B."},
        {"role": "user", "content": "three"},
    ]
    record = Record(prompt, "four", [])
    assert [(m["role"], m["content"]) for m in record.messages()] == [
        ("user", "A.\n\nB.\n\none"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
    ]
    assert record.messages(long_prompt="first_two")[0]["content"] == "A.\n\none"
    assert prompt[1]["content"] == "one"


def test_written_files_are_read_back_whatever_the_format(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = load_records(FILES / "good.json")
    assert save_records(records, tmp_path / "a.jsonl") == 2
    assert load_records(tmp_path / "a.jsonl") == records
    rows = [{**r.to_json(), "prompt": "Who?", "model": None} for r in records]
    as_pairs = [{**row, "continuation": list(row["continuation"].items())} for row in rows]
    schema = pa.schema(
        [("prompt", pa.string()), ("assistant", pa.string()), ("continuation", pa.map_(pa.string(), pa.string()))]
    )
    columns = [{k: row[k] for k in ("prompt", "assistant", "continuation")} for row in as_pairs]
    pq.write_table(pa.Table.from_pylist(columns, schema=schema), tmp_path / "map.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "struct.parquet")
    for name in ("map.parquet", "struct.parquet"):
        read = load_records(tmp_path / name)
        assert [(r.assistant, r.spans) for r in read] == [(r.assistant, r.spans) for r in records]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")

    def rows() -> Any:
        yield Record("a", "b", [])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        save_records(rows(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_records(tmp_path / "none.json")
    with pytest.raises(DataError, match="not a file"):
        load_records(tmp_path)


@pytest.mark.parametrize("form", ["list", "lines"])
def test_reading_needs_little_memory(tmp_path: Path, form: str) -> None:
    row = json.dumps({"prompt": "p" * 500, "assistant": "a" * 500, "continuation": {"0-500": "MD"}})
    path, n = tmp_path / "many", 20_000
    path.write_text("[" + ",\n".join([row] * n) + "]" if form == "list" else "\n".join([row] * n))
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    assert sum(1 for _ in iter_records(path)) == n
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000, peak


def test_what_was_repaired_is_told_also_where_reading_stops_early(tmp_path: Path) -> None:
    line = '{"prompt": "a", "assistant": "b c", "continuation": {"2-3": "LN", "0-1": "MD"}}\n'
    (tmp_path / "a.jsonl").write_text(line * 3)
    with pytest.warns(DataWarning, match="1 x reordered, first: .*record 0"):
        next(iter_records(tmp_path / "a.jsonl"))


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_records(FILES / "good.json")
