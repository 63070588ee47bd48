def compare() -> None:
    raise SystemExit("not written yet")
