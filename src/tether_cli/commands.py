"""The commands: each reads its arguments, and asks the package."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tether_cli import adapters
from tether_cli.console import (
    Commands,
    Custom,
    Failed,
    File,
    Force,
    InputShapes,
    Json,
    Load,
    Model,
    examples,
    print_json,
)

app = typer.Typer(
    name="tether",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(adapters.group)


@app.callback()
def tether(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=lambda v: _version(v))
    ] = False,
) -> None:
    """Looks at what Keras models share, in their files.

    Exit codes: 0 if all is well, 1 if a check found errors or two files
    differ, 2 if the command failed.

    Keras runs on the backend that KERAS_BACKEND names, or else on the first
    that is installed of jax, torch and tensorflow.
    """


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"tether {version('keras-tether')}")
        raise typer.Exit


@app.command(
    epilog=examples(
        "tether summary model.keras",
        "tether summary model.keras --shared-only",
        "tether summary model.keras --json | jq .totals",
    )
)
def summary(
    file: File,
    shared_only: Annotated[bool, typer.Option("--shared-only", help="Leave out weights with one use.")] = False,
    adapters: Annotated[bool, typer.Option("--adapters", help="List the adapters instead of the weights.")] = False,
    width: Annotated[int | None, typer.Option(help="Columns; left out, those of the terminal.")] = None,
    load: Load = False,
    custom: Custom = None,
    as_json: Json = False,
) -> None:
    """Shows what a model stores, who reads it, and what sharing saves.

    The file is read without making the model.
    """
    package, source = _source(file, load, custom)
    if as_json:
        print_json(package.inspection.facts(source).to_json())
    else:
        package.summary(source, shared_only=shared_only, adapters=adapters, width=width)


@app.command(
    epilog=examples(
        "tether check model.keras",
        "tether check model.keras --load --custom my_layers",
        "tether check model.keras --ignore equal-weights --json",
        "tether check model.keras before.keras --format sarif",
    )
)
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files: .keras, .weights.h5, .safetensors.")],
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="RULE[:PLACE]", help="Leave a rule out, or what it says of one place.")
    ] = None,
    load: Load = False,
    custom: Custom = None,
    format: Annotated[
        Literal["text", "json", "sarif"], typer.Option(help="How to print the findings; sarif is SARIF 2.1.0.")
    ] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Finds sharing that is broken, or only looks like sharing.

    Ends with exit code 1 if there is a finding of severity "error".

    Reading a file tells less than the model does: --load asks the rules
    for live models.
    """
    from tether_cli.console import busy
    from tether_cli.models import require

    if as_json and format == "sarif":
        raise Failed("--json prints JSON, --format sarif prints SARIF: give one of them.")
    require(*files)
    found: dict[Path, Any] = {}
    for file in dict.fromkeys(files):
        package, source = _source(file, load, custom, compile=True)
        with busy(f"Checking {file.name}"):
            found[file] = package.check(source, ignore=ignore or ())
    if format == "sarif":
        print_json(_sarif(found, package.__version__))
    elif as_json or format == "json":
        told = [findings.to_json() for findings in found.values()]
        several = {"version": 1, "files": {str(file): data for file, data in zip(found, told, strict=True)}}
        print_json(several if len(found) > 1 else told[0])
    else:
        named = len(found) > 1
        typer.echo("\n\n".join(f"{file}\n{findings}" if named else str(findings) for file, findings in found.items()))
    raise typer.Exit(1 if any(findings.errors for findings in found.values()) else 0)


def _sarif(found: dict[Path, Any], version: str) -> dict[str, Any]:
    from contextlib import suppress
    from importlib.metadata import PackageNotFoundError, metadata

    from tether.inspection.checking.rules import RULES
    from tether_cli.sarif import log

    urls: dict[str, str] = {}
    with suppress(PackageNotFoundError):  # it runs from its sources
        urls.update(line.split(", ", 1) for line in metadata("keras-tether").get_all("Project-URL") or ())
    guide = f"{urls['Documentation']}/check.md" if "Documentation" in urls else None
    return log(found, RULES, version=version, guide=guide)


@app.command(
    epilog=examples(
        "tether plot model.keras",
        'tether plot model.keras -o weights.svg --title "Before tying"',
        "tether plot model.keras -o shared.html --shared-only",
    )
)
def plot(
    file: File,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .html or .svg file; left out, FILE-weights.html in this folder."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="What it says on top.")] = None,
    shared_only: Annotated[bool, typer.Option("--shared-only", help="Leave out weights that are not shared.")] = False,
    force: Force = False,
    load: Load = False,
    custom: Custom = None,
) -> None:
    """Draws a map: what is stored on one side, the layers on the other, ribbons for who reads what.

    The page is one file that needs no network.
    """
    from tether_cli.console import busy
    from tether_cli.models import require, target

    require(file)
    final = target(output or Path(f"{file.name.partition('.')[0]}-weights.html"), inputs=(file,), force=force)
    package, source = _source(file, load, custom)
    with busy(f"Drawing {file.name}"):
        package.plot(source, final, title=title, shared_only=shared_only)
    typer.echo(f"Wrote {output or final.name}")


@app.command(epilog=examples("tether diff before.keras after.keras", "tether diff model.keras model.weights.h5 --json"))
def diff(before: File, after: File, as_json: Json = False) -> None:
    """Shows what differs in storing and sharing between two files.

    Ends with exit code 1 if anything does. Values are not compared.
    """
    from tether_cli.models import require, start

    require(before, after)
    found = start().inspection.diff(before, after)
    if as_json:
        print_json({"version": 1, "differ": bool(found), "changes": [asdict(change) for change in found.changes]})
    else:
        typer.echo(str(found))
    raise typer.Exit(1 if found else 0)


@app.command(
    epilog=examples(
        "tether explain model.keras",
        "tether explain model.keras --batch 4096 --training",
        "tether explain model.keras --input-shape 5",
    )
)
def explain(
    model: Model,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a call.")] = 32,
    input_shape: InputShapes = None,
    training: Annotated[bool, typer.Option("--training", help="Plan for a training step.")] = False,
    custom: Custom = None,
) -> None:
    """Explains how each layer computes with its combined weights, and what the other ways would cost.

    The model is loaded in Keras's safe mode; nothing is computed with it. A
    subclassed model may not know its inputs: --input-shape says them.
    """
    from tether_cli.console import busy
    from tether_cli.models import arguments, as_one_argument, import_custom, load, require, start

    require(model)
    package = start()
    loaded = load(model, import_custom(custom), compile=False)
    loaded, inputs = as_one_argument(loaded, arguments(loaded, input_shape), batch)
    with busy(f"Planning {model.name}"):
        found = package.planning.explain(loaded, inputs, training=training)
    typer.echo(str(found))


@app.command(epilog=examples("tether materialize model.keras -o plain.keras"))
def materialize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .keras file to write.")],
    force: Force = False,
    custom: Custom = None,
) -> None:
    """Writes an ordinary Keras file with the same outputs: every use becomes a variable of its layer's own.

    The file that is written needs no Tether to be read. The model is loaded
    in Keras's safe mode; the file that is read stays as it is.
    """
    from tether_cli.console import busy
    from tether_cli.models import import_custom, load, require, save, start, target

    require(model)
    if output.suffix != ".keras":
        raise Failed(f"A model is saved in a file that ends in '.keras', not {output.name!r}.")
    final = target(output, inputs=(model,), force=force)
    package = start()
    loaded = load(model, import_custom(custom), compile=False)
    with busy("Untying"):
        plain = package.materialize(loaded)
    with busy(f"Writing {output.name}"):
        save(plain, final)
    typer.echo(f"Wrote {output}: {plain.count_params():,} parameters, {loaded.count_params():,} in {model.name}")


@app.command(
    epilog=examples(
        'tether share deep.keras --blocks "block_*" --pattern cycle:2 -o half.keras',
        'tether share deep.keras --blocks "block_*" --pattern cycle:2 --rank 8 -o relaxed.keras',
        'tether share deep.keras --blocks "block_*" --only "*kernel" --values mean -o kernels.keras',
    )
)
def share(
    model: Model,
    blocks: Annotated[str, typer.Option(metavar="NAMES", help="The blocks, by a pattern of their paths: 'block_*'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .keras file to write.")],
    pattern: Annotated[
        str, typer.Option(help="Which blocks are one: all, sequence:K, cycle:K, cycle_reverse:K or sandwich.")
    ] = "all",
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Share only these weights of a block. Repeatable.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave these with each depth; left out, norms. Repeatable."),
    ] = None,
    values: Annotated[
        Literal["first", "mean"] | None,
        typer.Option(help="What a shared weight starts with; left out, the first block's value."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Add to the mean a low-rank part of each depth, as near as it can be.")
    ] = None,
    force: Force = False,
    custom: Custom = None,
) -> None:
    """Writes the model with blocks of one structure that share weights through its depth.

    The model is loaded in Keras's safe mode; the file that is read stays as
    it is. What is printed says how far each weight has moved.
    """
    from tether_cli.console import busy
    from tether_cli.models import import_custom, load, require, save, start, target

    require(model)
    if output.suffix != ".keras":
        raise Failed(f"A model is saved in a file that ends in '.keras', not {output.name!r}.")
    if rank is not None and values == "first":
        raise Failed("--rank adds to the mean of the blocks: leave --values first out.")
    final = target(output, inputs=(model,), force=force)
    package = start()
    loaded = load(model, import_custom(custom), compile=False)
    started = values or "first" if rank is None else package.low_rank(rank)
    with busy("Sharing"):
        report = package.share_depth(
            loaded, pattern, blocks=blocks, only=only or "*", keep=keep or "norms", values=started
        )
    with busy(f"Writing {output.name}"):
        save(loaded, final)
    typer.echo(f"{report}\nWrote {output}: {loaded.count_params():,} parameters")


@app.command(
    epilog=examples(
        "tether export model.keras -o out.onnx",
        "tether export model.keras -o out.onnx --format onnx --tolerance 1e-3",
        "tether export model.keras -o out.onnx --input-shape 5",
    )
)
def export(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A file that ends in .onnx, .tflite or .pt2, or a folder.")
    ],
    format: Annotated[
        Literal["tf_saved_model", "onnx", "litert", "torch"] | None,
        typer.Option(help="What to write; left out, what the name of OUTPUT says."),
    ] = None,
    input_shape: InputShapes = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run what was written, and compare it with the model.")
    ] = True,
    tolerance: Annotated[float, typer.Option(help="How far outputs may be from the model's.")] = 1e-4,
    force: Force = False,
    custom: Custom = None,
) -> None:
    """Writes a model for a runtime: SavedModel, ONNX, LiteRT, torch.export. Each weight is stored once.

    What is written is run on made-up inputs and compared with the model
    before it gets its name. Not every backend writes every format; the error
    says which one does: KERAS_BACKEND=tensorflow tether export ...
    """
    from tether_cli.console import busy
    from tether_cli.models import arguments, import_custom, load, require, start, target

    require(model)
    format = format or _format_of(output)
    final = target(output, inputs=(model,), force=force, folder=format == "tf_saved_model")
    package = start()
    loaded = load(model, import_custom(custom), compile=False)
    signature = arguments(loaded, input_shape) if input_shape else None
    with busy(f"Writing {output.name}"):
        found = package.files.export(
            loaded, final, format, input_signature=signature, verify=verify, tolerance=tolerance
        )
    ran = "" if found.difference is None else f", outputs within {found.difference:.0e} of the model's"
    typer.echo(f"Wrote {output}: {found.bytes:,} bytes, {found.unique_bytes:,} of weights{ran}")


def _format_of(output: Path) -> Literal["tf_saved_model", "onnx", "litert", "torch"]:
    """The format that a name means."""
    named: dict[str, Literal["tf_saved_model", "onnx", "litert", "torch"]] = {
        ".onnx": "onnx",
        ".tflite": "litert",
        ".pt2": "torch",
        "": "tf_saved_model",
    }
    if output.suffix not in named:
        raise Failed(
            f"The name {output.name!r} says no format: .onnx, .tflite and .pt2 do, and a name without an ending is the "
            "folder of a SavedModel. For another name: --format"
        )
    return named[output.suffix]


@app.command(epilog=examples("tether doctor", "tether doctor --json | jq .problems"))
def doctor(as_json: Json = False) -> None:
    """Shows what is installed, which backend is chosen, and what is missing.

    Ends with exit code 1 if something that is needed is missing.
    """
    from tether_cli.doctor import examine

    report = examine()
    if as_json:
        print_json(report.to_json())
    else:
        typer.echo(str(report))
    raise typer.Exit(1 if report.problems else 0)


@app.command(
    epilog=examples('eval "$(tether completion bash)"', "tether completion fish > tether.fish"),
)
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Prints a script that completes commands and options in a shell."""
    from tether_cli.completion import script

    typer.echo(script(app, shell), nl=False)


@app.command(epilog=examples("tether demo", "tether demo --seeds 1"))
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Average over so many seeds.")] = 3,
    output: Annotated[Literal["linear", "sigmoid"], typer.Option(help="The output's activation.")] = "linear",
) -> None:
    """Trains tied and untied autoencoders on real digits, and maps the weights of the tied one."""
    from tether_cli.models import start

    start()
    from tether.demo import main as run

    try:
        code = run(["--seeds", str(seeds), "--output", output])
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        raise Failed(error.code) from error
    raise typer.Exit(code)


# --------------------------------------------------------------------------- what commands have in common


def _source(file: Path, load_it: bool, custom: list[str] | None, *, compile: bool = False) -> tuple[Any, Any]:
    """The package, and what it is to look at: the path, or the model that the file holds."""
    from tether_cli.models import import_custom, load, require, start

    require(file)
    if custom and not load_it:
        raise Failed("--custom is for a model that is loaded: add --load, or leave it out.")
    package = start()
    return package, load(file, import_custom(custom), compile=compile) if load_it else file


def main() -> None:
    """Runs the command line. A polite kill ends it as an error does: with nothing left half written."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app(prog_name="tether")
