"""Only `tether.keras_seam` may rely on what is private to Keras: what is below `keras.src`, and `_private` attributes.

import-linter sees another project as one module and cannot tell `keras.src` from `keras`, so this reads the sources:

- imports, the attribute `keras.src`, and the name given as a string to a call (`import_module("keras.src.…")`);
- attributes that begin with one underscore, read or set, also by a string (`getattr(layer, "_layers")`), unless Tether
  itself defines the name: in the same file, or anywhere if the seam knows no attribute of Keras of that name.

A class of Tether may define a private method of Keras again, call Keras's own by `super()` and ask by `hasattr` whether
there is one, if the seam lists it in `OVERRIDDEN`.

Usage: python scripts/check_seam.py [FOLDER]     (default: src/tether)
       python scripts/check_seam.py --count      (the private names of Keras that the seam relies on)
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SEAM = "keras_seam"
PRIVATE = re.compile(r"(tensorflow\.)?keras\.src(\.\w+)*")
ATTRIBUTE = re.compile(r"_[a-z]\w*")
BY_STRING = {"getattr", "setattr", "hasattr", "delattr", "__setattr__", "__delattr__", "get", "pop", "set_untracked"}
OF_OTHERS = {
    "_execution_engine", "_getframe", "_version", "_is_view", "_modules", "_parameters", "_buffers",
    "_non_persistent_buffers_set",
    "_self_",
}  # fmt: skip
"""Private attributes that are not Keras's but Python's, PyTorch's and TensorFlow's."""


def reaches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The lines of a module that reach into `keras.src`, and what they reach for."""
    kerases = {"keras"}  # the names under which the module knows Keras
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            kerases |= {alias.asname for alias in node.names if alias.name == "keras" and alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr == "src":
            names = ["keras.src"] if isinstance(node.value, ast.Name) and node.value.id in kerases else []
        elif isinstance(node, ast.Call):
            names = list(strings_given(node))
        else:
            continue
        yield from ((node.lineno, name) for name in names if PRIVATE.fullmatch(name))


def strings_given(call: ast.Call) -> Iterator[str]:
    for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def attributes(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """The private attributes that a module reads or sets: the line, of what, and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ATTRIBUTE.fullmatch(node.attr):
            yield node.lineno, ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call):  # vars(layer)["_layers"]
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            if isinstance(key, str) and ATTRIBUTE.fullmatch(key):
                yield node.lineno, ast.unparse(node.value), key
        elif isinstance(node, ast.Call) and called(node) in BY_STRING:
            of = "hasattr" if called(node) == "hasattr" else ast.unparse(node.args[0]) if node.args else ""
            yield from ((node.lineno, of, name) for name in strings_given(node) if ATTRIBUTE.fullmatch(name))


def called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def definitions(tree: ast.AST) -> set[str]:
    """The private attributes that the classes of a module define: in their bodies, or on `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found.add(statement.name)
                elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
                    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
                    if statement.value is not None and "__slots__" in found:
                        found |= {c.value for c in ast.walk(statement.value) if isinstance(c, ast.Constant)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(ast.unparse(node.value)):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and called(node).startswith(("set_", "__setattr__")):
            found |= set(strings_given(node)) if node.args and is_own(ast.unparse(node.args[0])) else set()
    return {name for name in found if isinstance(name, str) and ATTRIBUTE.fullmatch(name)}


def is_own(of: str) -> bool:
    return of in {"self", "cls"}


def overridden(seam: list[ast.Module]) -> set[str]:
    """The private names of Keras that classes of Tether define again, as the seam lists them."""
    for node in (node for tree in seam for node in tree.body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "OVERRIDDEN":
            return set(ast.literal_eval(node.value)) if node.value is not None else set()
    return set()


def relied_on(seam: list[ast.Module]) -> tuple[set[str], set[str]]:
    """The private names of Keras that the seam relies on: those below `keras.src`, and attributes.

    An attribute counts if the seam reads or sets it on something that is not its own, or has its name as a string.
    """
    names: set[str] = set()
    found = overridden(seam)
    for tree in seam:
        names |= {name for _, name in reaches(tree)}
        aliases = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and PRIVATE.fullmatch(node.module or "")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                names.add(f"{aliases[node.value.id]}.{node.attr}")
    modules = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    for tree in seam:
        own = definitions(tree)
        for _, of, name in attributes(tree):
            if not (is_own(of) and name in own) and not any(known.endswith(f".{name}") for known in names):
                found.add(name)
        strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        found |= {text for text in strings if isinstance(text, str) and ATTRIBUTE.fullmatch(text)}
    return names - modules, found - OF_OTHERS


def main(argv: list[str]) -> int:
    counting = argv == ["--count"]
    root = Path(argv[0] if argv and not counting else "src/tether")
    trees = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in sorted(root.rglob("*.py"))}
    seam = [tree for path, tree in trees.items() if path.relative_to(root).parts[0] == SEAM]
    files = {path: tree for path, tree in trees.items() if path.relative_to(root).parts[0] != SEAM}
    names, keras_attributes = relied_on(seam)
    if counting:
        print("\n".join([*sorted(names), *sorted(keras_attributes)]))
        print(f"{len(names)} names below keras.src and {len(keras_attributes)} private attributes")
        return 0
    if not files:
        print(f"no Python files under {root}", file=sys.stderr)
        return 2
    again = overridden(seam)
    own = {path: definitions(tree) - again for path, tree in files.items()}
    anywhere = set().union(*own.values()) - keras_attributes
    broken = 0
    for path, tree in files.items():
        for line, name in reaches(tree):
            print(f"{path}:{line}: {name}: only tether.keras_seam may reach into keras.src")
            broken += 1
        for line, of, name in attributes(tree):
            is_tethers = name in own[path] or name in anywhere or name.startswith("_tether")
            if not is_tethers and not (of in {"super()", "hasattr"} and name in again):
                print(f"{path}:{line}: {of}.{name}: only tether.keras_seam may use a private attribute of Keras")
                broken += 1
    print(f"Only the seam relies on what is private to Keras: {'BROKEN' if broken else 'KEPT'} ({len(files)} files)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
