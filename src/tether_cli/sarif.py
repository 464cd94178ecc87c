"""The findings of a check as SARIF 2.1.0, which code hosts and editors show beside the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {"error": "error", "warning": "warning", "hint": "note"}
"""What SARIF calls the severities."""


def log(found: Mapping[Path, Any], rules: Mapping[str, Any], *, version: str, guide: str | None) -> dict[str, Any]:
    """The findings of files, as a log of one run.

    Args:
        found: What a check found in each file.
        rules: All rules by name, of which the log describes those that were asked.
        version: That of Tether.
        guide: The address of the page that describes the rules, if it is known.
    """
    asked = list(dict.fromkeys(name for findings in found.values() for name in findings.rules))
    results = [_result(file, finding, asked) for file, findings in found.items() for finding in findings]
    driver = {
        "name": "tether",
        "version": version,
        **({"informationUri": guide} if guide else {}),
        "rules": [_described(rules[name], guide) for name in asked],
    }
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _described(rule: Any, guide: str | None) -> dict[str, Any]:
    says = f"Finds {rule.description}."
    page = f"{guide}#{rule.name}" if guide else None
    return {
        "id": rule.name,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": says},
        "help": {"text": f"{says} Why it matters, and how to mend it: {page or 'docs/check.md'}"},
        **({"helpUri": page} if page else {}),
    }


def _result(file: Path, finding: Any, asked: list[str]) -> dict[str, Any]:
    kind = "member" if "/" in finding.where else "object"
    place = {"fullyQualifiedName": finding.where, "name": finding.where.rpartition("/")[2], "kind": kind}
    return {
        "ruleId": finding.rule,
        "ruleIndex": asked.index(finding.rule),
        "level": LEVELS[finding.severity],
        "message": {"text": f"{finding.where}: {finding.why}\n\nMend: {finding.mend}"},
        "locations": [
            {
                # A region is what viewers jump to; a model file has no lines, so it is its start.
                "physicalLocation": {"artifactLocation": {"uri": _uri(file)}, "region": {"startLine": 1}},
                "logicalLocations": [place],
            }
        ],
        # The same finding of the next run, whatever its words are.
        "partialFingerprints": {"tetherPlace/v1": f"{finding.rule}:{finding.where}"},
    }


def _uri(file: Path) -> str:
    """A path below the current folder as it is, which viewers take as one of the repository; another as an address."""
    inside = file.resolve().is_relative_to(Path.cwd())
    return quote(file.resolve().relative_to(Path.cwd()).as_posix()) if inside else file.resolve().as_uri()
