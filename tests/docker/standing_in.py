"""Images built for real without a registry: buildah over Debian with Python, as debootstrap lays it out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

ROOT = Path(__file__).parents[2]
TOOLS = ("buildah", "debootstrap")
PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


class Builder:
    """Builds and runs images in a folder of its own, without daemons, namespaces or what other images there are."""

    NVIDIA = "2.13.0a0+0123456789.nv26.07"
    """A version as NVIDIA gives its torch: a pre-release for pip."""

    def __init__(self, folder: Path) -> None:
        self._storage = folder / "storage"
        self._rootfs = folder / "rootfs"
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        self._settings = _pip_settings()

    @staticmethod
    def missing() -> str | None:
        """Why nothing can be built here, or None."""
        absent = [tool for tool in TOOLS if shutil.which(tool) is None]
        if absent:
            return f"{' and '.join(absent)} not installed: apt-get install buildah debootstrap"
        return None if os.geteuid() == 0 else "building without user namespaces needs root"

    def python(self) -> str:
        """An image of Debian with Python and pip, which installs packages from where this machine does."""
        name = "localhost/python"
        if not self._rootfs.exists():
            _call("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", self._rootfs)
            shutil.copy(CERTIFICATES, self._rootfs / "etc/ssl/certs")
            lines = [f"{key} = {value}\n" for key, value in self._settings.items()]
            (self._rootfs / "etc/pip.conf").write_text("".join(["[global]\n", *lines]))
            # The official image lets pip install beside Python; Debian does not.
            for marker in self._rootfs.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
                marker.unlink()
            container = self._buildah("from", "scratch").strip()
            self._buildah("copy", "--quiet", container, self._rootfs, "/")
            self._buildah("commit", "--quiet", "--rm", container, name)
        return name

    def like_nvidia(self, numpy: str) -> str:
        """`python` with a torch and a numpy of its own, which it holds pip to, and a user of number 1000."""
        name = "localhost/nvidia"
        rename = f"""
import pathlib, re, torch
made = pathlib.Path(torch.__file__).parent
(metadata,) = made.parent.glob("torch-*.dist-info")
text = (metadata / "METADATA").read_text()
(metadata / "METADATA").write_text(re.sub("(?m)^Version: .*", "Version: {self.NVIDIA}", text, count=1))
metadata.rename(made.parent / "torch-{self.NVIDIA}.dist-info")
text = (made / "version.py").read_text()
(made / "version.py").write_text(re.sub("__version__ = .*", "__version__ = '{self.NVIDIA}'", text, count=1))
"""
        folder = self._temporary / "nvidia"
        folder.mkdir()
        (folder / "rename.py").write_text(rename)
        (folder / "constraint.txt").write_text(f"numpy=={numpy}\ntorch=={self.NVIDIA}\npydantic==2.11.0\n")
        shutil.copy(ROOT / "constraints.txt", folder)
        steps = f"""
FROM {self.python()}
COPY . /nvidia
RUN grep -v ^numpy== /nvidia/constraints.txt > /nvidia/pins
RUN python3 -m pip install -c /nvidia/pins torch numpy=={numpy}
RUN python3 /nvidia/rename.py && useradd --create-home --uid 1000 ubuntu
ENV PIP_CONSTRAINT=/nvidia/constraint.txt
"""
        (folder / "Containerfile").write_text(steps)
        self._build(folder / "Containerfile", folder, name)
        return name

    def remove(self) -> None:
        """Take all images and folders away."""
        for folder in (self._storage, self._rootfs, self._temporary):
            shutil.rmtree(folder, ignore_errors=True)

    def build(self, dockerfile: str, base: str) -> str:
        """Build one of the repository's images over `base`; returns its name."""
        name = f"localhost/{Path(dockerfile).name.lower()}"
        arguments = ["--build-arg", f"BASE={base}"]
        if "TORCH_INDEX" in (ROOT / dockerfile).read_text() and "extra-index-url" in self._settings:
            arguments += ["--build-arg", f"TORCH_INDEX={self._settings['extra-index-url'].split()[0]}"]
        self._build(ROOT / dockerfile, ROOT, name, *arguments)
        return name

    def run(self, image: str, *command: str) -> str:
        """Run a command in a fresh container as the image's user; returns what it prints."""
        container = self._buildah("from", image).strip()
        try:
            return self._buildah("run", "--isolation=chroot", container, "--", *command)
        finally:
            self._buildah("rm", container)

    def versions(self, image: str, *names: str) -> list[str]:
        """Versions of packages that the image's `python` sees, without their local parts where they are final."""
        script = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
        found = self.run(image, "python", "-c", script, *names).split()
        return [version if "a0+" in version else version.partition("+")[0] for version in found]

    def inspect(self, image: str) -> dict:
        """The image's configuration as Docker has it."""
        return json.loads(self._buildah("inspect", "--type", "image", image))["Docker"]["config"]

    def _build(self, dockerfile: Path, context: Path, name: str, *arguments: str) -> None:
        volumes = [f"--volume={path}:{path}:ro" for path in _local_paths(self._settings)]
        self._buildah(
            *("build", "--quiet", "--isolation=chroot", "--format=docker", "--layers=false", *volumes, *arguments),
            *("--file", dockerfile, "--tag", name, context),
        )

    def _buildah(self, *arguments: object) -> str:
        where = [f"--root={self._storage}", f"--runroot={self._storage}-run", "--storage-driver=vfs"]
        return _call("buildah", *where, *arguments, TMPDIR=str(self._temporary))


def _call(*command: object, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _pip_settings() -> dict[str, str]:
    """Where this machine's pip finds packages, from its files and environment."""
    keys = ("index-url", "extra-index-url", "find-links")
    found: dict[str, str] = {}
    for line in _call(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in keys:
            found[key] = value.strip("'\"")
    return found


def _local_paths(settings: dict[str, str]) -> set[Path]:
    words = [word for value in settings.values() for word in value.split()]
    paths = {Path(urlparse(word).path) for word in words if urlparse(word).scheme in ("", "file")}
    # An index of links points beside itself.
    return {path.parent if path.name == "simple" else path for path in paths if path.exists()}
