def list_() -> None:
    raise SystemExit("not written yet")
