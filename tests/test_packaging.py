"""The package as others meet it: names that clash with nobody's, a complete wheel, imports that point one way."""

import ast
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffpref"
WORLD = PACKAGE / "emoji_world"
# `accelerate launch <folder>/x.py` puts the folder itself first on sys.path
SCRIPT_FOLDERS = (PACKAGE, PACKAGE / "scorer", WORLD)

# Top-level names that neighbours of this package import, whether or not we depend on them.
NEIGHBOURS = {
    "accelerate", "bitsandbytes", "clip", "datasets", "diffusers", "evaluate", "gradio", "huggingface_hub", "hpsv2",
    "image_reward", "kernels", "matplotlib", "numpy", "open_clip", "peft", "safetensors", "scipy", "tokenizers",
    "torch", "torchmetrics", "torchvision", "transformers", "triton", "triton_kernels", "trl", "wandb", "webdataset",
    "xformers", "yaml",
}  # fmt: skip


def python(code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code with `cwd` first on sys.path, as `python -m` and `python -c` do."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def modules() -> dict[str, Path]:
    """Import name -> file of every module of the package (the kernels lie elsewhere and are not among them)."""
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


@cache
def imports(path: Path) -> frozenset[str]:
    """Every dotted name a file imports, also inside functions; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import fails where the file runs as a script"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def import_graph() -> dict[str, set[str]]:
    """Module -> the package's modules it imports."""
    known = modules()
    return {name: {i for i in imports(path) if i in known and i != name} for name, path in known.items()}


def normalised(distribution: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@cache
def dependencies() -> dict[str, frozenset[str]]:
    """Distribution -> the top-level names it installs, for everything diffpref needs without its extras.

    Read from the lists of files: importlib.metadata.packages_distributions() sees only some of them on Python 3.10.
    """
    needed = [line for line in importlib.metadata.requires("diffpref") or () if "extra ==" not in line]
    names = {normalised(re.split(r"[^\w.-]", line)[0]) for line in needed}
    return {name: top_level(d) for d in importlib.metadata.distributions() if (name := normalised(d.name)) in names}


def top_level(distribution: importlib.metadata.Distribution) -> frozenset[str]:
    """Names that `import` finds because of this distribution."""
    files = [file for file in distribution.files or () if file.suffix == ".py" and ".." not in file.parts]
    return frozenset(file.parts[0].removesuffix(".py") for file in files)


# --- names ------------------------------------------------------------------------------------------------------------


def test_kernels_have_our_import_name():
    module = importlib.import_module("diffpref.triton_kernels")
    assert Path(module.__file__).parent == ROOT / "triton_kernels"


def test_kernels_refuse_the_triton_projects_name():
    result = python("import triton_kernels", cwd=ROOT)
    assert result.returncode == 1
    assert "ModuleNotFoundError: this folder is diffpref.triton_kernels, not the Triton project's" in result.stderr


def test_kernels_do_not_look_installed_under_the_triton_projects_name(tmp_path):
    """Other projects decide by find_spec whether the Triton project's package is there."""
    ours = python("import importlib.util as u; s = u.find_spec('triton_kernels'); print(s and s.origin)", cwd=tmp_path)
    assert str(ROOT) not in ours.stdout and ours.returncode == 0


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS, ids=lambda folder: folder.name)
def test_no_module_shadows_another_package(folder):
    stems = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    needed = set().union(*dependencies().values())
    assert needed >= {"torch", "PIL", "yaml"}  # the look-up works
    assert not stems & (sys.stdlib_module_names | needed | NEIGHBOURS)


def test_training_command_runs_as_a_script(tmp_path):
    command = [sys.executable, str(PACKAGE / "train.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "--model.pretrained_model_name_or_path" in result.stdout
    assert "Hub revision" in result.stdout, "the docstrings are the help"


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names of the files in a wheel built from a copy of the tree, without the network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    for name in ("diffpref", "triton_kernels", "LICENSES"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    result = python(build, cwd=tree)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module(wheel):
    ours = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    kernels = {f"diffpref/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == ours | kernels


def test_wheel_holds_the_worlds_data(wheel):
    data = {str(path.relative_to(ROOT)) for path in (WORLD / "data").rglob("*") if path.is_file()}
    assert data and data <= wheel


def test_wheel_holds_the_licences_and_nothing_beside_the_package(wheel):
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"diffpref"}
    held = {name.split("/licenses/")[1] for name in wheel if "/licenses/" in name}
    assert held == {"LICENSE", "NOTICE"} | {f"LICENSES/{path.name}" for path in (ROOT / "LICENSES").iterdir()}


# --- licences ---------------------------------------------------------------------------------------------------------


def test_notice_names_every_artist_licence_and_source():
    from datasets import Dataset

    rows = Dataset.from_parquet(str(WORLD / "data" / "artwork.parquet"), keep_in_memory=True)
    notice = (ROOT / "NOTICE").read_text()
    named = {value for column in ("license", "author", "source") for value in rows.unique(column)}
    assert named and not {value for value in named if value not in notice}
    assert set(rows.unique("license")) <= {"MIT", "Apache-2.0"}


def test_notice_names_every_licence_file():
    notice = (ROOT / "NOTICE").read_text()
    files = {f"LICENSES/{path.name}" for path in (ROOT / "LICENSES").iterdir()}
    assert set(re.findall(r"LICENSES/[\w.-]+\w", notice)) == files


# --- imports ----------------------------------------------------------------------------------------------------------


def test_every_import_is_a_declared_dependency():
    """Nothing works only because some dependency happens to bring it along."""
    roots = {name.split(".")[0] for path in modules().values() for name in imports(path)}
    extras = {"resvg_py", "bitsandbytes", "xformers"}  # [artwork], [8bit] and [xformers] bring them
    declared = {"diffpref"}.union(extras, *dependencies().values())
    undeclared = roots - sys.stdlib_module_names - declared
    assert not undeclared


def test_no_import_circles():
    graph, done = import_graph(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import circle: {' -> '.join((*path, name))}"
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_objectives_import_torch_and_nothing_of_ours():
    names = {name for path in (PACKAGE / "objectives").glob("*.py") for name in imports(path)}
    ours = {name for name in names if name.startswith("diffpref.objectives.")}
    assert ours and {name.split(".")[0] for name in names - ours} - sys.stdlib_module_names == {"torch"}


def test_nothing_imports_the_entry_point():
    """It runs as __main__; imported, it would exist twice."""
    assert not [name for name, imported in import_graph().items() if "diffpref.train" in imported]


@pytest.mark.parametrize("stage", ["batch", "config", "families", "noise", "errors", "objectives", "sample", "winrate"])
def test_stages_know_nothing_of_the_trainer(stage):
    """Dependencies point from the trainer to the stages, also by way of others."""
    graph, reached, todo = import_graph(), set(), [f"diffpref.{stage}"]
    while todo:
        reached.add(name := todo.pop())
        todo += graph[name] - reached
    assert not reached & {"diffpref.trainer", "diffpref.train", "diffpref.cli", "diffpref.verdict", "diffpref.report"}


def test_the_library_knows_nothing_of_emoji():
    inside = {name for name in modules() if name.startswith("diffpref.emoji_world")}
    assert not {name for name, imported in import_graph().items() if name not in inside and imported & inside}


def test_importing_the_package_is_light():
    heavy = "import sys, diffpref; print(diffpref.__version__, {'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    result = python(heavy, cwd=ROOT)
    assert result.stdout.strip() == f"{importlib.metadata.version('diffpref')} set()"
