"""Saved outputs of an evaluation: a header with its settings, then one line per graded response.

A file belongs to one evaluation: another one's is refused, and one that was cut short goes on.
"""

import json
from pathlib import Path

from infra.errors import BadInput
from infra.processes import print0
from infra.run_folder import take_lock


def read_outputs(file: Path) -> tuple[dict, list[dict]]:
    """(settings, rows) of saved outputs; a last line that was cut short is left out."""
    try:
        *lines, _cut_short = file.read_text(encoding="utf-8").split("\n")
        first, *rows = [json.loads(line) for line in lines]
        return first["settings"], rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} cannot be read as outputs of eval.py: {error}") from error


def open_outputs(file: Path, settings: dict) -> int:
    """Make FILE, or cut it back to whole problems -> how many it has.

    BadInput if it is another evaluation's, if one that still runs writes it, or if it cannot be
    written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        take_lock(file.with_name(f"{file.name}.lock"), f"--output {file}")
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error}") from error
    saved, rows = read_outputs(file) if file.exists() else (settings, [])
    if unknown := [name for name in settings if name not in saved]:
        print0(
            f"{file}: an earlier version began it, so could not be compared: {', '.join(unknown)}"
        )
    changed = [name for name in settings if name in saved and saved[name] != settings[name]]
    if changed:
        differences = ", ".join(f"{k}: {saved[k]!r} -> {settings[k]!r}" for k in changed)
        raise BadInput(f"{file} holds another evaluation ({differences}): choose another --output")
    done = len(rows) // settings["samples"]
    kept = [{"settings": settings}, *rows[: done * settings["samples"]]]
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    temporary.replace(file)
    return done
