"""Files that a stranger or a bad disk may have made, for the tests of every reader."""

import io
import json
import stat
import zipfile

import h5py
import keras
import numpy as np

import tether

layers = keras.layers


def tied_model(named="codec"):
    codec = tether.Weight(name=named)
    inputs = keras.Input((4,))
    hidden = tether.tie(layers.Dense(3, name="encode"), kernel=codec)(inputs)
    return keras.Model(inputs, tether.tie(layers.Dense(4, name="decode"), kernel=codec.T)(hidden))


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, held, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in held.items():
            archive.writestr(name, data)


def with_config(change):
    """Changes the config; `change` may return another one."""

    def damage(path):
        held = entries(path)
        config = json.loads(held["config.json"])
        config = change(config) or config
        write(path, {**held, "config.json": json.dumps(config)})

    return damage


def with_values(change):
    """Changes the values."""

    def damage(path):
        held = entries(path)
        buffer = io.BytesIO(held["model.weights.h5"])
        with h5py.File(buffer, "r+") as values:
            change(values)
        write(path, {**held, "model.weights.h5": buffer.getvalue()})

    return damage


def layer(config, name):
    return next(entry for entry in config["config"]["layers"] if entry["name"] == name)


def record(config, name="decode"):
    return layer(config, name)["config"]["tether"]


def with_record(change):
    """Changes the record of the ties of one layer."""
    return with_config(lambda config: change(record(config)))


def first_dataset(values):
    found = []
    values.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return found[0]


def replace_first(values, data, **options):
    name = first_dataset(values)
    shape = values[name].shape
    del values[name]
    values.create_dataset(name, **(options or {"data": data(shape)}))


# --------------------------------------------------------------------------- damage


def truncated(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def flipped(path, at=0.7):
    """One bit of the values."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 8
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not an archive")


def without(name):
    return lambda path: write(path, {key: data for key, data in entries(path).items() if key != name})


def with_entry(name, data=b"data"):
    return lambda path: write(path, {**entries(path), name: data})


def with_link(path):
    info = zipfile.ZipInfo("assets/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")


def with_two_of_one_name(path):
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("config.json", "{}")


DAMAGED = {
    "truncated": truncated,
    "cut in the directory": lambda path: truncated(path, 0.99),
    "one bit": flipped,
    "empty": empty,
    "text": text,
    "no config": without("config.json"),
    "no values": without("model.weights.h5"),
    "config of nonsense": with_entry("config.json", b"\xff{"),
    "config of a list": with_entry("config.json", b"[]"),
    "config nested deep": with_entry("config.json", b"[" * 100_000),
    "values of nonsense": with_entry("model.weights.h5", b"\x89HDF\r\n\x1a\n" + b"\x00" * 100),
    "another shape": with_values(lambda values: replace_first(values, lambda shape: np.ones((2, *shape), "float32"))),
    "text as values": with_values(lambda values: replace_first(values, lambda shape: "text")),
    "a missing weight": with_values(lambda values: values.__delitem__(first_dataset(values))),
    "an extra weight": with_values(lambda values: values.create_dataset("layers/more/vars/0", data=np.ones(3))),
}

OUTSIDE = {
    "above": with_entry("../outside"),
    "absolute": with_entry("/tmp/outside-of-everything"),
    "with backslashes": with_entry("assets\\..\\..\\outside"),
    "of a drive": with_entry("c:/outside"),
    "link": with_link,
    "twice": with_two_of_one_name,
}


def steps(*given):
    return with_record(lambda found: found["ties"].update(kernel=list(given)))


def weights_of(found):
    return next(iter(found["weights"]))


PLANS = {
    "no path": with_record(lambda found: found["ties"].update({"nowhere": found["ties"]["kernel"]})),
    "another shape": with_config(
        lambda config: record(config, "encode")["weights"][weights_of(record(config))].update(shape=[9, 9])
    ),
    "two configs of one weight": with_config(
        lambda config: record(config, "encode")["weights"][weights_of(record(config))].update(trainable=False)
    ),
    "huge": with_record(lambda found: found["weights"][weights_of(found)].update(shape=[2**40, 2**40])),
    "negative": with_record(lambda found: found["weights"][weights_of(found)].update(shape=[-1, 3])),
    "another uid": with_record(lambda found: found["weights"][weights_of(found)].update(uid="other")),
    "another version": with_record(lambda found: found.update(version=99)),
    "no weights": with_record(lambda found: found["weights"].clear()),
    "another key": with_record(lambda found: found.update(more=1)),
    "cyclic": steps({"op": "transpose", "of": [0], "axes": None}),
    "cyclic further on": steps({"number": 1.0}, {"op": "add", "of": [0, 2]}, {"op": "negative", "of": [1]}),
    "empty": steps(),
    "too long": steps(*({"number": 1.0} for _ in range(20_000))),
    "no such operator": steps({"number": 1.0}, {"op": "__import__", "of": [0]}),
    "an array of objects": steps({"array": {"dtype": "object", "shape": [1], "data": "AAAA"}}),
    "an array that is larger": steps({"array": {"dtype": "float32", "shape": [2**30], "data": "AAAA"}}),
}


def bad_class(module, name):
    return with_record(lambda found: found["base"].update(module=module, class_name=name, registered_name=name))


def runs(marker):
    """Files that name code, which would make the marker if it ran."""
    shell = f"touch {marker}"
    code = {"class_name": "function", "config": "system", "module": "os", "registered_name": "system"}
    return {
        "a class of os": bad_class("os", "system"),
        "a class of subprocess": bad_class("subprocess", "Popen"),
        "no layer": bad_class("keras.optimizers", "Adam"),
        "an activation": with_config(lambda config: layer(config, "encode")["config"].update(activation=code)),
        "an initializer": with_record(
            lambda found: found["weights"][weights_of(found)].update(
                initializer={
                    "module": "os",
                    "class_name": "system",
                    "config": {"command": shell},
                    "registered_name": None,
                }
            )
        ),
        "a layer": with_config(
            lambda config: layer(config, "encode").update(
                module="subprocess",
                class_name="Popen",
                registered_name="Popen",
                config={"args": ["touch", str(marker)]},
            )
        ),
        "a lambda": with_config(
            lambda config: layer(config, "encode")["config"].update(
                activation={"class_name": "__lambda__", "config": {"value": ["4wAA", None, None]}}
            )
        ),
        "a function of an expression": steps({"number": 1.0}, {"op": "apply", "of": [0], "function": "os>system"}),
    }


# --------------------------------------------------------------------------- values that are no tree


def loop(values):
    """A group in itself."""
    values["layers/dense/vars/loop"] = values["layers/dense/vars"]


def loop_to_the_top(values):
    values["layers/dense/again"] = values["/"]


def one_group_twice(values):
    values["layers/dense_2"] = values["layers/dense"]


def trillions_of_paths(values):
    """Two names lead from each of forty groups to the next."""
    group = values.create_group("layers/dag")
    for _ in range(40):
        below = group.create_group("a")
        group["b"] = below
        group = below


def deep(values):
    group = values["layers"].id
    for _ in range(20_000):
        group = h5py.h5g.create(group, b"a")


def long_names(values):
    group = values["layers"]
    for _ in range(20):
        group = group.create_group("n" * 60_000)


def many_groups(values):
    group = values.create_group("layers/many").id
    for number in range(120_000):
        h5py.h5g.create(group, str(number).encode())


def linked(link):
    """A value that is another name for something."""
    return lambda values: values.__setitem__("layers/dense/vars/9", link)


NO_TREES = {
    "loop": loop,
    "loop to the top": loop_to_the_top,
    "one group twice": one_group_twice,
    "trillions of paths": trillions_of_paths,
    "deep": deep,
    "long names": long_names,
    "many groups": many_groups,
    "a soft link": linked(h5py.SoftLink("/layers/dense/vars/0")),
    "a soft link to a group": linked(h5py.SoftLink("/layers")),
    "an external link": linked(h5py.ExternalLink("secret.h5", "vars/0")),
    "a link to nowhere": linked(h5py.SoftLink("/nowhere")),
    "a type": lambda values: values.__setitem__("layers/dense/vars/9", np.dtype("float32")),
}


# --------------------------------------------------------------------------- what unpacks to too much

ZEROS = b"\x00" * 2**20


def _packed(path, name, megabytes):
    held = entries(path)
    held.pop(name)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(name, "w") as entry:
            for _ in range(megabytes):
                entry.write(ZEROS)
        for other, data in held.items():
            archive.writestr(other, data)


BOMBS = {
    "config": lambda path: _packed(path, "config.json", 80),
    "values": lambda path: _packed(path, "model.weights.h5", 400),
    "one dataset": with_values(
        lambda values: replace_first(values, None, shape=(2**34,), dtype="float32", chunks=(2**20,), compression="gzip")
    ),
    "many datasets": with_values(
        lambda values: [
            values.create_dataset(f"layers/x{n}/vars/0", shape=(2**26,), dtype="float32", chunks=(2**20,))
            for n in range(40)
        ]
    ),
}
