import pytest


@pytest.fixture
def cli(capfd, tmp_path, monkeypatch):
    """Run the command line in this process, in a folder of the test's own: exit code, stdout, stderr."""
    from meftbench.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return ended.value.code, captured.out, captured.err

    return run
