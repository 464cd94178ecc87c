"""The check: asks the rules that suit what is checked."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

import keras

from tether.errors import TetherError, UnknownName, received
from tether.inspection.checking.context import Batch, Context
from tether.inspection.checking.finding import Findings
from tether.inspection.checking.rules import RULES, Rule
from tether.inspection.collect import facts
from tether.layers.liveness import is_tied


def check(
    source: object, data: object = None, *, rules: Iterable[str] | None = None, ignore: Iterable[str] = ()
) -> Findings:
    """Finds sharing that is broken, or only looks like sharing.

    The rules are described in the guide to checking. A model is not changed; without data nothing is computed with
    it, and no weight is copied. Of a file only what its facts tell is judged, and values are read in parts.

    Args:
        source: A model or layer, or the path of a `.keras`, `.weights.h5` or `.safetensors` file.
        data: One batch, `(x, y)` or `x`: for the rules that need a backward pass. A tuple of two is `(x, y)`.
        rules: The names of the rules to ask; left out, all that suit the source.
        ignore: What is known and right: names of rules, or of a rule and a place as in `"equal-weights:head/kernel"`.

    Returns:
        The findings, the gravest first; true if there is any. Each has `rule`, `severity` ("error", "warning" or
        "hint"), `where`, `why`, and `mend`, the code that mends it.

    Raises:
        TetherError: It is nothing that can be checked, a rule cannot judge it, or the batch does not go through.
        UnknownName: There is no rule of that name.

    Example:
    ```python
    model.compile("adam", loss)
    found = tether.check(model, (x, y))
    print(found)
    assert not found.errors
    ```
    """
    ignored = set(ignore)
    _named(name.partition(":")[0] for name in ignored)
    with _context(source, data) as context:
        asked = [rule for rule in _chosen(context, rules) if rule.name not in ignored]
        findings = [finding for rule in asked for finding in rule.judge(context)]
    return Findings(
        [finding for finding in findings if f"{finding.rule}:{finding.where}" not in ignored],
        rules=[rule.name for rule in asked],
    )


def _context(source: object, data: object) -> Context:
    if isinstance(source, (str, os.PathLike)):
        if data is not None:
            raise TetherError(
                f"Data can be passed through a model, not through a file. {received(source=str(source))} "
                "Load the model and check that."
            )
        return Context(facts(source), file=Path(source))
    if not isinstance(source, keras.layers.Layer):
        raise TetherError(
            "What can be checked is a Keras model or layer, or the path of a file. "
            + received(source=type(source).__name__)
        )
    batch = None
    if data is not None:
        if not source.built:
            raise TetherError(
                f"{source.name!r} is not built, so no data can be passed through it. Call it once, or write "
                "`model.build(input_shape)`, and check it then."
            )
        batch = Batch(*data) if isinstance(data, tuple) and len(data) == 2 else Batch(data)
    found = facts(source)
    if not found.weights and not source.built and not is_tied(source):
        raise TetherError(
            f"{source.name!r} is not built, so it has no weights yet to be checked. Call it on data, or build it: "
            f"`{source.name}.build(input_shape)`."
        )
    return Context(found, model=source, data=batch)


def _named(names: Iterable[str]) -> list[str]:
    """The names of rules, each of which there is."""
    found = list(names)
    for name in found:
        if name not in RULES:
            close = difflib.get_close_matches(name, RULES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UnknownName(f"There is no rule {name!r}.{hint} The rules: {', '.join(RULES)}.")
    return found


def _chosen(context: Context, rules: Iterable[str] | None) -> list[Rule]:
    if rules is None:
        return [rule for rule in RULES.values() if rule.suits(context)]
    if isinstance(rules, str):
        raise TetherError(f"`rules` are several names, as in `rules=[{rules!r}]`. {received(rules=rules)}")
    chosen = [RULES[name] for name in dict.fromkeys(_named(rules))]
    for rule in chosen:
        if not rule.suits(context):
            source = "a file" if context.file is not None else "a live model"
            able = rule.file if context.file is not None else rule.model
            needs = "needs data: `check(model, (x, y))`" if able else f"cannot judge {source}"
            raise TetherError(f"The rule {rule.name!r} {needs}. {received(rules=[rule.name for rule in chosen])}")
    return chosen
