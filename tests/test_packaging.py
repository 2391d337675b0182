"""The wheel and the launchers as a user meets them: installed elsewhere, called from another folder, mistaken flags."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import launchers
import pytest

from sharded_llama import __version__

ROOT = Path(__file__).parent.parent
SOURCES = ("LICENSE", "pyproject.toml", "setup.py", "benchmarks", "configs", "launch", "sharded_llama", "tests")
NOT_BUILT = ("__pycache__", "build", "*.egg-info")


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command without the variables by which this test run could lend it packages or devices."""
    lent = ("PYTHONPATH", "NPROC", "XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    env = {name: value for name, value in os.environ.items() if name not in lent}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def run_ok(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_mistake(done: subprocess.CompletedProcess[str] | launchers.Finished, message: str) -> None:
    """One message on standard error, nothing else, exit status 1."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(re.findall(r"^(?:error:|FATAL )", done.stderr, re.MULTILINE)) == 1
    assert message in done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in the real one."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*NOT_BUILT))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist, so that the sdist is known to be complete."""
    out = tmp_path_factory.mktemp("dist")
    run_ok(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


def make_venv(folder: Path) -> Path:
    """A new environment that sees the packages installed here, but not a checkout that is installed as editable.

    A folder that a .pth file names is searched for packages, but the .pth files inside it, by which editable installs
    work, are not read. Returns the folder of its commands.
    """
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(here))
    return folder / "bin"


def pip_install(bin_folder: Path, *args: object, into: Path) -> None:
    """Installs the package with pip; afterwards its launchers are imported from somewhere inside `into`."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run_ok(bin_folder / "python", "-m", "pip", "install", "-q", *options, *args, cwd=bin_folder)
    where = "import sharded_llama.launch.cli as cli; print(cli.__file__)"
    assert Path(run_ok(bin_folder / "python", "-c", where, cwd=bin_folder)).is_relative_to(into)


def test_the_wheel_holds_the_package_and_nothing_else(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        license_text = archive.read(f"sharded_llama-{__version__}.dist-info/licenses/LICENSE")
    expected = set()
    for folder, package in (
        ("sharded_llama", "sharded_llama"),
        ("launch", "sharded_llama/launch"),
        ("configs", "sharded_llama/configs"),
    ):
        files = [path for path in (source / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        expected |= {f"{package}/{path.relative_to(source / folder)}" for path in files}
    assert {n for n in names if not n.startswith(f"sharded_llama-{__version__}.dist-info/")} == expected
    assert license_text == (ROOT / "LICENSE").read_bytes()


def test_the_installed_wheel_generates(wheel, tmp_path):
    bin_folder = make_venv(tmp_path / "venv")
    pip_install(bin_folder, wheel, into=bin_folder.parent)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = ("--config=configs/demo.py", "--simulate_devices=8", "--mesh=data:2,model:4", "--max_new_tokens=8")
    done = run(bin_folder / "sharded-llama", "generate", *flags, "--prompt=The king", "--ignore_eos", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The king")
    assert len(done.stdout.rstrip("\n")) > len("The king")
    assert ", 8 new tokens, " in done.stderr
    assert "mesh data:2,model:4 on 8 cpu devices" in done.stderr


def test_an_editable_install_has_the_command(source, tmp_path):
    bin_folder = make_venv(tmp_path / "venv")
    pip_install(bin_folder, "-e", source, into=source)
    assert "generate" in run_ok(bin_folder / "sharded-llama", cwd=tmp_path)
    done = run(bin_folder / "sharded-llama", "generate", "--config=configs/demmo.py", cwd=tmp_path)
    check_mistake(done, "configs/llama3_1_8b.py")  # the message lists the configs of the package


class TestCommand:
    """`python -m launch` is what `sharded-llama` runs."""

    @pytest.mark.parametrize("args", [[], ["--help"]])
    def test_lists_the_launchers(self, args):
        text = run_ok(sys.executable, "-m", "launch", *args, cwd=ROOT)
        names = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
        assert "generate" in names
        assert not {"cli", "common", "__main__", "__init__"} & set(names)
        assert "  Generates text from a checkpoint.\n" in text

    def test_suggests_a_name(self):
        done = run(sys.executable, "-m", "launch", "generat", cwd=ROOT)
        check_mistake(done, "error: there is no launcher 'generat'. Did you mean 'generate'?\n")

    def test_shows_the_flags_of_a_launcher(self):
        text = run_ok(sys.executable, "-m", "launch", "generate", "--help", cwd=ROOT)
        assert text.startswith("Generates text from a checkpoint.\n")
        assert "  --max_new_tokens: " in text
        assert "  --simulate_devices: " in text


MISTAKES = [
    ("--max_new_token=8", "Unknown command line flag 'max_new_token'. Did you mean: max_new_tokens ?"),
    ("--config=configs/nope.py", "--config=configs/nope.py: there is no such file"),
    ("--max_new_tokens=many", "--max_new_tokens=many"),
    ("Once", "unexpected argument 'Once'"),
    ("--prompt=Once", "no checkpoint: give --checkpoint=FOLDER"),
]


@pytest.mark.parametrize(("flag", "message"), MISTAKES)
def test_a_mistake_gives_one_message(flag, message):
    check_mistake(launchers.run("generate", flag), message)


@pytest.mark.parametrize("command", [["launch.generate"], ["launch", "generate"]])
@pytest.mark.parametrize(("flag", "message"), MISTAKES[:2])
def test_so_does_a_command(command, flag, message):
    check_mistake(run(sys.executable, "-m", *command, flag, cwd=ROOT), message)
