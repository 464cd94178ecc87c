"""Feeds the archive reader bytes that a search by coverage chooses. `python -m tests.files.guided FOLDER SECONDS`."""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tether.files.keras.archive", "zipfile"]):
    import tether
    from tether.files.keras.archive import contents

from tests.files import hostile


def main(folder, seconds):
    corpus, path = Path(folder) / "corpus", Path(folder) / "model.keras"
    corpus.mkdir()
    tether.files.save_model(hostile.tied_model(), corpus / "good.keras")
    for name, damage in hostile.OUTSIDE.items():
        (corpus / f"{name}.keras").write_bytes((corpus / "good.keras").read_bytes())
        damage(corpus / f"{name}.keras")

    def read(data):
        path.write_bytes(data)
        try:
            contents(path, whole=True)
        except tether.TetherError:
            return

    # No limit on the peak of the process's memory, which starts at that of the process that started it.
    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=0", "-malloc_limit_mb=1024"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
