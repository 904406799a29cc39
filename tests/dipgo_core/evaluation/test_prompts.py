"""Prompt sets: every format gives the same items, and bad ones one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.prompts import (
    check_disjoint,
    distinct,
    in_order,
    item_of_image,
    items_sha256,
    label_items,
    read_items,
    with_labels,
)
from dipgo_core.items import Item

PROMPTS = ("a red cat", 'a "blue", moon')
COCO = {
    "annotations": [
        {"image_id": 2, "caption": PROMPTS[1]},
        {"image_id": 1, "caption": PROMPTS[0]},
        {"image_id": 1, "caption": "another caption of the first image"},
    ]
}
FILES = {
    "p.txt": 'a red cat\n\na "blue", moon\n',
    "p.jsonl": '{"prompt": "a red cat"}\n"a \\"blue\\", moon"\n',
    "p.csv": 'id,prompt\n1,a red cat\n2,"a ""blue"", moon"\n',
    "p.tsv": 'Prompt\tCategory\na red cat\tx\n"a ""blue"", moon"\ty\n',
    "p.json": json.dumps(COCO),
}


@pytest.mark.parametrize("name", FILES)
def test_formats_give_the_same_items(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")

    items = read_items(name, folder=tmp_path)

    assert items == tuple(Item(prompt) for prompt in PROMPTS)


def test_parquet_gives_the_same_items(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": list(PROMPTS)}), tmp_path / "p.parquet")

    assert [item.prompt for item in read_items(tmp_path / "p.parquet")] == list(PROMPTS)


def test_column_rows_and_labels_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text,label\none,4\ntwo,\nthree,6\n")

    items = read_items({"file": tmp_path / "p.csv", "column": "text", "rows": 2})

    assert items == (Item("one", 4), Item("two", None))


def test_bundled_splits_are_disjoint_and_of_the_promised_size() -> None:
    calibration, test = read_items("bundled:calibration"), read_items("bundled:test")

    check_disjoint(calibration, test)
    assert (len(calibration), len(test)) == (180, 100)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("p.txt", "\n \n", "is empty"),
        ("p.jsonl", '{"prompt": "x"}\nnonsense\n', "p.jsonl:2 is not JSON"),
        ("p.jsonl", '{"caption": "x"}\n', "no column 'prompt'; it has caption"),
        ("p.jsonl", '{"prompt": " "}\n', "item 0 .* has no text"),
        ("p.jsonl", '{"prompt": "x", "label": "red"}\n', "label must be an integer"),
        ("p.csv", "a,b\n1,2\n", "no column 'prompt'; it has a, b"),
        ("p.json", "{}", "not a COCO captions file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str, rule: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(EvaluationError, match=rule):
        read_items(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("nowhere.txt", "no prompt file at"),
        ("bundled:train", "bundled:calibration, bundled:test"),
        ({"hub": "owner/name", "colum": "x"}, "a prompt source is"),
        ({}, "a prompt source is"),
        ({"labels": 0}, "number of classes"),
    ],
)
def test_bad_sources_are_refused(tmp_path: Path, source: object, rule: str) -> None:
    with pytest.raises(EvaluationError, match=rule):
        read_items(source, folder=tmp_path)


def test_disjointness_names_the_first_overlap() -> None:
    with pytest.raises(EvaluationError, match="'b ' is calibration item 1 and test item 2"):
        check_disjoint([Item("a"), Item("b")], [Item("x"), Item("y"), Item("b "), Item("a")])


def test_digest_follows_text_label_and_order() -> None:
    variants = [[Item("a"), Item("b")], [Item("b"), Item("a")], [Item("a", 1), Item("b")]]

    assert len({items_sha256(items) for items in variants}) == 3


def test_labels_are_balanced_over_images() -> None:
    items = label_items({2: ["two"], 0: ["zero", "nought"], 1: ["one"]})

    shown = [items[item_of_image(i, len(items))].label for i in range(9)]

    assert [shown.count(label) for label in (0, 1, 2)] == [3, 3, 3]


def test_fewer_images_than_classes_are_spread_evenly() -> None:
    items = label_items({i: [str(i)] for i in range(1000)}, count=4)

    assert [item.label for item in items] == [0, 250, 500, 750]


def test_labels_are_found_by_text_and_missing_ones_named() -> None:
    names = {3: ["cat", "kitty"]}
    assert with_labels([Item("kitty"), Item("x", 9)], names) == (Item("kitty", 3), Item("x", 9))
    with pytest.raises(EvaluationError, match="'kat'. Did you mean 'cat'"):
        with_labels([Item("kat")], names)


#: ImageNet's: 134 and 517 share their only name, every name of 638 is one of 639.
TWINS = {134: ["crane"], 517: ["crane"], 638: ["maillot"], 639: ["maillot", "tank suit"]}


def test_classes_of_one_name_are_each_shown() -> None:
    items = label_items(TWINS)
    assert [(item.prompt, item.label) for item in items] == [
        ("crane", 134), ("crane", 517), ("maillot", 638), ("maillot", 639),
    ]  # fmt: skip
    assert [item.label for item in label_items(TWINS, chosen=(638, 134))] == [638, 134]


def test_a_text_that_names_two_classes_is_refused() -> None:
    assert with_labels([Item("tank suit")], TWINS) == (Item("tank suit", 639),)
    with pytest.raises(EvaluationError, match="'crane' names the classes 134, 517"):
        with_labels([Item("crane")], TWINS)


def test_more_classes_than_there_are_are_refused() -> None:
    with pytest.raises(EvaluationError, match="5 classes are asked for, the model has 4"):
        label_items(TWINS, 5)


def test_repeated_items_are_left_out_and_the_first_stays() -> None:
    items = [Item("A cat", 1), Item("a dog"), Item("a  CAT", 1), Item("a cat", 2), Item("a dog")]
    assert distinct(items) == (Item("A cat", 1), Item("a dog"), Item("a cat", 2))
    bundled = read_items("bundled:calibration") + read_items("bundled:test")
    assert distinct(bundled) == bundled


def test_fewer_rows_than_asked_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert len(read_items({"file": "p.txt", "rows": 2}, folder=tmp_path)) == 2
    with pytest.raises(EvaluationError, match=r"rows is 3, but .*p.txt has 2"):
        read_items({"file": "p.txt", "rows": 3}, folder=tmp_path)


def test_any_first_items_are_spread_over_the_whole_set() -> None:
    items = [Item(f"category {i // 100}, {i}") for i in range(1000)]

    ordered = in_order(items)

    assert sorted(ordered, key=lambda item: items.index(item)) == items
    found = {item.prompt.split(",")[0] for item in ordered[:60]}
    assert len(found) == 10  # as a random sample would: 0.9^60 x 10 = 2 % to miss one


# --- what real files look like ---

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    'A wall that says "Fly".\tOutdoor Scenes\tComplex\t\n'
    '"G I G G L E" painted on a wall\tIllustrations\tWriting & Symbols\t\n'
    " a sloth \tAnimals\tBasic\tDALL-E\n"
)


def test_parti_prompts_may_begin_with_a_quotation_mark(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text(PARTI, encoding="utf-8")
    assert [item.prompt for item in read_items(tmp_path / "p.tsv")] == [
        'A wall that says "Fly".',
        '"G I G G L E" painted on a wall',
        "a sloth",
    ]


@pytest.mark.parametrize("name", FILES)
def test_byte_order_mark_and_windows_lines_change_nothing(tmp_path: Path, name: str) -> None:
    text = "\ufeff" + FILES[name].replace("\n", "\r\n")
    (tmp_path / name).write_bytes(text.encode())
    assert read_items(tmp_path / name) == tuple(Item(prompt) for prompt in PROMPTS)


def test_lines_end_only_where_lines_end(tmp_path: Path) -> None:
    prompt = "a\u2028b\x0bc\x85d"  # all of these are line ends to str.splitlines
    (tmp_path / "p.txt").write_text(f"{prompt}\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": prompt}, ensure_ascii=False), encoding="utf-8"
    )
    assert read_items(tmp_path / "p.txt") == read_items(tmp_path / "p.jsonl") == (Item(prompt),)


@pytest.mark.parametrize(
    ("name", "start", "rest"),
    [
        ("p.txt", b"one\ntwo\n", b"\xff\xfe" * 9000),
        ("p.jsonl", b'"one"\n"two"\n', b"{torn" * 9000),
        ("p.csv", b"prompt\none\ntwo\n", b'"open ' * 9000),
        ("p.tsv", b"prompt\none\ntwo\n", b"\xff" * 90000),
    ],
)
def test_no_more_is_read_than_rows(tmp_path: Path, name: str, start: bytes, rest: bytes) -> None:
    (tmp_path / name).write_bytes(start + b"\n" * 20000 + rest)
    items = read_items({"file": str(tmp_path / name), "rows": 2})
    assert [item.prompt for item in items] == ["one", "two"]


def coco(*captions: tuple[object, object]) -> bytes:
    entries = [{"image_id": image, "caption": caption} for image, caption in captions]
    return json.dumps({"annotations": entries}).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.csv", b'prompt\n"a cat\na dog\n', "unexpected end of data"),
        ("p.txt", "a cat".encode("utf-16"), "byte 0 is not UTF-8; save it as UTF-8"),
        ("p.parquet", b"PAR1 torn", "cannot read prompts from .*p.parquet"),
        ("p.csv", b"prompt,label\n,3\n", "item 0 of .* has no text"),
        ("p.csv", b"id,prompt\n1\n", r"p.csv:2 has 1 cells, the header has 2 \(id, prompt\)"),
        ("p.csv", b"prompt\na cat\na red cat, on a mat\n", "p.csv:3 has 2 cells, the header has 1"),
        ("p.csv", b'id,prompt\n1,"a\ncat"\n2,a,b\n', "p.csv:4 has 3 cells, the header has 2"),
        ("p.tsv", b"Prompt\tCategory\na cat\n", "p.tsv:2 has 1 cells, the header has 2"),
        (
            "p.jsonl",
            b'{"prompt": ["a", "b"]}\n',
            r"p.jsonl:1: prompt must be text, got \['a', 'b'\]",
        ),
        ("p.jsonl", b'{"prompt": 3}\n', "p.jsonl:1: prompt must be text, got 3: .*`column`"),
        ("p.jsonl", b'{"prompt": null}\n', "has a row without prompt"),
        ("p.jsonl", b'{"prompt": "x", "label": 1.7}\n', "label must be an integer, got 1.7"),
        ("p.jsonl", b'{"prompt": "x", "label": true}\n', "label must be an integer, got True"),
        ("p.csv", b"prompt,label\nx,1_0\n", "label must be an integer, got '1_0'"),
        ("p.json", coco((1, "x"), ("b", "y")), "not a COCO captions file"),
        ("p.json", coco((1, ["x"])), r"image 1: caption must be text, got \['x'\]"),
    ],
)
def test_broken_files_are_one_clear_error(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EvaluationError, match=message):
        read_items(tmp_path / name)


def test_parquet_reads_only_the_columns_it_needs(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"Prompt": ["a", "b"], "label": [3, None], "image": [b"x" * 100] * 2}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    assert read_items(tmp_path / "p.parquet") == (Item("a", 3), Item("b"))
    with pytest.raises(EvaluationError, match="no column 'text'; it has Prompt, label, image"):
        read_items({"file": str(tmp_path / "p.parquet"), "column": "text"})


@pytest.mark.parametrize("twin", ["A RED  cat", "a red\u00a0cat ", "\uff41 red cat"])
def test_same_prompt_in_other_letters_overlaps(twin: str) -> None:
    with pytest.raises(EvaluationError, match="calibration item 0 and test item 1"):
        check_disjoint([Item("a red cat")], [Item("a dog"), Item(twin)])


def test_chosen_classes_are_shown_equally_often() -> None:
    items = label_items({i: [f"class {i}"] for i in range(1000)}, chosen=(207, 360, 11))
    shown = [items[item_of_image(i, len(items))].label for i in range(300)]
    assert {label: shown.count(label) for label in shown} == {207: 100, 360: 100, 11: 100}
    with pytest.raises(EvaluationError, match="no class 1000; its labels are 0 to 9"):
        label_items({i: [str(i)] for i in range(10)}, chosen=(3, 1000))
