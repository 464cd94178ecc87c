"""Only `tether.keras_seam` may reach into `keras.src`.

import-linter sees another project as one module and cannot tell `keras.src` from `keras`, so this reads the sources:
imports, the attribute `keras.src`, and the name given as a string to a call (`import_module("keras.src.…")`).

Usage: python scripts/check_seam.py [FOLDER]     (default: src/tether)
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SEAM = "keras_seam"
PRIVATE = re.compile(r"(tensorflow\.)?keras\.src(\.\w+)*")


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
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            names = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
        else:
            continue
        yield from ((node.lineno, name) for name in names if PRIVATE.fullmatch(name))


def main(argv: list[str]) -> int:
    root = Path(argv[0] if argv else "src/tether")
    files = [path for path in sorted(root.rglob("*.py")) if path.relative_to(root).parts[0] != SEAM]
    if not files:
        print(f"no Python files under {root}", file=sys.stderr)
        return 2
    broken = 0
    for path in files:
        for line, name in reaches(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            print(f"{path}:{line}: {name}: only tether.keras_seam may reach into keras.src")
            broken += 1
    print(f"Only the seam reaches into keras.src: {'BROKEN' if broken else 'KEPT'} ({len(files)} files)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
