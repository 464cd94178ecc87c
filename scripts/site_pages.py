"""Hooks of MkDocs: the pages of the site that are not files of docs/, and links that lead to them.

Pages are made of README, CHANGELOG, CONTRIBUTING, RELEASING, LICENSE and the programs in guides/; of the notebooks;
and of what each public module lists in `__all__`. The weight map is drawn while the site is built.
"""

import ast
import json
import os
import posixpath
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = (
    "ops", "forms", "transfer", "planning", "files", "adapters", "distribution", "inspection", "weights", "errors"
)  # fmt: skip
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
OBJECT = re.compile(r'\(<code><span title="object">object</span></code>(?:\)|,\s*(default:))')
MAP, WORKER, STYLE, KEYS = "weight-map-live.html", "iframe-worker.js", "wide.css", "keys.js"
LOOKS = """
.md-grid { max-width: 84rem; }
.md-tabs__link { opacity: 1; }
.md-typeset a:not(.headerlink):not(.md-button) { text-decoration: underline; }
.md-copyright { color: var(--md-footer-fg-color); }
[data-md-color-scheme="default"] { --md-default-fg-color--light: rgba(0, 0, 0, .68); }
"""
"""Wide pages, and what the theme lacks for readers who see little: contrast, and underlined links."""
FOCUS = """addEventListener("load", () => {
    for (const region of document.querySelectorAll(".md-typeset__scrollwrap, pre code")) region.tabIndex = 0;
});
"""
"""Lets the keyboard into what scrolls sideways: wide tables and code on a telephone."""


def on_files(files, config):
    """Adds the pages that docs/ does not have."""
    from mkdocs.structure.files import File  # only here: who reads the names below needs no MkDocs

    pages = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in OUTSIDE.items()}
    pages["license.md"] = shown("Licence", ROOT / "LICENSE", "text")
    pages |= {f"guides/{path.stem}.md": program(path) for path in sorted(ROOT.glob("guides/[a-z]*.py"))}
    pages |= {f"tutorials/{path.stem}.md": notebook(path) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
    pages |= {f"reference/{name}.md": module_page(f"tether.{name}") for name in MODULES}
    pages["reference/tether.md"] = module_page("tether")
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, MAP, content=live_map()))
    files.append(File.generated(config, WORKER, content=(ROOT / "scripts" / WORKER).read_text()))
    files.append(File.generated(config, STYLE, content=LOOKS))
    files.append(File.generated(config, KEYS, content=FOCUS))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between files of the repository become links between pages."""
    place = repository_path(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def moved(match):
        if "://" in match[1] or match[1].startswith("mailto:"):
            return match[1]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
        return posixpath.relpath(site_path(target), here or ".")

    blocks = re.split(r"(^```.*?^```[ \t]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    markdown = "".join(part if number % 2 else LINK.sub(moved, part) for number, part in enumerate(blocks))
    if page.file.src_uri == "weight-map.md":
        markdown += (
            "\n\n## A map to try\n\n"
            f"Drawn by `tether.plot` when this site was built. [The map alone]({MAP})\n\n"
            f'<iframe src="{MAP}" title="A weight map" style="width:100%; height:36rem; border:0"></iframe>\n'
        )
    return markdown


def on_post_page(output, page, config):
    """Leaves out the type `object` of arguments that take several kinds of things: it tells a reader nothing."""
    output = output.replace('role="dialog">', 'role="dialog" aria-label="Search">')  # which the theme does not name
    without = OBJECT.sub(lambda match: f"({match[1]}" if match[1] else "", output)
    return without if page.file.src_uri.startswith("reference/") else output


def repository_path(page):
    """The file of the repository that a page shows."""
    outside = {page: source for source, page in OUTSIDE.items()}
    kind, _, name = page.rpartition("/")
    folders = {"guides": f"guides/{Path(name).stem}.py", "tutorials": f"notebooks/{Path(name).stem}.ipynb"}
    return outside.get(page) or folders.get(kind) or f"docs/{page}"


def site_path(source):
    """The page that shows a file of the repository; one of docs/ is its own."""
    path = Path(source)
    if source == "LICENSE":
        return "license.md"
    if path.parts[0] == "guides":
        return f"guides/{path.stem}.md"
    if path.parts[0] == "notebooks":
        return f"tutorials/{path.stem}.md"
    return OUTSIDE.get(source) or source.removeprefix("docs/")


def shown(title, path, language):
    """A page that is the text of a file."""
    return f"# {title}\n\n```{language}\n{path.read_text(encoding='utf-8')}```\n"


def program(path):
    """A program of guides/: what it says of itself, and its text."""
    title = path.stem.replace("_", " ").capitalize()
    return shown(title, path, "python")


def notebook(path):
    """A notebook with the outputs that are in it."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            text = "".join(output.get("text") or output["data"]["text/plain"]).rstrip()
            parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def public_names(module):
    """What a module lists in `__all__`, or, where it has none, its errors; read and not imported."""
    path = ROOT / "src" / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]


def module_page(module):
    """The reference of a module: its docstring, and a section for each public name."""
    names = [name for name in public_names(module) if not (module == "tether" and name in MODULES)]
    parts = [
        f"# {module}",
        f"::: {module}\n    options: {{show_root_heading: false, members: false, heading_level: 1}}",
    ]
    return "\n\n".join([*parts, *(f"::: {module}.{name}" for name in names)]) + "\n"


def live_map():
    """The page of a weight map, drawn now."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / MAP
        command = [sys.executable, str(ROOT / "scripts/draw_map.py"), str(target)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
        return target.read_text(encoding="utf-8")
