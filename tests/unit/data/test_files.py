from __future__ import annotations

import json
from pathlib import Path

import pytest

from decentra.data.files import read_texts
from decentra.errors import DataError


def filled(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_folders_are_read_recursively_in_path_order_without_hidden_names(tmp_path: Path) -> None:
    filled(tmp_path, {"b.txt": b"two", "a/z.md": b"four", "a.txt": b"one", "c/d/e.txt": b"five", ".git/x": b"no", ".hidden": b"no"})
    texts = read_texts([tmp_path])
    assert texts.data == b"one\ntwo\nfour\nfive"
    assert texts.num_files == 4
    assert texts.skipped == ()


def test_several_paths_keep_their_order_and_bytes_stay_as_they_are(tmp_path: Path) -> None:
    latin = "Gr\u00fc\u00dfe, Jos\u00e9".encode("latin-1") * 3 + b" and plain text around it" * 3
    filled(tmp_path, {"x.txt": "Gr\u00fc\u00dfe".encode(), "y.txt": latin})
    assert read_texts([str(tmp_path / "y.txt"), tmp_path / "x.txt"]).data == latin + b"\n" + "Gr\u00fc\u00dfe".encode()


def test_jsonl_gives_its_field(tmp_path: Path) -> None:
    lines = [json.dumps({"body": "eins\nzwei", "n": 1}), "", json.dumps({"body": "drei \u00e4"})]
    path = filled(tmp_path, {"t.jsonl": "\n".join(lines).encode()}) / "t.jsonl"
    assert read_texts([path], text_field="body").data == "eins\nzwei\ndrei \u00e4".encode()


def test_binary_files_in_a_folder_are_passed_over_and_named(tmp_path: Path) -> None:
    filled(tmp_path, {"a.txt": b"text", "b.png": b"\x89PNG\0\0", "c.txt": b" \n"})
    texts = read_texts([tmp_path])
    assert texts.data == b"text"
    assert texts.skipped == (str(tmp_path / "b.png"), str(tmp_path / "c.txt"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b"\n \n", "empty"),
        ("nul.bin", b"abc\0def", "NUL"),
        ("wide.txt", "hello".encode("utf-16"), "NUL"),
        ("noise.bin", bytes(range(128, 256)) * 4, "not UTF-8"),
        ("short.txt", b"hi", "2 bytes of text in 1 files, at least 129"),
        ("bad.jsonl", b'{"text": "ok"}\n{"text": ', r"bad\.jsonl:2: expected one JSON object"),
        ("list.jsonl", b'["text"]', r"list\.jsonl:1: expected a string field 'text' .*, got: list"),
        ("field.jsonl", b'{"text": "ok"}\n\n{"body": "x", "id": 3}', r"field\.jsonl:3: .*'text' .*, got: body, id"),
        ("null.jsonl", b'{"text": null}', r"null\.jsonl: 0 bytes of text"),
        ("deep.jsonl", b"[" * 100_000, r"deep\.jsonl:1"),
    ],
)
def test_unusable_files_are_data_errors_that_name_them(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = filled(tmp_path, {name: data}) / name
    with pytest.raises(DataError, match=message) as caught:
        read_texts([path], min_bytes=129)
    assert str(path) in str(caught.value)


def test_missing_paths_and_empty_folders_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_texts([tmp_path / "absent"])
    with pytest.raises(DataError, match="no files"):
        read_texts([tmp_path])
    with pytest.raises(DataError, match="at least one"):
        read_texts([])


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        with pytest.raises(DataError, match=r"pip install 'decentra\[data\]'"):
            read_texts([path])
        pytest.skip("the data extra is not installed")
    with pytest.raises(DataError, match=r"not a whole \.parquet file"):
        read_texts([path])
    parquet.write_table(pyarrow.table({"text": ["one", None, "zwei \u00e4"], "n": [1, 2, 3]}), path)
    assert read_texts([tmp_path]).data == "one\nzwei \u00e4".encode()
    with pytest.raises(DataError, match="expected a column 'body', got: text, n"):
        read_texts([path], text_field="body")
    with pytest.raises(DataError, match="expected a string field 'n'"):
        read_texts([path], text_field="n")


def test_lessons_are_read_whole_and_learnt_in_part(tmp_path: Path) -> None:
    """Prompts, what the user says and the marks around it are read; completions, what the assistant says and its end mark are learnt."""
    rows = [
        {"text": "plain"},
        {"prompt": "1+1=", "completion": "2"},
        {"messages": [{"role": "user", "content": "Gr\u00fc\u00dfe"}, {"role": "assistant", "content": "hi"}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    texts = read_texts([tmp_path])
    chat = "<|im_start|>user\nGr\u00fc\u00dfe<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    assert texts.data.decode() == f"plain\n1+1=2\n{chat}"
    learnt, at = [], 0
    for start, end in texts.unlearnt:
        learnt.append(texts.data[at:start])
        at = end
    assert [part for part in learnt if part] == [b"plain\n", b"2", b"hi<|im_end|>"]
    assert at == len(texts.data)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"a\.jsonl:1: expected a string field 'text' \(or 'prompt' and 'completion', or 'messages'\), got: prompt"),
        ({"messages": [{"role": "user"}]}, r"a\.jsonl:1: a message has a text 'role' and a text 'content'"),
        ({"messages": ["hi"]}, "a message has"),
        ({"messages": []}, "nothing in it is to be learnt|bytes of text"),
        ({"prompt": "a question", "completion": ""}, "nothing in it is to be learnt"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nothing in it is to be learnt"),
    ],
)
def test_lessons_with_holes_are_refused(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        read_texts([tmp_path])


def test_rows_with_nothing_in_them_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"text": None, "n": 1},
        {"text": "one", "messages": None},
        {"text": None, "prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "assistant", "content": "c"}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_texts([tmp_path]).data == b"one\nab\n<|im_start|>assistant\nc<|im_end|>\n"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_several_forms(tmp_path: Path, kind: str) -> None:
    """Rows of one file may be texts and lessons; Arrow's file format is read beside its streams."""
    pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", None, None], "prompt": [None, "a", None], "completion": [None, "b", None]})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    texts = read_texts([tmp_path])
    assert (texts.data, texts.unlearnt) == (b"one\nab", ((4, 5),))


def test_a_saved_data_set_is_its_arrow_files(tmp_path: Path) -> None:
    """The layout of ``save_to_disk``: Arrow streams, and JSON that describes them and is no text."""
    pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    folder = tmp_path / "train"
    folder.mkdir()
    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"], "n": [1, 2]})
    with pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    texts = read_texts([tmp_path])
    assert (texts.data, texts.num_files, texts.unlearnt) == (b"ac\nbd", 1, ((0, 1), (2, 3), (3, 4)))
    (folder / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"not a whole \.arrow file"):
        read_texts([tmp_path])
