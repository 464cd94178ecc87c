"""An expression in mathematics."""

from __future__ import annotations

from tether.weights.argument import Argument
from tether.weights.constant import Constant
from tether.weights.expression import Expression, Node, Term, program

MAX_TEXT = 400
"""A part whose text is longer is left out, so that shared parts cannot make the text explode."""


def notation(root: Expression) -> str:
    """The expression as people write it; parts that would take a page are `...`."""
    terms: list[Term] = []
    for step in program(root):
        expression = step.expression
        if isinstance(expression, Node):
            term = expression.format(*(terms[place] for place in step.operands))
        elif isinstance(expression, (Constant, Argument)):
            term = expression.format()
        else:
            term = Term(expression.name)  # type: ignore[attr-defined]
        terms.append(term if len(term.text) <= MAX_TEXT else Term("..."))
    return terms[-1].text
