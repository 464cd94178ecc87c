"""The tables of planning.md, files.md and benchmarks.md in `docs/`, from JSON files: `python -m benchmarks.figures`.

Those of `docs/files.md` and of growth in `docs/benchmarks.md` are written where they belong, between two comments; the
others are printed.
"""

import contextlib
import io
import json
import statistics
from collections import Counter

from benchmarks._measure import RESULTS

BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


def rows_of(backend, device, part, benchmark="planner"):
    path = RESULTS / f"{benchmark}-{backend}-{device}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["case"].removeprefix(f"{part}: "): row for row in rows if row["case"].startswith(f"{part}: ")}


def table(heads, lines):
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def number(value):
    return "" if value is None else f"{value:.0f}" if value >= 9.95 else f"{value:.2f}"


def lora(device):
    found = {backend: rows_of(backend, device, "lora") for backend in BACKENDS}
    names = [
        name.removesuffix(", forward") for name in found["jax"] if name.endswith(", forward") and "over" not in name
    ]
    lines = []
    for name in names:
        line = [name]
        for backend in BACKENDS:
            rows = found[backend]
            line += [number(rows.get(f"{name}, {step}", {}).get("speedup")) for step in ("forward", "training")]
            line.append(number(rows.get(f"{name}, enable_lora over the plain layers, forward", {}).get("ratio")))
        lines.append(line)
    heads = [""] + [f"{label} {column}" for label in BACKENDS.values() for column in ("forward", "training", "most")]
    table(heads, lines)


def regret(device):
    lines = []
    for backend, label in BACKENDS.items():
        rows = rows_of(backend, device, "regret")
        if rows:
            costs = sorted(row["regret"] for row in rows.values())
            # What choosing does for somebody who would always build the weight, or always apply the parts.
            built = [row["regret"] * min(row["factored_over_built"], 1.0) for row in rows.values()]
            parts = [row["regret"] * min(1.0 / row["factored_over_built"], 1.0) for row in rows.values()]
            lines.append(
                [
                    label,
                    str(len(costs)),
                    f"{sum(cost <= 1.10 for cost in costs) / len(costs):.1%}",
                    f"{statistics.median(costs):.2f}",
                    f"{costs[-1]:.2f}",
                    f"{statistics.median(built):.2f}, {min(built):.3f}",
                    f"{statistics.median(parts):.2f}, {min(parts):.3f}",
                ]
            )
    heads = ["", "cases", "regret at most 1.10", "median", "worst", "beside always building: median, best"]
    table([*heads, "beside always applying: median, best"], lines)
    for backend, label in BACKENDS.items():
        rows = rows_of(backend, device, "regret")
        print(label, dict(Counter(row["chosen"] for row in rows.values())))
        for name, row in rows.items():
            if row["regret"] > 1.10:
                print(f"  {row['regret']:.2f}  {name}  ({row['chosen']})")


def ratios(device, part, benchmark="planner"):
    lines: dict[str, list[str]] = {}
    for place, backend in enumerate(BACKENDS):
        for name, row in rows_of(backend, device, part, benchmark).items():
            lines.setdefault(name, [name, "", "", ""])[1 + place] = f"{row['ratio']:.2f}"
    table(["", *BACKENDS.values()], lines.values())


def peers(device):
    """How many times faster than PyTorch's own ways: a row for each size, two columns for each peer."""
    lines: dict[str, list[str]] = {}
    names = ("parametrize", "peft", "plain")
    for name, row in rows_of("torch", device, "peers", "peers").items():
        peer, size, step = name.split(" ", 1)[0], name.split(" ", 1)[1].rpartition(" ")[0], name.rpartition(" ")[2]
        line = lines.setdefault(size, [size, *("",) * 6])
        line[1 + 2 * names.index(peer) + (step == "training")] = f"{row['speedup']:.2f}"
    table(["", *(f"{name} {step}" for name in names for step in ("forward", "training"))], lines.values())


def memory(device):
    columns = ("materialize_MB", "factored_MB", "auto_MB")
    lines = [
        [name, *(f"{row[column]:.1f}" for column in columns)] for name, row in rows_of("jax", device, "memory").items()
    ]
    table(["", "built", "applied", "planned"], lines)
    for backend, label in BACKENDS.items():
        lines = [
            [f"{label}: {name}", *(f"{row[column]:.0f}" for column in columns)]
            for name, row in rows_of(backend, device, "process memory").items()
        ]
        table(["", "built", "applied", "planned"], lines)


DOCS = RESULTS.parents[1] / "docs"
MARKS = "<!-- figures -->", "<!-- end of figures -->"


@contextlib.contextmanager
def into(page):
    """Writes the tables that are printed in the block into a page, between two comments."""
    path = DOCS / page
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        yield
    path.write_text(f"{before}{MARKS[0]}\n{written.getvalue().rstrip()}\n{MARKS[1]}{after}", encoding="utf-8")
    print(f"written: {path}")


def files(device):
    """What it costs to save and load."""
    for part, columns in (
        ("save", {"bytes_over_unique": "bytes", "seconds": "s", "times_as_fast_as_plain": "times as fast"}),
        ("load", {"seconds": "s", "times_as_fast_as_plain": "times as fast"}),
        ("memory", {"rise_over_unique": "rise", "process_MB": "process, MB"}),
    ):
        lines: dict[str, list[str]] = {}
        width = len(columns)
        for place, backend in enumerate(BACKENDS):
            for name, row in rows_of(backend, device, part, "files").items():
                line = lines.setdefault(name, [name] + [""] * width * len(BACKENDS))
                for number, column in enumerate(columns):
                    shown = f"{row[column]:.0f}" if column == "process_MB" else f"{row[column]:.2f}"
                    line[1 + place * width + number] = f"{row[column]:.4f}" if "bytes" in column else shown
        table([part, *(f"{label} {head}" for label in BACKENDS.values() for head in columns.values())], lines.values())


def growth(device):
    """Seconds with 1,600 uses of one weight, how they grow, and the ratio to the layers without Tether."""
    lines: dict[str, list[str]] = {}
    for place, backend in enumerate(BACKENDS):
        for name, row in rows_of(backend, device, "uses", "growth").items():
            line = lines.setdefault(name, [name] + [""] * 3 * len(BACKENDS))
            at = 1 + 3 * place
            line[at] = f"{row['at_1600']:,.0f}" if row["at_1600"] > 1000 else f"{row['at_1600']:.3g}"
            line[at + 1] = f"{row['exponent']:.2f}"
            line[at + 2] = f"{row['ratio']:.2f}" if "ratio" in row else ""
    table(
        ["1,600 uses", *(f"{label}{head}" for label in BACKENDS.values() for head in (", s", " exponent", " ratio"))],
        lines.values(),
    )
    ratios(device, "step", "growth")


def main(device="cpu"):
    with into("files.md"):
        files(device)
    with into("benchmarks.md"):
        growth(device)
    lora(device)
    regret(device)
    for part in ("by hand", "serving"):
        print(part)
        ratios(device, part)
    peers(device)
    memory(device)


if __name__ == "__main__":
    main()
