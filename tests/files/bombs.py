"""Opens files that would unpack to too much, with little memory to be had. `python -m tests.files.bombs FOLDER`."""

import json
import resource
import shutil
import sys
from pathlib import Path

import tether
from tests.files import hostile

LIMIT = 2**30


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(folder):
    good = Path(folder) / "good.keras"
    tether.files.save_model(hostile.tied_model(), good)
    readers = {"load_model": tether.files.load_model, "facts": tether.inspection.facts}
    for read in readers.values():
        read(good)  # so that everything is imported
    files = {}
    for name, damage in hostile.BOMBS.items():
        files[name] = Path(folder) / f"{name.replace(' ', '_')}.keras"
        shutil.copy(good, files[name])
        damage(files[name])
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + LIMIT, resource.RLIM_INFINITY))
    found = {}
    for reader, read in readers.items():
        for name, path in files.items():
            before = peak()
            try:
                read(path)
                error = "none"
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
            found[f"{reader} of {name}"] = {"error": error, "grown": peak() - before}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
