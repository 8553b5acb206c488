"""Results that can be shown to others: of a run what describes the machine and every row, won and lost, and
nothing that says whose machine it is.

The files lie in benchmarks/results/, one per machine and run, and docs/ draws a page from all of them.
"""

import json
import re
from pathlib import Path
from typing import Any

FORMAT = 1  # of a contribution
SCHEMA = Path(__file__).with_name("results.schema.json")

MACHINE = ("cpu", "flags", "cores", "cores_allowed", "load_before", "load_after", "python", "torch", "gpu")
MACHINE += ("torch_cpu_capability", "allocator")
BUILD = ("version", "instruction_set", "compiler", "build_type")


class NotAContribution(ValueError):
    """What keeps results from being shown: where it stands, and what was expected there."""


def contribution(results: dict[str, Any]) -> dict[str, Any]:
    """The results of a run, as `fastreg bench` wrote them, without what is personal: host name, paths,
    environment, kernel, time of day.

    Raises:
        NotAContribution: the run was cut short, or measured nothing.
    """
    if results.get("partial") or not results.get("rows"):
        raise NotAContribution("expected a whole run, got one that was cut short; run it to its end")
    machine = results["machine"]
    made = {
        "format": FORMAT,
        "date": results["started"][:10],
        "machine": {name: machine.get(name) for name in MACHINE}
        | {
            "system": " ".join(re.findall(r"^\w+|x86_64|aarch64|arm64", machine["platform"])),
            "autograd": machine["autograd"]["path"],
            "build": {name: str(machine["build"][name]) for name in BUILD},
        },
        "settings": results["settings"],
        "copy_bandwidth": results["copy_bandwidth"],
        # The text of an error may hold a path.
        "rows": [row | {"notes": [note.split(":")[0] for note in row["notes"]]} for row in results["rows"]],
        "failed": [{"op": each["op"], "case": each["case"]} for each in results["failed"]],
    }
    check(made)
    return made


def file_name(made: dict[str, Any]) -> str:
    """The name of a contribution's file: machine, threads and day."""
    what = (made["machine"]["gpu"] or {}).get("name") or made["machine"]["cpu"]
    words = re.sub(r"\((R|TM)\)|@.*", "", what, flags=re.I).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return f"{slug}-{made['settings']['threads']}-threads-{made['date']}.json"


def load(path: Path) -> dict[str, Any]:
    """A contribution from its file.

    Raises:
        NotAContribution: it does not fit the schema.
    """
    made = json.loads(path.read_text(encoding="utf-8"))
    check(made)
    return made


def check(made: Any) -> None:
    """Raise NotAContribution unless `made` fits results.schema.json."""
    complaint = _complaint(made, json.loads(SCHEMA.read_text(encoding="utf-8")), "the results")
    if complaint:
        raise NotAContribution(complaint)


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def _complaint(value: Any, schema: dict[str, Any], where: str) -> str | None:
    """What is wrong with a value, by the part of JSON Schema that results.schema.json uses, or None."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [
        k for k in kinds if isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool))
    ]
    if kinds and not fits:
        return f"{where}: expected {' or '.join(kinds)}, got {type(value).__name__}"
    if "const" in schema and value != schema["const"]:
        return f"{where}: expected {schema['const']!r}, got {value!r}"
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return f"{where}: expected what matches {schema['pattern']!r}, got {value!r}"
    found: list[str | None] = []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        missing = [name for name in schema.get("required", []) if name not in value]
        others = [name for name in value if name not in known]
        if missing:
            return f"{where}: {missing[0]} is missing"
        if others and schema.get("additionalProperties") is False:
            return f"{where}: {others[0]} has no place in a contribution"
        rest = schema.get("additionalProperties") or {}
        found = [_complaint(v, known.get(name, rest), f"{where}.{name}") for name, v in value.items()]
    elif isinstance(value, list) and "items" in schema:
        found = [_complaint(each, schema["items"], f"{where}[{i}]") for i, each in enumerate(value)]
    return next(filter(None, found), None)
