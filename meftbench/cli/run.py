def run() -> None:
    raise SystemExit("not written yet")
