"""The command line: help without waiting for heavy imports, and every mistake answered by one line and exit code 2."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blocks import DataBlock, prepare
from pipelines import cli


def run(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `fastray WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["fastray", *words])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def broken_photos(few_digits: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(few_digits, folder)
    (folder / "2" / "torn.png").write_bytes((folder / "2" / next((folder / "2").iterdir()).name).read_bytes()[:40])
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "digit"], "there is no recipe 'digit': did you mean 'digits'?"),
        (["train", "digits", "schedul=1"], "digits has no setting 'schedul': did you mean 'schedule'?"),
        (["train", "digits", "worker=1"], "digits has no setting 'worker': did you mean 'workers'?"),
        (["train", "digits", "lr=fast"], "lr='fast' is not a value for this setting of digits: Input should be a valid number"),
        (["train", "digits", "lr=-1"], "lr=-1 is not a value for this setting of digits: Input should be greater than 0"),
        (["train", "digits", "lr"], "'lr' is not a setting: write key=value"),
        (["train", "digits", "lr=1", "lr=2"], "'lr' is set twice"),
        (["train", "digits", "workers=two"], "workers='two' is not a whole number"),
        (["train", "digits", "workers=-1"], "workers=-1: give 0"),
        (["train", "digits", "schedule=one_cycl(5)"], "'one_cycl' is not known here; known: "),
        (["train", "digits", "schedule=one_cycle(0)"], "a phase has at least one epoch"),
        (["train", "digits", "schedule=5"], "schedule=5 is not a value for this setting of digits"),
        (["train", "digits", "size=0"], "Resize takes a side or (height, width)"),
        (["train", "digits", "workers=0", "arch=resnet19"], "torchvision has no classifier 'resnet19': did you mean "),
        (["train", "digits", "workers=0", "batch_size=1"], "Input should be greater than or equal to 2"),
        (["train", "folder"], "folder needs path=..."),
        (["train", "folder", "workers=0", "path=/nowhere"], "there is no folder '/nowhere'"),
        (["train", "nothing_here:pets"], "there is no module 'nothing_here'"),
        (["sweep", "digits", "scheduler=hyper"], "there is no scheduler 'hyper'"),
        (["sweep", "digits", "lr=loguniform(0, 1)"], "loguniform takes 0 < low < high"),
        (["sweep", "digits", "lr=choice(fast, 1)"], "lr='choice(fast, 1)' is not a value"),
        (["submit", "train", "digits", "lr=x", "--address", "http://127.0.0.1:9"], "lr='x' is not a value"),
        (["submit", "train", "digits", "--address", "http://127.0.0.1:9"], "does not take the job"),
        (["submit", "train", "digits", "--debug", "--address", "http://127.0.0.1:9"], "a job has no terminal for a debugger"),
        (["train", "digits", "alias=champion"], "say register=NAME as well"),
        (["train", "digits", "workers=0", "register=a/b"], "register=a/b alias=: "),
        (["train", "digits", "system_metrics=yes"], "system_metrics='yes' is not true or false"),
        (["records", "flush", "nothing"], "no records are kept in "),
        (["ui", "nothing"], "no records are kept in "),
        (["cache", "clear", "abc"], "no prepared data 'abc' is kept"),
        (["cache", "clear", "abc", "--older-than", "1"], "not both"),
        (["predict", "nowhere", "a.png"], "'nowhere' is not an exported model"),
        (["predict", "models:/m-0", "a.png"], "there is no model 'models:/m-0'"),
        (["show", "digits", "--picture", "no/such/folder/b.png"], "the picture cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("fastray: ")
    assert said in errors
    assert len(errors.splitlines()) == 1


def test_a_folder_without_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run("train", "folder", "workers=0", f"path={tmp_path / 'empty'}", monkeypatch=monkeypatch) == 2
    assert "no items in" in capsys.readouterr().err


def test_an_unreadable_image_is_named(
    broken_photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "folder", "workers=0", f"path={broken_photos}", monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err
    assert "1 rows cannot be read, 0 are allowed" in errors
    assert "2/torn.png" in errors
    assert "max_bad_rows=1" in errors


def test_a_class_only_in_the_validation_part(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from blocks import RandomSplitter

    folder = tmp_path / "rare"
    shutil.copytree(few_digits, folder)
    valid = [f"rare/{i}.png" for i in range(200) if RandomSplitter(0.2, seed=42)([f"rare/{i}.png"])[1]][:2]
    (folder / "rare").mkdir()
    for name in valid:
        shutil.copy(folder / "0" / "0000.png", folder / name)
    assert run("train", "folder", "workers=0", f"path={folder}", monkeypatch=monkeypatch) == 2
    assert "'rare': only in the validation part (2 rows)" in capsys.readouterr().err


def test_a_store_that_cannot_be_written(
    few_digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    assert run("train", "folder", "workers=0", "size=16", f"path={few_digits}", monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err
    assert "MLflow's store sqlite:////proc/nowhere/mlflow.db cannot be written" in errors
    assert len(errors.splitlines()) == 1


def test_a_place_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTRAY_CACHE", "/proc/nowhere")
    assert run("show", "digits", monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err
    assert "'/proc/nowhere" in errors
    assert "cannot be read or written" in errors
    assert len(errors.splitlines()) == 1


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert run("ui", "--port", port, monkeypatch=monkeypatch) == 2
    assert f"port {port} is in use" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pipelines.cli import cli\n"
        "try: cli(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "sweep" in done.stdout


def test_a_folder_of_the_users_that_hides_ours_is_said(own_places: Path) -> None:
    (own_places / "training").mkdir()
    (own_places / "training" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "recipes"], capture_output=True, text=True, check=False, cwd=own_places
    )
    assert done.returncode == 2
    assert "the package 'training' of fastray is hidden by" in done.stderr
    assert str(own_places / "training") in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_recipes_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", monkeypatch=monkeypatch) == 0
    listed = capsys.readouterr().out
    assert "digits\n" in listed
    assert "schedule=one_cycle(5)" in listed


def test_show_explains_and_draws(own_places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "digits", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "1797 files" in shown
    assert "Categorize on the training part, pass 1 = 10 values" in shown
    assert (own_places / "batch.png").stat().st_size > 10_000


def test_a_recipe_of_the_users_own(
    own_places: Path, few_digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_places / "my_recipes.py").write_text(
        "from pipelines import folder\nfrom training import recipe, Recipe\n"
        "@recipe\ndef threes(*, size: int = 16) -> Recipe:\n"
        f"    'Three classes.'\n    return folder(path={str(few_digits)!r}, size=size)\n"
    )
    monkeypatch.syspath_prepend(str(own_places))
    assert run("show", "my_recipes:threes", monkeypatch=monkeypatch) == 0
    assert "120 files" in capsys.readouterr().out
    assert run("show", "my_recipes:fours", monkeypatch=monkeypatch) == 2
    assert "my_recipes has no recipe 'fours'" in capsys.readouterr().err


def test_cache(
    digits_block: DataBlock, few_digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is kept is listed; what is in use stays, and then goes."""
    prepared = prepare(digits_block.plan(few_digits))
    name = prepared.fingerprint
    assert run("cache", "ls", monkeypatch=monkeypatch) == 0
    head, row, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["fingerprint", "rows", "size", "last", "used", "in", "use", "source", "kept", "in"]
    assert re.fullmatch(rf"{name}   120  0\.1 MB  20\d\d-\d\d-\d\d \d\d:\d\d  yes     {few_digits} +/.*/{name}", row)
    assert total == "1 prepared data sets, 0.1 MB"
    assert run("cache", "clear", name, monkeypatch=monkeypatch) == 2
    assert f"{name} is in use by a running process, and stays" in capsys.readouterr().err
    del prepared
    assert run("cache", "clear", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 prepared data sets removed, 0.1 MB"
    assert run("cache", "ls", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == "no prepared data are kept\n"


def test_debug(failing_recipe: str) -> None:
    """The debugger opens at the person's own line, with `learn` and `batch`, though workers were asked for."""
    looks = [
        "p mine[1]",
        "p learn.iter, learn.epoch",
        "p len(batch), len(batch.ids)",
        "up",
        "up",
        "p batch is learn.batch",
        "q",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "train", "mine:failing", "workers=2", "--debug"],
        input="\n".join([*looks, "q", ""]),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 epoch in this process" in done.stdout
    file, _, line = failing_recipe.rpartition(":")
    assert f"> {file}({line})after_pred()" in done.stdout.partition("(Pdb) ")[0]
    answers = [part.splitlines()[0] for part in done.stdout.split("(Pdb) ")[1:] if part.strip()]
    assert answers[:3] == ["3", "(2, 0)", "(2, 16)"]
    assert answers[5] == "True"
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "ValueError: no such shape: (16, 3)" in done.stderr
    assert "in FailsOnce.after_pred, epoch 0, batch 2, rows " in done.stderr


def test_a_file_that_the_persons_code_misses_is_a_failure_of_that_code(
    failing_recipe: str, own_places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = own_places / "mine.py"
    file.write_text(file.read_text().replace("raise ValueError(", "open('/nowhere/' + "))
    monkeypatch.syspath_prepend(str(own_places))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "argv", ["fastray", "train", "mine:failing", "workers=0"])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="/nowhere/no such shape") as raised:
        cli.main()
    assert raised.value.__notes__[0].startswith("in FailsOnce.after_pred, epoch 0, batch 2, rows ")
    sys.modules.pop("mine")


def test_an_exception_of_the_persons_is_a_failure_with_its_traceback(failing_recipe: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "train", "mine:failing", "workers=0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 1
    file, _, line = failing_recipe.rpartition(":")
    assert f'File "{file}", line {line}, in after_pred' in done.stderr
    where = rf"^in FailsOnce\.after_pred, epoch 0, batch 2, rows .*; {failing_recipe} in after_pred$"
    assert re.search(where, done.stderr, flags=re.M)
