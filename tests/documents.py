"""The blocks of a Markdown file, to be run as the reader would run them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(name):
    """Each block's language, first line number in the file, and text."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [(match[1], text.count("\n", 0, match.start(2)), match[2]) for match in BLOCK.finditer(text)]


def python_blocks(name):
    """Each Python block's first line number in the file, and its code."""
    return [(line, code) for language, line, code in blocks(name) if language == "python"]


def commands(code):
    """The commands of a shell block, without their comments, and the exit code that a comment may say."""
    for line in code.splitlines():
        command, _, comment = line.partition("#")
        said = re.search(r"exit code (\d+)", comment)
        if command.strip():
            yield command.strip(), int(said[1]) if said else 0


def run(name, code, line, namespace):
    """Runs a block; a failure points to its line in the file."""
    exec(compile("\n" * line + code, str(ROOT / name), "exec"), namespace)
