"""`pin`: commits into the sweep file, and what they are."""

from __future__ import annotations

from pathlib import Path

from orchestrator.cli.show import print_json, say
from orchestrator.pinning import pin_file


def pin_and_show(file: Path, *, as_json: bool, dry_run: bool) -> None:
    """Pin a sweep file, or only tell what would be pinned.

    Raises:
        DipgoError: the file has errors, or something cannot be resolved; nothing is written.
    """
    pinned = pin_file(file, write=not dry_run)
    if as_json:
        print_json(
            {**pinned.to_json(), "file": str(file), "written": bool(pinned.needs) and not dry_run}
        )
        return
    for need, commit in pinned.needs:
        say(f"{need.kind} {need.id}: {need.revision or 'main'} is {commit}")
        for user in need.users:
            say(f"    {user}")
    if not pinned.needs:
        say(f"{file}: every revision is a commit already", stderr=True)
    elif dry_run:
        say(f"{file} is left as it is (--dry-run)", stderr=True)
    else:
        say(f"{file}: {len(pinned.needs)} commits written", stderr=True)
    if pinned.loose:
        say("nothing in it moves any more: allow_unpinned can be false now", stderr=True)
