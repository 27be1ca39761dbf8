"""The wheel and the sdist hold pkd, all of it and nothing else, and work where nothing of this checkout is."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from pkd import __version__

pytest.importorskip("build")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("toolkit", "export", "serving")
SCRIPTS = [entry.name for entry in distribution("pkd").entry_points.select(group="console_scripts")]


def checkout(folder: Path) -> Path:
    """Copy what a build reads, links as links."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("pkd", *PARTS):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(source: Path, out: Path, *kinds: str) -> subprocess.CompletedProcess[str]:
    """Build with the setuptools that is installed here: no package index is asked."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *kinds, str(source)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the wheel from the checkout, and the one from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    source = checkout(folder / "checkout")
    for out, kinds in (("direct", ["--wheel"]), ("by-sdist", [])):  # without a kind: an sdist, and a wheel from it
        done = build(source, folder / out, *kinds)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (folder / "by-sdist" / f"pkd-{__version__}.tar.gz").is_file()
    direct, by_sdist = (next((folder / out).glob("*.whl")) for out in ("direct", "by-sdist"))
    return direct, by_sdist


def test_the_wheel_holds_every_file_of_the_code_and_no_other(wheels: tuple[Path, Path]) -> None:
    expected = {"pkd/__init__.py", "pkd/py.typed"} | {
        f"pkd/{path.relative_to(ROOT).as_posix()}"
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheels[0]) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_sdist_builds_the_same_wheel(wheels: tuple[Path, Path]) -> None:
    contents = []
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            contents.append({name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/RECORD")})
    assert contents[0] == contents[1]


def test_every_command_starts_from_the_wheel_alone(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own, which has the dependencies of this one but not its editable pkd."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheels[1])], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    ask = [str(python), "-c", "import pkd.toolkit; print(pkd.toolkit.__file__)"]
    where = subprocess.run(ask, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(where.stdout.strip()) == packages / "pkd/toolkit/__init__.py"
    assert SCRIPTS
    for name in SCRIPTS:
        done = subprocess.run([home / "bin" / name, "--version"], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stdout.strip()) == (0, f"pkd {__version__}"), name + done.stderr


def test_a_checkout_without_links_is_refused_in_words(tmp_path: Path) -> None:
    source = checkout(tmp_path / "checkout")
    (source / "pkd/toolkit").unlink()
    (source / "pkd/toolkit").write_text("../toolkit")  # what git leaves where links cannot be made
    done = build(source, tmp_path, "--wheel")
    assert done.returncode != 0
    assert "pkd/toolkit must be a symbolic link to toolkit/" in done.stdout + done.stderr
