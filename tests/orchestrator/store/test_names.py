"""No name leaves the storage. Oracle: the file system outside of it, and pathlib's resolution."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dipgo_core.errors import StoreError
from orchestrator.records import Task
from orchestrator.store import Store, open_store
from orchestrator.store.names import LONGEST, check_name

KEY = Task(kind="search", inputs={"seed": 1}).key
EVIL = (
    "..",
    ".",
    "",
    "/",
    "\\",
    "\0",
    "~",
    "a",
    "ä",
    "\u202e",
    "\u0301",
    "\ud800",
    "C:",
    " ",
    "\n",
)

#: Names as an attacker would build them, and any text at all.
names = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(EVIL), max_size=6).map("/".join),
    st.lists(st.sampled_from(EVIL), max_size=6).map("".join),
    st.integers(200, 1200).map("x".__mul__),
)
#: Every way by which a name reaches the storage.
WAYS: tuple[Callable[[Store, str], object], ...] = (
    lambda store, name: store.backend.put(name, b"1"),
    lambda store, name: store.backend.put_if_absent(name, b"1"),
    lambda store, name: store.backend.get(name),
    lambda store, name: store.backend.delete(name),
    lambda store, name: store.backend.delete_all(name),
    lambda store, name: list(store.backend.list(name)),
    lambda store, name: store.put_artifact(KEY, name, b"1"),
    lambda store, name: store.put_progress(KEY, name, b"1"),
    lambda store, name: store.put_progress(name, "file", b"1"),
    lambda store, name: store.put_derived(KEY, name, b"1"),
    lambda store, name: store.put_sweep_file(name, "file", b"1"),
    lambda store, name: store.put_sweep_file("sweep", name, b"1"),
    lambda store, name: store.clear_progress(name),
    lambda store, name: store.get_record(name),
    lambda store, name: store.get_task(name),
    lambda store, name: store.get_blob(name),
    lambda store, name: store.request_stop(name),
    lambda store, name: store.runner(name),
)


def outside(top: Path, store: Store) -> dict[Path, bytes]:
    assert store.folder is not None
    files = [path for path in top.rglob("*") if path.is_file() and not path.is_symlink()]
    return {f: f.read_bytes() for f in files if not f.is_relative_to(store.folder)}


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=names, way=st.sampled_from(WAYS))
@example(name="../secret", way=WAYS[0])
@example(name="../secret", way=WAYS[2])
@example(name="..", way=WAYS[5])
@example(name="../secret", way=WAYS[4])
@example(name="sub/../../secret", way=WAYS[3])
def test_no_name_leaves_the_storage(
    tmp_path: Path, name: str, way: Callable[[Store, str], object]
) -> None:
    store = open_store(tmp_path / "store")
    (tmp_path / "secret").write_bytes(b"untouched")
    with suppress(StoreError):
        found = way(store, name)
        assert "untouched" not in str(found)
        assert "secret" not in str(found)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [store.folder]
    assert outside(tmp_path, store) == {tmp_path / "secret": b"untouched"}


@given(name=names)
def test_names_that_pass_resolve_below_any_folder(name: str) -> None:
    try:
        parts = check_name(name)
    except StoreError:
        return
    root = Path("/somewhere/store")
    assert root.joinpath(*parts).resolve().is_relative_to(root)
    assert name == "/".join(parts)
    assert len(name) <= LONGEST
    assert name.isascii()


@pytest.mark.parametrize("name", ["records/a", "a-b_c.d", "x" * 201, "sweeps/sd-1.5/report/x.html"])
def test_ordinary_names_pass(name: str) -> None:
    assert "/".join(check_name(name)) == name


@pytest.fixture
def trapped(tmp_path: Path) -> Store:
    """Return a store in which `artifacts`, a folder of progress and a sweep's file lead away."""
    away = tmp_path / "away"
    (away / "sub").mkdir(parents=True)
    (away / "file").write_bytes(b"secret")
    store = open_store(tmp_path / "store")
    assert store.folder is not None
    (store.folder / "artifacts").symlink_to(away)
    (store.folder / "progress").mkdir()
    (store.folder / "progress" / KEY).symlink_to(away / "sub")
    (store.folder / "sweeps" / "tiny").mkdir(parents=True)
    (store.folder / "sweeps" / "tiny" / "link").symlink_to(away / "file")
    return store


def test_links_that_lead_out_of_the_storage_are_refused(trapped: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"lies outside the storage.*symbolic link leads to"):
        trapped.put_artifact(KEY, "x", b"1")
    with pytest.raises(StoreError, match="lies outside the storage"):
        trapped.put_progress(KEY, "x", b"1")
    with pytest.raises(StoreError, match="symbolic link"):
        trapped.get_sweep_file("tiny", "link")
    assert list((tmp_path / "away" / "sub").iterdir()) == []


def test_links_are_not_followed_by_lists_and_deletes(trapped: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="lies outside the storage"):
        list(trapped.backend.list("artifacts"))
    with pytest.raises(StoreError, match="lies outside the storage"):
        trapped.clear_progress(KEY)
    assert [entry.name for entry in trapped.backend.entries("") if "file" in entry.name] == []
    trapped.put_sweep_file("tiny", "other", b"1")
    trapped.backend.delete_all("sweeps/tiny")
    trapped.backend.delete("artifacts")
    assert (tmp_path / "away" / "file").read_bytes() == b"secret"


def test_storage_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store = open_store(tmp_path / "store")
    store.put_sweep_file("tiny", "x", b"1")
    assert store.get_sweep_file("tiny", "x") == b"1"
    assert (tmp_path / "disk" / "sweeps" / "tiny" / "x").exists()
