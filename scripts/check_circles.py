"""No circle of imports: what a module needs can be read before it, also what it imports in functions or for types only.

An import in a function hides a circle from Python, not from a reader. So every import statement counts, wherever it
stands. What Python imports by itself before a module, the `__init__` of each folder around it, does not.

Usage: python scripts/check_circles.py [FOLDER]     (default: src)
"""

import ast
import graphlib
import sys
from pathlib import Path


def modules(root: Path) -> dict[str, Path]:
    """The modules below a folder, by their dotted names."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(root.rglob("*.py"))
    }


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of those known that a module imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known if names <= known else {node.module, *(names & known)}
    return found & known


def circle(root: Path) -> list[str]:
    """Modules each of which imports the next, the last being the first again; empty if there are none."""
    paths = modules(root)
    graph = {name: imported(ast.parse(path.read_text()), set(paths)) - {name} for name, path in paths.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def main() -> int:
    """Says whether there is a circle, and which."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "src")
    found = circle(root)
    if found:
        print("Imports go in a circle:\n  " + "\n  imports ".join(found))
        return 1
    print(f"No circle of imports, those in functions and for types counted: KEPT ({len(modules(root))} files)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
