"""The shell commands of the README, the documentation and the recipes: each parses, and what it names exists."""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib
from anomalib.cli.cli import AnomalibCLI
from torch.distributed import run

from anomalib_csflow import cli
from anomalib_csflow.features import weights
from anomalib_csflow.runtime import __main__ as runtime

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("speed/*.md")])
STUB = """#!{python}
import json, sys
with open({log!r}, "a") as file:
    print(json.dumps([{name!r}, *sys.argv[1:]]), file=file)
if sys.argv[1:2] == ["recipe"]:
    from anomalib_csflow import cli
    cli.main(sys.argv[1:])
"""


OWN = {"bundle", "calibrate", "fit-all", "install-weights", "recipe", "validate", "watch"}


def blocks() -> dict[str, str]:
    """Each shell block of a page, and the commands that a recipe's comments give."""
    found = {}
    for page in PAGES:
        for number, block in enumerate(re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)):
            found[f"{page.relative_to(ROOT)} {number}"] = block
    for path in sorted(ROOT.glob("configs/*.yaml")):
        lines = re.findall(r"^#   ((?:anomalib(?:-csflow)?|pip|python) .*)$", path.read_text(), re.MULTILINE)
        found[f"configs/{path.name}"] = "\n".join(lines)
    return found


BLOCKS = blocks()


@pytest.fixture(scope="module")
def parse() -> Callable[[list[str]], object]:
    """The parser of anomalib's command line, which takes seconds to make, without what it does afterwards."""
    command_line = object.__new__(AnomalibCLI)
    command_line.parser = command_line.init_parser(exit_on_error=False)
    command_line.subcommand_parsers = {}
    command_line.subcommand_method_arguments = {}
    command_line.add_subcommands()
    return command_line.parser.parse_args


@pytest.mark.parametrize("name", BLOCKS)
def test_commands(name: str, parse: Callable[[list[str]], object], tmp_path: Path) -> None:
    commands = typed(BLOCKS[name], tmp_path)
    assert commands
    for started, *given in commands:
        program, *arguments = launched(started, given)
        if program in {"anomalib", "anomalib-csflow"} and arguments[0] not in OWN:
            if program == "anomalib-csflow" and "--ckpt_path" in arguments and "--model" not in arguments:
                arguments[:1] = [arguments[0], "--model", "anomalib_csflow.CSFlow"]  # the checkpoint's
            parse([ROOT.joinpath(x).as_posix() if x.startswith("configs/") else x for x in arguments])
        else:
            CHECKS[program](arguments)


def typed(block: str, folder: Path) -> list[list[str]]:
    """What a shell would run: programs and arguments, after the shell has replaced variables and the like."""
    log = folder / "commands"
    for name in CHECKS:
        stub = folder / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB.format(python=sys.executable, log=str(log), name=name))
        stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    shell = shutil.which("bash") or "bash"
    subprocess.run([shell, "-euo", "pipefail", "-c", block], cwd=folder, env=environment, check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def launched(program: str, arguments: list[str]) -> list[str]:
    """The command that torchrun or srun starts, or the command itself."""
    if program == "torchrun":
        read = run.get_args_parser().parse_args(arguments)
        assert read.no_python
        return [read.training_script, *read.training_script_args]
    return arguments[arguments.index("anomalib-csflow") :] if program == "srun" else [program, *arguments]


def check_make(arguments: list[str]) -> None:
    subprocess.run(
        [shutil.which("make") or "make", "--dry-run", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )


def check_pip(arguments: list[str]) -> None:
    (package,) = re.findall(r"^(?:\.|anomalib-csflow)\[(.*)\]$", arguments[-1])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(package.split(",")) <= set(extras)


def check_own(arguments: list[str]) -> None:
    """``recipe`` has run already, in the stub."""
    if arguments[0] == "install-weights":
        assert set(arguments[1:]) <= set(weights.PACKAGES)
    elif arguments[0] in {"bundle", "calibrate"}:
        missing = r"there is no checkpoint at|there is no folder my/images/good"
        with pytest.raises(SystemExit, match=missing):  # the arguments themselves are right
            cli.main(arguments)
    elif arguments[0] == "fit-all":
        with pytest.raises(SystemExit, match=r"there is no (folder /path/to/parts|SLURM here)"):
            cli.main(arguments)
    elif arguments[0] in {"validate", "watch"}:
        runtime.parser("anomalib-csflow").parse_args(arguments)


def check_python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "anomalib_csflow.runtime"]:
        check_own(arguments[2:])
        return
    if arguments[0].startswith("speed/"):
        options = {x.partition("=")[0] for x in arguments if x.startswith("--")}
        assert all(option in (ROOT / arguments[0]).read_text() for option in options)
        return
    assert arguments[:2] == ["-m", "anomalib_csflow.benchmark"]
    benchmark = importlib.import_module("anomalib_csflow.benchmark.__main__")
    options = [x.removeprefix("--").partition("=")[0] for x in arguments if x.startswith("--")]
    assert set(options) <= {"config", *inspect.signature(benchmark.benchmark).parameters}
    assert all((ROOT / x).is_file() for x in arguments if x.startswith("configs/"))


def check_pytest(arguments: list[str]) -> None:
    assert all((ROOT / x).is_file() for x in arguments if x.startswith("tests/"))


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "anomalib": check_own,
    "anomalib-csflow": check_own,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
    "srun": check_own,
    "torchrun": check_own,
}


def test_a_wrong_option_is_noticed(parse: Callable[[list[str]], object]) -> None:
    with pytest.raises(Exception, match="no_such_option"):
        parse(["fit", "--config", str(ROOT / "configs" / "cs_flow_small.yaml"), "--model.no_such_option", "1"])


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700
