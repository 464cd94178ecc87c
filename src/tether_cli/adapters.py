"""The commands `tether adapters ...`: what adapters a file has, one made of several, and folders of PEFT's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tether_cli.console import Custom, Failed, Force, Json, Model, busy, examples, print_json

group = typer.Typer(
    name="adapters",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Lists, combines and converts adapters.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@group.command(
    "list",
    epilog=examples("tether adapters list adapted.keras", "tether adapters list french.safetensors --json"),
)
def list_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .keras file, or the .safetensors of an adapter.")],
    width: Annotated[int | None, typer.Option(help="Columns; left out, those of the terminal.")] = None,
    custom: Custom = None,
    as_json: Json = False,
) -> None:
    """Shows each adapter's strength, ranks, size, and how many weights it changes.

    A model is loaded in Keras's safe mode, to read the strengths. The file of
    one adapter needs no model.
    """
    from tether_cli.models import import_custom, load, require, start

    require(file)
    package = start()
    if file.suffix == ".safetensors":
        found = package.adapters.file.file_facts(file)
    else:
        found = package.inspection.facts(load(file, import_custom(custom), compile=False))
    if as_json:
        print_json({"version": 1, "adapters": [asdict(adapter) for adapter in found.adapters]})
    else:
        package.summary(found, adapters=True, width=width)


@group.command(
    epilog=examples(
        "tether adapters combine adapted.keras --weights french=0.7,german=-0.3 --into both -o both.keras",
        "tether adapters combine adapted.keras --weights french=1,german=1 --into small --rank 1 -o small.keras",
    )
)
def combine(
    model: Model,
    weights: Annotated[str, typer.Option(metavar="NAME=NUMBER,...", help="How much of each adapter.")],
    into: Annotated[str, typer.Option(help="What the new adapter is called.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .keras file to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the sum to this rank; left out, it is exact.")] = None,
    method: Annotated[
        Literal["linear", "cat", "svd", "ties", "dare"], typer.Option(help="How they are combined.")
    ] = "linear",
    density: Annotated[float, typer.Option(help="The share of entries that ties and dare keep.")] = 0.5,
    seed: Annotated[int | None, typer.Option(help="Of what dare drops.")] = None,
    force: Force = False,
    custom: Custom = None,
) -> None:
    """Writes the model with one adapter more, made of several of its own.

    The others stay in the file as they are. The command says how much a cut
    to a rank has lost.
    """
    from tether_cli.models import import_custom, load, require, save, start, target

    require(model)
    if output.suffix != ".keras":
        raise Failed(f"A model is saved in a file that ends in '.keras', not {output.name!r}.")
    given = _numbers(weights)
    final = target(output, inputs=(model,), force=force)
    package = start()
    loaded = load(model, import_custom(custom), compile=False)
    with busy("Combining"):
        lost = package.adapters.combine(loaded, given, into=into, rank=rank, method=method, density=density, seed=seed)
    with busy(f"Writing {output.name}"):
        save(loaded, final)
    cut = "nothing is lost" if not any(lost.values()) else f"at most {max(lost.values()):.1%} of a weight's sum is lost"
    typer.echo(f"Wrote {output}: {into} changes {len(lost)} weight{'s' * (len(lost) != 1)}, {cut}")


@group.command(
    epilog=examples(
        "tether adapters convert french.safetensors -o french-peft --model base.keras",
        "tether adapters convert french-peft -o copy.safetensors --model base.keras",
    )
)
def convert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A .safetensors file, or a folder of PEFT's.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The other: a folder, or a .safetensors file.")],
    model: Annotated[Path, typer.Option("--model", metavar="MODEL", help="The .keras file of the base.")],
    names: Annotated[
        str | None, typer.Option(help="What the base's weights are called in PEFT's world, such as bert.")
    ] = None,
    force: Force = False,
    custom: Custom = None,
) -> None:
    """Makes a folder of PEFT's of the file of an adapter, or the other way round.

    The base says which weight a module is and how it is laid out. Its file
    stays as it is.
    """
    from tether_cli.models import import_custom, load, require, start, target

    to_file = output.suffix == ".safetensors"
    if adapter.is_dir() != to_file:
        raise Failed(
            "An adapter's .safetensors file becomes a folder, and a folder of PEFT's a .safetensors file, not "
            f"{adapter.name} {output.name}."
        )
    require(model, *([] if adapter.is_dir() else [adapter]))
    final = target(output, inputs=(model, adapter), force=force, folder=not to_file)
    package = start()
    loaded = load(model, import_custom(custom), compile=False)
    before = package.adapters.names(loaded)
    with busy(f"Reading {adapter.name}"):
        package.adapters.load(loaded, adapter, names=names)
    (name,) = set(package.adapters.names(loaded)) - set(before)
    with busy(f"Writing {output.name}"):
        if to_file:
            package.adapters.save(loaded, name, final)
        else:
            package.files.save_peft(loaded, final, names=names, adapter=name)
    (found,) = (each for each in package.inspection.facts(loaded).adapters if each.name == name)
    typer.echo(f"Wrote {output}: {name} changes {len(found.changes)} weight{'s' * (len(found.changes) != 1)}")


def _numbers(text: str) -> dict[str, float]:
    """What `--weights` says."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, mark, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            mark, value = "", 0.0
        if not mark or not name.strip() or name.strip() in found:
            raise Failed(f"--weights {text}: expected a number for each adapter, once, as in french=0.7,german=-0.3.")
        found[name.strip()] = value
    return found
