"""The blocks of a Markdown file, to be run as the reader would run them, and where its links lead."""

import re
import string
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


# What is no Markdown: blocks, and code within a line.
CODE = re.compile(r"^```.*?^```[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PUNCTUATION = str.maketrans("", "", string.punctuation.replace("-", "").replace("_", "") + "·→×")


def anchors(text):
    """The anchors that the headings of a page get, on the repository's page as on the site."""
    found = []
    for heading in re.findall(r"^#+ +(.*?)[ #]*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = words.strip().lower().translate(PUNCTUATION).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


def broken_links(file, text):
    """The links of a Markdown text that stands in a file, to what is not there and to headings that no page has."""
    for link in LINK.findall(CODE.sub("", text)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (file.parent / path).resolve()
        headings = anchors(target.read_text(encoding="utf-8") if path else text) if anchor and target.exists() else []
        if not target.exists() or (anchor and anchor not in headings):
            yield link
