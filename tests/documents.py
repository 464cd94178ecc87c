"""The Python blocks of a Markdown file, to be run as the reader would run them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def python_blocks(name):
    """Each block's first line number in the file, and its code."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in BLOCK.finditer(text)]


def run(name, code, line, namespace):
    """Runs a block; a failure points to its line in the file."""
    exec(compile("\n" * line + code, str(ROOT / name), "exec"), namespace)
