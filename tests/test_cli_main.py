"""The command line's frame: commands, flags in Caffe's spellings, hints, exit statuses, no tracebacks, a quick start."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import caffelite
import caffelite.__main__ as entry
from caffelite.__main__ import main
from caffelite.cli import COMMANDS, load_command
from caffelite.cli.common import Parser, comma_list, megabytes, normalise, one_of, table, whole_number
from caffelite.errors import DataError, SpecError, Where, nearest

FLAGS = {
    "train": "--solver --weights --snapshot --gpu --iterations --level --stage --backend --precision --threads --log --metrics --sigint-effect --sighup-effect",
    "test": "--model --weights --iterations --gpu --level --stage --backend --precision --threads --json",
    "time": "--model --solver --iterations --phase --level --stage --gpu --backend --precision --threads --json",
    "summary": "--phase --level --stage --precision --json",
    "check": "--level --stage",
    "convert": "--resize --gray --shuffle --seed --encoded --encode-type --threads --allow-bad --force",
    "mean": "--json",
    "preview": "--images --draws --seed --level --stage",
    "dataset": "--classes --train --val --seed",
    "plot": "--out --title",
    "device-query": "--json --gpu",
}


def fake_command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Puts `run` in the place of every command."""
    parser = Parser("caffelite fake", "", "fake")
    parser.add_argument("--solver")
    monkeypatch.setattr(entry, "load_command", lambda name: SimpleNamespace(build_parser=lambda prog: parser, run=run))


def raising(error: BaseException) -> object:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["-solver", "a.prototxt"], ["--solver", "a.prototxt"]),
        (["-solver=a-b_c.prototxt"], ["--solver=a-b_c.prototxt"]),
        (["--sigint_effect=none"], ["--sigint-effect=none"]),
        (["-v", "-1", "-", "--", "a_b", "-0.5"], ["-v", "-1", "-", "--", "a_b", "-0.5"]),
    ],
)
def test_caffes_spellings(given: list[str], meant: list[str]) -> None:
    assert normalise(given) == meant


def test_every_command_explains_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(FLAGS) == set(COMMANDS)
    for name, flags in FLAGS.items():
        assert entry.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: caffelite {name}")
        assert f"example:\n  caffelite {name}" in text
        missing = [flag for flag in flags.split() if flag not in text]
        assert not missing, (name, missing)


def test_every_flag_has_a_help_text() -> None:
    for name in COMMANDS:
        actions = load_command(name).build_parser(name)._actions
        assert [a.dest for a in actions if not a.help] == []


def test_usage_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert entry.main([]) == 2
    assert "usage: caffelite COMMAND" in capsys.readouterr().err


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["help", "device_query"]) == 0
    assert capsys.readouterr().out.startswith("usage: caffelite device-query")
    assert entry.main(["help", "trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"caffelite {caffelite.__version__}\n"


def test_flags_may_stand_before_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fake_command(monkeypatch, lambda args: seen.append(args.solver) or 0)
    assert entry.main(["-solver", "a.prototxt", "train"]) == 0
    assert entry.main(["--solver=b.prototxt", "device_query"]) == 0
    assert seen == ["a.prototxt", "b.prototxt"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'\n  did you mean 'train'?"),
        (["xyzzy"], "unknown command 'xyzzy'\n  commands: train, test"),
        (["tset", "--model", "test"], "unknown command 'tset'\n  did you mean 'test'?"),
        (["train", "-slover", "a"], "unknown flag --slover\n  did you mean --solver?"),
        (["train", "--solver", "a", "again"], "unexpected word 'again'\n  see caffelite train --help"),
        (["train", "--solver", "a", "--precision", "bfloat61"], "'bfloat61' is not one of float32, tf32, bfloat16; did you mean bfloat16?"),
        (["train", "--solver", "a", "--sigint_effect", "halt"], "'halt' is not one of stop, snapshot, none"),
        (["train", "--solver", "a", "--threads", "0"], "--threads: '0' is not a whole number of at least 1"),
        (["train"], "the following arguments are required: --solver\n  see caffelite train --help"),
    ],
)
def test_a_bad_command_line_says_what_would_be_right(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err[: len("caffelite: error: ")]) == ("", "caffelite: error: ")
    assert message in err
    assert err.count("\n") <= 3


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (
            SpecError("bad", where=Where("a.prototxt", 3, 4), layer="conv1", hint="fix it"),
            2,
            "caffelite: error: a.prototxt:3:4: layer 'conv1': bad\n  fix it\n",
        ),
        (DataError("gone"), 1, "caffelite: error: gone\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "caffelite: error: x.txt: No such file or directory\n"),
        (MemoryError(), 1, "caffelite: error: not enough memory\n"),
        (KeyboardInterrupt(), 130, "caffelite: interrupted\n"),
    ],
)
def test_errors_in_plain_words(error: BaseException, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_command(monkeypatch, raising(error))
    assert entry.main(["train"]) == status
    assert capsys.readouterr().err.startswith(text)


def test_a_fault_of_ours_keeps_its_traceback_in_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fake_command(monkeypatch, raising(ZeroDivisionError("oops")))
    assert entry.main(["train"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("caffelite: internal error: ZeroDivisionError: oops\n")
    assert "Traceback" not in err
    file = err.split("details are in ")[1].strip()
    with open(file, encoding="utf-8") as kept:
        assert "Traceback" in kept.read()
    monkeypatch.setenv("CAFFELITE_DEBUG", "1")
    assert entry.main(["train"]) == 1
    assert "Traceback" in capsys.readouterr().err


def run_cli(*argv: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300, **kwargs)  # type: ignore[call-overload, no-any-return]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from caffelite.__main__ import main; main(['--help']); print(sorted({'numpy', 'google.protobuf', 'lmdb', 'PIL'} & set(sys.modules)))"
    done = run_cli("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_exit_status_of_a_process(tmp_path: object) -> None:
    done = run_cli("-m", "caffelite", "train", "--solver", f"{tmp_path}/none.prototxt")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("caffelite: error: ")
    assert "none.prototxt" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "caffelite", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_small_helpers() -> None:
    assert nearest("Trian", ["train", "test"]) == "train"
    assert nearest("zzz", ["train"]) is None
    assert comma_list("a, b,,c") == ["a", "b", "c"]
    assert one_of("a", "b")("b") == "b"
    assert whole_number(0)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="'x' is not a whole number of at least 1"):
        whole_number(1)("x")
    assert table([("name", "n"), ("a", "1"), ("longer", "12")]) == ["name     n", "------  --", "a        1", "longer  12"]


def test_a_required_flag_that_was_left_out_before_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, hint in (
        (["train", "my.prototxt"], "did you mean --solver my.prototxt?"),
        (["test", "my.prototxt", "--json"], "did you mean --model my.prototxt?"),
        (["train", "--log", "x"], "see caffelite train --help"),
        (["train"], "see caffelite train --help"),
    ):
        assert main(argv) == 2
        assert capsys.readouterr().err.splitlines()[-1].strip() == hint


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 MB"), (4, "4 bytes"), (102, "102 bytes"), (103, "0.1 KB"), (104_857, "102.4 KB"), (104_858, "0.1 MB"), (3 * 2**30, "3,072.0 MB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert megabytes(count) == text
