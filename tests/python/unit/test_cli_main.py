import json
import os
import subprocess
import sys

import pytest
import typer

from micro.cli import main
from micro.errors import MissingExtraError, RunError, choices, require


def micro(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "micro.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.fixture
def failing(monkeypatch):
    """A command that raises what the test wants; returns a function (error) -> exit status."""

    def run(error, *arguments):
        app = typer.Typer()
        app.callback()(lambda: None)

        @app.command("fail")
        def fail():
            raise error

        monkeypatch.setattr(main, "build_app", lambda: app)
        return main.run(["fail", *arguments])

    return run


def test_help_lists_every_command_and_loads_no_torch():
    code = (
        "import sys\n"
        "from micro.cli import main\n"
        "status = main.run(['--help'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: [] 0" in done.stdout
    for name in main.COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_bad_usage_is_one_line_and_status_2():
    for arguments in (["doctr"], ["doctor", "--nope"], ["--nope"]):
        done = micro(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert "--help" in done.stderr


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("x.json: record 3: no spans"), 2, "micro: x.json: record 3: no spans"),
        (TypeError("wrong"), 2, "micro: TypeError: wrong"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "micro: a.json: No such file or directory"),
        (MissingExtraError("needs x"), 2, "micro: needs x"),
        (RunError("stage 2\nfailed"), 1, "micro: stage 2 failed"),
        (RuntimeError("boom"), 1, "micro: RuntimeError: boom"),
        (KeyboardInterrupt(), 130, "micro: interrupted"),
        (typer.BadParameter("no such expert"), 2, "no such expert"),
    ],
)
def test_an_error_is_one_line_and_its_status(failing, capsys, error, status, line):
    assert failing(error) == status
    captured = capsys.readouterr().err
    assert line in captured
    assert len(captured.splitlines()) == 1


def test_debug_shows_the_traceback(failing, capsys):
    assert failing(RuntimeError("boom"), "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_status_of_the_command_is_kept(failing):
    assert failing(typer.Exit(1)) == 1
    assert failing(typer.Exit(0)) == 0


def test_doctor_names_versions_kernels_and_paths():
    done = micro("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["core"]["torch"].split("+")[0] == report["packages"]["torch"].split("+")[0]
    paths = {name: path["cpu"] for name, path in report["core"]["ops"].items()}
    assert paths["rms_norm"].startswith("micro kernel (")
    assert paths["stacked_linear"] == paths["expert_linear"]
    assert paths["block_forward"].startswith("micro kernel (")
    assert not any(name.endswith("_backward") for name in paths)
    assert paths["rope_frequencies"] == "torch functions"
    assert "complete" in micro("doctor").stdout


def test_doctor_says_which_instruction_set_runs_and_why():
    assert json.loads(micro("doctor", "--json", MICRO_ISA="plain").stdout)["core"]["isa"] == "plain"
    assert "MICRO_ISA=sse9 is unknown" in micro("doctor", MICRO_ISA="sse9").stdout


def test_doctor_reports_a_core_that_does_not_load(monkeypatch, capsys):
    def broken():
        raise ImportError("micro was built against torch 2.0")

    monkeypatch.setattr("micro.build_info", broken)
    assert main.run(["doctor"]) == 1
    assert "NOT LOADED: micro was built against torch 2.0" in capsys.readouterr().out


def test_a_missing_package_names_the_extra():
    with pytest.raises(MissingExtraError, match=r"plots needs the package nosuchpackage.*micro-reasoners\[viz\]"):
        require("nosuchpackage.sub", "viz", "plots")
    assert require("json", "hf", "x") is json


def test_the_nearest_name_is_suggested():
    assert choices("lgic", ["logic", "social"]) == "did you mean 'logic'?"
    assert choices("zzz", ["logic", "social"]) == "expected one of 'logic', 'social'"
