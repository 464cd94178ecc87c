"""What a check says: one finding, and all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Literal, overload

from tether.types import Config
from tether.weights.expression import Expression, Node, Stored
from tether.weights.operators.structure import Transpose
from tether.weights.weight import Weight

if TYPE_CHECKING:
    from tether.inspection.checking.context import Context

# --------------------------------------------------------------------------- findings


Severity = Literal["error", "warning", "hint"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "hint")
WIDTH = 110
VERSION = 1


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that a person should know."""

    rule: str
    """The name of the rule that found it: `frozen-constant`."""
    severity: Severity
    """`error`: the model does something else than what its code says, or a file will lose something. `warning`: most
    likely not meant. `hint`: right as it is, with a consequence that surprises people."""
    where: str
    """The weight, layer or operation, by names from the model down: `block/attention/query/kernel`."""
    why: str
    """What is there, and what follows from it."""
    mend: str
    """The code that mends it. `model` is what was checked."""

    def __str__(self) -> str:
        body = [self.why, *(f"mend: {line}" if not number else line for number, line in enumerate(_lines(self.mend)))]
        wrapped = [line for text in body for line in _wrapped(text)]
        return "\n".join([f"{self.severity:<8}{self.rule}  {self.where}", *(f"        {line}" for line in wrapped)])


def _lines(code: str) -> list[str]:
    return code.splitlines() or [""]


def _wrapped(text: str) -> list[str]:
    if text.startswith("mend: ") or len(text) <= WIDTH - 8:
        return [text]  # code is copied, so it is not broken into lines
    return textwrap.wrap(text, WIDTH - 8, break_long_words=False, break_on_hyphens=False)


class Findings(Sequence[Finding]):
    """All findings of a check, the gravest first; true if there is any.

    Args:
        findings: The findings.
        rules: The names of the rules that were asked.
    """

    def __init__(self, findings: Sequence[Finding] = (), *, rules: Sequence[str] = ()) -> None:
        self._findings = tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
        self.rules = tuple(rules)

    @overload
    def __getitem__(self, index: int) -> Finding: ...

    @overload
    def __getitem__(self, index: slice) -> Findings: ...

    def __getitem__(self, index: int | slice) -> Finding | Findings:
        found = self._findings[index]
        return found if isinstance(found, Finding) else Findings(found, rules=self.rules)

    def __len__(self) -> int:
        return len(self._findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings)

    def _of(self, severity: Severity) -> Findings:
        return Findings([finding for finding in self if finding.severity == severity], rules=self.rules)

    @property
    def errors(self) -> Findings:
        """The findings of severity `error`."""
        return self._of("error")

    @property
    def warnings(self) -> Findings:
        """The findings of severity `warning`."""
        return self._of("warning")

    @property
    def hints(self) -> Findings:
        """The findings of severity `hint`."""
        return self._of("hint")

    def by_rule(self, name: str) -> Findings:
        """The findings of one rule, by its name."""
        return Findings([finding for finding in self if finding.rule == name], rules=self.rules)

    def to_json(self) -> Config:
        """The findings as what JSON can hold."""
        return {
            "version": VERSION,
            "rules": list(self.rules),
            "counts": {severity: len(self._of(severity)) for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in self],
        }

    def _counts(self) -> str:
        counted = ((severity, len(self._of(severity))) for severity in SEVERITIES)
        return ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counted if count)

    def __str__(self) -> str:
        if not self:
            return f"Nothing found by {len(self.rules)} rules."
        return "\n\n".join([*map(str, self), self._counts()])

    def __repr__(self) -> str:
        return f"<Findings: {self._counts() or 'none'}>"

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{escape(str(self))}</p>"
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("", "rule", "where", "why", "mend"))
        rows = "".join(
            f"<tr><td>{finding.severity}</td><td>{escape(finding.rule)}</td><td><code>{escape(finding.where)}</code></td>"
            f"<td style='text-align:left'>{escape(finding.why)}</td>"
            f"<td style='text-align:left'><pre>{escape(finding.mend)}</pre></td></tr>"
            for finding in self
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><p>{self._counts()}</p>"


# --------------------------------------------------------------------------- rules by name
# The rules: each a function from a context to findings, with what it can judge.


Judge = Callable[["Context"], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """One rule: its name, and the function that finds what breaks it."""

    name: str
    """In kebab case: `equal-weights`."""
    description: str
    """What it finds, in one line."""
    judge: Judge
    model: bool
    """Whether it can judge a live model."""
    file: bool
    """Whether it can judge a file."""
    needs_data: bool
    """Whether it judges only with a batch of data."""

    def suits(self, context: Context) -> bool:
        """Whether it can judge what is checked."""
        source = self.file if context.file is not None else self.model
        return source and (context.data is not None or not self.needs_data)


RULES: dict[str, Rule] = {}
"""All rules, by name, in the order in which they are asked."""


def rule(
    name: str, description: str, *, model: bool = True, file: bool = False, needs_data: bool = False
) -> Callable[[Judge], Judge]:
    """Registers a function as a rule."""

    def register(judge: Judge) -> Judge:
        if name in RULES:
            raise TypeError(f"Two rules are named {name!r}.")
        RULES[name] = Rule(name, description, judge, model, file, needs_data)
        return judge

    return register


# --------------------------------------------------------------------------- the line that mends it
# Code that makes one weight out of another.


def arranged(code: str, axes: tuple[int, ...], scale: float = 1.0) -> str:
    """Code for `scale * weight.transpose(axes)`."""
    if axes == tuple(range(len(axes))[::-1]) and len(axes) > 1:
        code += ".T"
    elif axes != tuple(range(len(axes))):
        code += f".transpose({', '.join(map(str, axes))})"
    return code if scale == 1 else f"{scale:.7g} * {code}"


def in_words(axes: tuple[int, ...], scale: float = 1.0) -> str:
    """How one array is made from another: ` transposed and times 0.5`, or nothing."""
    turned = [" transposed"] if axes != tuple(range(len(axes))) else []
    return " and".join([*turned, *([f" times {scale:.6g}"] if scale != 1 else [])])


def as_code(expression: Expression, weight_code: Mapping[Stored, str]) -> str:
    """Code for an expression, or its notation where that is not written in a few words."""
    if isinstance(expression, Weight):
        return weight_code.get(expression) or str(expression.name)
    if isinstance(expression, Transpose) and isinstance(expression, Node):
        (operand,) = expression.operands
        axes = expression.parameters["axes"]
        inner = as_code(operand, weight_code)
        return f"{inner}.T" if axes is None else f"{inner}.transpose({', '.join(map(str, axes))})"
    return expression.notation()
