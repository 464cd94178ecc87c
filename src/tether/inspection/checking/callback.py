"""The check as a callback: a model is checked before it trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal

import keras

from tether.errors import TetherError, received
from tether.inspection.checking.examine import check
from tether.inspection.checking.finding import SEVERITIES, Finding, Findings


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


__all__ = ["CheckCallback"]
