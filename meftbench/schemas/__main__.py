"""`python -m meftbench.schemas`: write the files of the published formats anew, from their types."""

from meftbench.schemas import FOLDER, FORMATS, made, text_of

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in FORMATS:
        (FOLDER / f"{name}.schema.json").write_text(text_of(made(name)), encoding="utf-8")
