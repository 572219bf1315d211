"""The command line, `fastray`. Each command reads words, calls one function of the layers below, and prints.

torch, ray and mlflow are imported only where a command needs them, so that help and mistakes cost no waiting.
"""

import gc
import importlib.util
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from blocks.errors import UserError
from blocks.house import HOUSE

# The words beside a recipe's settings, by command.
RECORDING: dict[str, type] = {"register": str, "alias": str, "system_metrics": bool, "report": bool}
RUNNER_WORDS: dict[str, dict[str, type]] = {
    "train": {"workers": int, **RECORDING},
    "sweep": {"trials": int, "scheduler": str, "search": str, "workers": int, **RECORDING},
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastray", message="%(package)s %(version)s")
def cli() -> None:
    """Train, sweep and submit recipes on Ray; records and models go to MLflow.

    Settings of a recipe are words such as lr=1e-3 or schedule='fine_tune(4)'; `fastray recipes` lists them.
    """


@cli.command()
def recipes() -> None:
    """List the recipes and their settings."""
    from pipelines.recipes import find_recipe, recipe_names
    from training.recipe import described

    for name in recipe_names():
        click.echo(described(find_recipe(name)))


@cli.command()
@click.argument("name", metavar="RECIPE")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--debug", is_flag=True, help="Train in this process, and open the debugger where an exception is raised.")
def train(name: str, words: Sequence[str], debug: bool) -> None:
    """Train RECIPE. workers=N trains on N Ray Train workers, workers=0 in this process.

    register=NAME alias=champion registers the model in MLflow; system_metrics=true records how busy the machine is.
    report=true records what the model gets wrong: worst rows, confusion, a report a class, where it looks.
    """
    make, settings, runner = _read(name, words, RUNNER_WORDS["train"])
    recipe = make(**settings)
    from cluster import Recording, Workers, train_recipe
    from cluster.elsewhere import Elsewhere
    from cluster.runtime import start_ray_meanwhile
    from pipelines.report import report_training

    recording = Recording.taken_from(runner)
    workers = Workers(0) if debug else Workers.asked(runner.get("workers"), default=2 if name == "digits" else None)
    if workers.number:
        start_ray_meanwhile()
    try:
        with Elsewhere() as elsewhere:
            report_training(train_recipe(recipe, workers, click.echo, recording), elsewhere, say=click.echo)
    except Exception as error:
        if not debug or not _in_training(error):
            raise
        from pipelines.debug import open_debugger

        open_debugger(error)
        sys.exit(1)


@cli.command()
@click.argument("run")
def resume(run: str) -> None:
    """Go on with RUN, a training or a sweep that was broken off: its folder, or its name in the folder of the runs."""
    from cluster.places import places
    from cluster.runs import find_run, run_name

    folder, begun = find_run(run, places().storage)
    if begun.recipe is None:
        name = run_name(folder)
        raise UserError(f"{name} was begun by a script: run it again with learn.fit(..., resume={name!r})")
    swept = begun.kind == "sweep"
    make, settings, _ = _read(begun.recipe, [f"{key}={text}" for key, text in begun.words.items()], {}, spaces=swept)
    if swept:
        from cluster import Recording, resume_sweep
        from pipelines.report import report_sweep

        runner = dict(begun.runner)
        recording = Recording.taken_from(runner)
        found = resume_sweep(Path(folder), make, settings, **runner, recording=recording, say=click.echo)
        report_sweep(found, begun.recipe, say=click.echo)
        return
    recipe = make(**settings)
    from cluster import Recording, Workers, resume_recipe
    from cluster.elsewhere import Elsewhere
    from pipelines.report import report_training

    with Elsewhere() as elsewhere:
        runner = dict(begun.runner)
        recording, number = Recording.taken_from(runner), runner["workers"]
        workers = Workers.asked(tuple(number) if isinstance(number, list) else number)
        report_training(resume_recipe(Path(folder), recipe, workers, click.echo, recording), elsewhere, say=click.echo)


@cli.command()
@click.argument("name", metavar="RECIPE")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
def sweep(name: str, words: Sequence[str]) -> None:
    """Try settings of RECIPE: lr='loguniform(1e-4,1e-1)' trials=4 scheduler=asha search=optuna.

    A setting is a value or a space: choice(a, b), grid(a, b), uniform(low, high), loguniform(low, high), lr also
    around_lr_find(10). Spaces lie within spaces: choice(one_cycle(5), fine_tune(4, freeze_epochs=choice(1, 2))).

    scheduler: asha, none, median, hyperband, pbt. search: random, grid, optuna. workers=N trains each trial on N Ray Train
    workers. register=NAME alias=champion registers the best trial's model.
    """
    make, settings, runner = _read(name, words, RUNNER_WORDS["sweep"], spaces=True)
    from cluster import Recording
    from cluster import sweep as run_sweep
    from pipelines.report import report_sweep

    recording = Recording.taken_from(runner)
    report_sweep(run_sweep(make, settings, **runner, recording=recording, say=click.echo), name, say=click.echo)


@cli.command()
@click.argument("command", type=click.Choice(list(RUNNER_WORDS)))
@click.argument("name", metavar="RECIPE")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--address", required=True, help="The cluster's dashboard, such as http://127.0.0.1:8265.")
@click.option("--debug", is_flag=True, hidden=True)
def submit(command: str, name: str, words: Sequence[str], address: str, debug: bool) -> None:
    """Run `fastray COMMAND RECIPE ...` as a job of a Ray cluster; follow it and return its exit code."""
    if debug:
        raise UserError(f"a job has no terminal for a debugger: run `fastray {command} {name} ... --debug` here")
    _read(name, words, RUNNER_WORDS[command], spaces=command == "sweep")
    from cluster import submit_job

    sys.exit(submit_job([command, name, *words], address, say=click.echo))


@cli.command()
@click.argument("name", metavar="RECIPE")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--picture", default="batch.png", show_default=True, help="Where to save the picture of a batch.")
def show(name: str, words: Sequence[str], picture: str) -> None:
    """Explain the data of RECIPE stage by stage, and save a picture of a batch."""
    make, settings, _ = _read(name, words, {})
    recipe = make(**settings)
    block, source = recipe.data()
    dls = block.dataloaders(source, **recipe.data_settings)
    click.echo(dls.plan_text)
    try:
        dls.show_batch().savefig(picture)
    except OSError as error:
        raise UserError(f"the picture cannot be written: {error}") from error
    click.echo(f"picture of a batch: {Path(picture).absolute()}")


@cli.command()
@click.argument("model")
@click.argument("files", nargs=-1, required=True)
def predict(model: str, files: Sequence[str]) -> None:
    """Predict FILES with MODEL: models:/..., or the folder of an export."""
    from cluster import load_model
    from pipelines.report import report_predictions

    report_predictions(load_model(model), files, say=click.echo)


@cli.command()
@click.argument("run", required=False)
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
def ui(run: str | None, port: int) -> None:
    """Open MLflow's page on RUN, a folder or its name, by default on the last one; Ctrl-C ends it."""
    from cluster import serve_ui

    serve_ui(port, run, say=click.echo)


@cli.group()
def records() -> None:
    """See to records that are still to be sent to MLflow."""


@records.command("flush")
@click.argument("run", required=False)
def records_flush(run: str | None) -> None:
    """Send what MLflow could not take: the records of RUN, a folder or its name, or of all runs; killed ones are closed."""
    from cluster import flush_records
    from pipelines.report import report_flushed

    report_flushed(flush_records(run), say=click.echo)


@cli.group()
def cache() -> None:
    """See and clear the prepared data that are kept."""


@cache.command("ls")
def cache_ls() -> None:
    """List the prepared data: fingerprint, source, rows, size, last use, and whether a run uses them now."""
    from blocks.cache import kept_data
    from pipelines.report import report_kept

    report_kept(kept_data(), say=click.echo)


@cache.command("clear")
@click.argument("fingerprint", required=False)
@click.option("--older-than", type=click.FloatRange(0), metavar="DAYS", help="Only what was not used for so many days.")
def cache_clear(fingerprint: str | None, older_than: float | None) -> None:
    """Remove prepared data that no run uses: all of it on this machine, or FINGERPRINT alone, at a storage URL too."""
    from blocks.cache import clear
    from pipelines.report import report_cleared

    if fingerprint is not None and older_than is not None:
        raise UserError("give a FINGERPRINT or --older-than DAYS, not both")
    removed, stays = clear(fingerprint, older_than)
    report_cleared(removed, stays, say=click.echo)
    if fingerprint is not None and stays:
        raise UserError(f"{fingerprint} is in use by a running process, and stays")


def _read(
    name: str, words: Sequence[str], runner_words: dict[str, type], spaces: bool = False
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    # The recipe function, its settings and the runner's own words, from `key=value` words.
    from pipelines.recipes import find_recipe
    from training.recipe import SettingError, checked, read_setting
    from training.schedule import SCHEDULES

    make = find_recipe(name)
    names: dict[str, Any] = SCHEDULES
    kinds: tuple[type, ...] = ()
    if spaces:
        from cluster.space import KINDS, NAMES

        names, kinds = NAMES, KINDS
    settings: dict[str, Any] = {}
    runner: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise SettingError(f"{word!r} is not a setting: write key=value, such as lr=1e-3")
        if key in settings or key in runner:
            raise SettingError(f"{key!r} is set twice")
        if key in runner_words:
            runner[key] = _runner_word(key, text, runner_words[key])
            continue
        value = read_setting(make, key, text, names, also=runner_words)
        settings[key] = value if isinstance(value, kinds) else checked(make, key, value)
    return make, settings, runner


def _runner_word(key: str, text: str, kind: type) -> Any:
    from training.recipe import SettingError

    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise SettingError(f"{key}={text!r} is not true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise SettingError(f"{key}={text!r} is not a whole number") from None


def main() -> NoReturn:
    """The console command: 0 done, 1 a failure with its traceback, 2 a mistake in one line, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)  # a stopped job ends its run like Ctrl-C does
    try:
        _check_house()
        cli.main(standalone_mode=False)
        code = 0
    except click.exceptions.Exit as ended:
        code = ended.exit_code
    except click.ClickException as mistake:
        mistake.show()
        code = 2
    except UserError as mistake:
        click.echo("\n  ".join([f"fastray: {mistake}", *getattr(mistake, "__notes__", ())]), err=True)  # notes name the row
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("fastray: stopped", err=True)
        code = 130
    except Exception as error:  # noqa: BLE001  raised again where it is not told here
        code = _told(error)
    finally:
        if "ray" in sys.modules:
            from cluster.runtime import stop_ray

            for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave processes behind
                signal.signal(number, signal.SIG_IGN)
            stop_ray()
    gc.freeze()  # else Python looks through a million objects of the libraries once more before it ends
    sys.exit(code)


def _told(error: Exception) -> int:
    # A failure in this process is told by Python, with its traceback.
    if not _in_training(error) and isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
        click.echo(f"fastray: {error.filename!r} cannot be read or written: {error.strerror}", err=True)
        return 2
    if "ray" in sys.modules:
        from cluster.failures import happened_elsewhere

        if happened_elsewhere(error):
            click.echo("".join(traceback.format_exception_only(error)).rstrip(), err=True)
            return 1
    raise error


def _in_training(error: Exception) -> bool:
    if "training.failure" not in sys.modules:
        return False
    from training.failure import failure_of

    return failure_of(error) is not None


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _check_house() -> None:
    # Flat package names can be shadowed by a folder of the user's that has the same name.
    home = Path(__file__).resolve().parent.parent
    for package in HOUSE:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != home:
            found = spec and (spec.origin or list(spec.submodule_search_locations or ()))
            raise UserError(
                f"the package {package!r} of fastray is hidden by {found}: rename that folder, or start from another one"
            )


if __name__ == "__main__":
    main()
