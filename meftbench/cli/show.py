def show() -> None:
    raise SystemExit("not written yet")
