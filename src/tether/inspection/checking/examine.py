"""The check, which asks the rules that suit what is checked; and as a callback, before a model trains."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import keras

from tether.errors import TetherError, UnknownName, received
from tether.inspection.checking.context import Batch, Context
from tether.inspection.checking.finding import SEVERITIES, Finding, Findings
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


class CheckCallback(keras.callbacks.Callback):
    """Runs `tether.check(model)` before the first epoch of `fit`. It does nothing else.

    Findings that are grave enough raise, and nothing is trained. The others are warned of, each once for as long as
    the callback lives. A model that is first built by its first step is checked after that step.

    Args:
        raise_on: The mildest severity that raises: `"error"`, or `"warning"` for both. `None`: none raises.
        ignore: What is known and right, as for `tether.check`: names of rules, or of a rule and a place.

    Raises:
        TetherError: `raise_on` is none of these; at the start of `fit`, if the check finds something that grave.
        UnknownName: At the start of `fit`, if there is no rule of a name in `ignore`.

    Example:
    ```python
    model.compile("adam", loss)
    model.fit(x, y, callbacks=[tether.CheckCallback()], verbose=0)
    ```
    """

    def __init__(self, *, raise_on: Literal["error", "warning"] | None = "error", ignore: Iterable[str] = ()) -> None:
        super().__init__()
        if raise_on not in ("error", "warning", None):
            raise TetherError(f"`raise_on` is 'error', 'warning' or None. {received(raise_on=raise_on)}")
        if isinstance(ignore, str):
            raise TetherError(f"`ignore` are several names, as in `ignore=[{ignore!r}]`. {received(ignore=ignore)}")
        self.raise_on, self.ignore = raise_on, tuple(ignore)
        self._raising = () if raise_on is None else SEVERITIES[: SEVERITIES.index(raise_on) + 1]
        self._warned: set[Finding] = set()
        self._due = False

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Checks the model, if it is built."""
        self._due = True
        if self.model.built:
            self._check()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Checks a model that the first step has built."""
        if self._due:
            if keras.backend.backend() == "jax":
                self.model.jax_state_sync()
            self._check()

    def _check(self) -> None:
        self._due = False
        found = check(self.model, ignore=self.ignore)
        grave = [finding for finding in found if finding.severity in self._raising]
        if grave:
            known = [f"{grave[0].rule}:{grave[0].where}"]
            raise TetherError(
                f"The check of {self.model.name!r} before its training found:\n\n{Findings(grave)}\n\n"
                f"Mend it, or leave out what is right: `tether.CheckCallback(ignore={known})`."
            )
        new = [finding for finding in found if finding not in self._warned]
        if new:
            self._warned.update(new)
            warnings.warn(
                f"The check of {self.model.name!r} before its training found:\n\n{Findings(new)}", stacklevel=2
            )
