"""Where things live and who may know whom; that it installs the way it must."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nsc_fast"

# A floor may know itself and the floors below it. A folder stands for all its files.
FLOORS = {
    0: ["dtypes", "errors"],
    1: ["factors", "reference", "kernels"],
    2: ["ops"],
    3: [
        "adapters",
        "batches",
        "checkpoint",
        "coefficients",
        "dense",
        "decoder_inputs",
        "interference",
        "layers",
        "loss",
        "memory",
        "monitor",
        "packing",
        "saved",
        "siblings",
        "soap",
        "targets",
    ],
    4: [
        "apply",
        "checkpoint_files",
        "checks",
        "data",
        "driver",
        "footprint",
        "full_weights",
        "loading",
        "loop",
        "merge",
        "methods",
        "objectives",
        "outputs",
        "parameters",
        "planner",
        "processes",
        "quantised",
        "recipe",
        "report",
        "result",
        "row_inputs",
        "sharding",
        "shortened",
        "signal",
        "sweep",
        "verify",
        "workload",
    ],
    5: [
        "cli",
        "cli_apply",
        "cli_merge",
        "cli_plan",
        "cli_recipe",
        "cli_run",
        "cli_tables",
        "demo",
        "__main__",
    ],
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}


def fresh(code: str, *, cwd: Path = ROOT, python: str = sys.executable, path: str | None = None) -> str:
    """Output of ``code`` in a new process that finds nothing but the standard library, cwd and ``path``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    if path is not None:
        env["PYTHONPATH"] = path
    done = subprocess.run([python, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> list[tuple[str, int]]:
    """Full names of everything that a file imports, also inside functions, with the line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = ("nsc_fast", *path.relative_to(PACKAGE).with_suffix("").parts)
    package = own[:-1]  # the __init__ of a package counts as a file of it
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            out += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return out


class TestFloors:
    @pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
    def test_imports_go_downward_only(self, path):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            return
        assert room in FLOOR_OF, f"{room} has no floor yet: add it to FLOORS"
        for name, line in imported(path):
            parts = name.split(".")
            if parts[0] != "nsc_fast" or len(parts) == 1 or parts[1] == "__version__":
                continue
            assert parts[1] in FLOOR_OF, f"{path.name}:{line} imports {name}, which has no floor"
            assert FLOOR_OF[parts[1]] <= FLOOR_OF[room], (
                f"{path.name}:{line}, floor {FLOOR_OF[room]}, imports {name} from floor {FLOOR_OF[parts[1]]}"
            )

    def test_a_wrong_import_would_be_seen(self, tmp_path):
        path = PACKAGE / "ops" / "x.py"
        names = [
            name for name, _ in imported_from("from ..layers import install\nfrom . import dispatch", path)
        ]
        assert names == ["nsc_fast.layers.install", "nsc_fast.ops.dispatch"]
        names = [name for name, _ in imported_from("def f():\n    import peft", path)]
        assert names == ["peft"]

    @pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
    def test_the_triton_programs_know_torch_and_triton_and_nothing_else(self, path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name}:{node.lineno} reaches out of the folder"
                names = [] if node.level else [node.module.split(".")[0]]
            else:
                continue
            known = {"torch", "triton", *sys.stdlib_module_names}
            assert set(names) <= known, f"{path.name}:{node.lineno} imports {names}"

    def test_triton_is_imported_by_the_kernels_and_what_wraps_them_only(self):
        for path in sources():
            names = {name.split(".")[0] for name, _ in imported(path)}
            assert "triton" not in names, f"{path.relative_to(ROOT)} imports triton"

    @pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
    def test_only_the_top_floor_prints_plots_or_parses_a_command_line(self, path):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if FLOOR_OF.get(room) == 5:
            return
        outlets = {"argparse", "typer", "rich", "matplotlib", "tqdm"}
        assert not outlets & {name.split(".")[0] for name, _ in imported(path)}
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        printed = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printed, f"print in line {printed}"


def imported_from(code: str, path: Path) -> list[tuple[str, int]]:
    class Text(type(path)):
        def read_text(self, encoding=None):
            return code

    return imported(Text(path))


class TestImporting:
    HEAVY = [
        "torch",
        "numpy",
        "triton",
        "transformers",
        "peft",
        "pydantic",
        "safetensors",
        "huggingface_hub",
        "typer",
    ]

    def test_importing_the_package_is_light_and_fast(self):
        code = (
            "import json, sys, time; t = time.perf_counter(); import nsc_fast; "
            "print(json.dumps([time.perf_counter() - t, list(sys.modules)]))"
        )
        seconds, modules = json.loads(fresh(code))
        assert not set(self.HEAVY) & set(modules)
        assert seconds < 0.5  # milliseconds on a quiet machine

    def test_the_library_imports_neither_triton_nor_transformers_nor_peft(self):
        code = (
            "import sys; from nsc_fast import NSCLoss, install, null_space_ratio, read_adapter\n"
            "heavy = ('triton', 'transformers', 'peft', 'torch._dynamo'); "
            "print([m for m in heavy if m in sys.modules])"
        )
        assert fresh(code) == "[]"

    def test_every_public_name_exists(self):
        import nsc_fast

        for name in nsc_fast.__all__:
            assert getattr(nsc_fast, name) is not None
        assert set(dir(nsc_fast)) == set(nsc_fast.__all__)
        with pytest.raises(AttributeError, match="module 'nsc_fast' has no attribute 'nonsense'"):
            nsc_fast.nonsense  # noqa: B018

    def test_the_front_door_of_the_kernels_works_without_triton(self):
        code = (
            "import sys; sys.modules['triton'] = None; import nsc_fast.kernels, importlib.util as u; "
            "print(u.find_spec('nsc_fast.kernels.launch').origin)"
        )
        assert Path(fresh(code)) == ROOT / "kernels" / "launch.py"

    def test_without_triton_torch_runs_and_the_kernels_are_refused_with_a_way_out(self):
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "import torch; from nsc_fast import null_space_ratio; z = torch.ones(2, 4, requires_grad=True)\n"
            "null_space_ratio(z, torch.eye(4)[:1]).sum().backward()\n"
            "try: null_space_ratio(z, torch.eye(4)[:1], impl='triton')\n"
            "except RuntimeError as error: print(error)"
        )
        assert (
            fresh(code)
            == 'impl="triton" cannot run: triton is not installed; use impl="auto" or impl="torch"'
        )


class TestTheKernelsFolder:
    def test_it_has_no_init_file(self):
        """transformers probes for a package named ``kernels``: with one, it would take this folder for it."""
        assert not (ROOT / "kernels" / "__init__.py").exists()

    def test_transformers_works_from_the_checkout(self):
        assert fresh("from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)")

    def test_the_package_list_is_the_folders_that_exist(self):
        listed = set(
            re.findall(
                r'"(nsc_fast(?:\.\w+)*)"[,\n]', (ROOT / "setup.py").read_text().split("package_dir")[0]
            )
        )
        with_code = {p.parent for p in sources()}
        real = {".".join(("nsc_fast", *folder.relative_to(PACKAGE).parts)) for folder in with_code}
        missing = (real | {"nsc_fast.kernels"}) - listed
        assert not missing, f"setup.py lacks {missing}"
        for name in listed - {"nsc_fast.kernels"}:
            assert ROOT.joinpath(*name.split(".")).is_dir(), f"setup.py lists {name}, which does not exist"


def run_pip(*arguments: str, cwd: Path, python: str = sys.executable, **env: str) -> None:
    command = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        *arguments,
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy without build results, so that building leaves no trace in the real one."""
    # Not find_spec: looking for pip that way makes setuptools stop replacing distutils in this process.
    for tool in ("setuptools", "pip"):
        try:
            importlib.metadata.distribution(tool)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{tool} is not installed")
    copy = tmp_path_factory.mktemp("checkout") / "nsc"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("nsc_fast", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return copy


FIND = (
    "import importlib.util as u, sys; import nsc_fast; "
    "print(u.find_spec('nsc_fast.kernels.launch').origin); print(nsc_fast.__file__); "
    "print(u.find_spec('kernels'))"
)


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run_pip("wheel", ".", "--no-build-isolation", "--wheel-dir", str(folder), cwd=checkout)
    (wheel,) = folder.glob("*.whl")
    return wheel


class TestInstalling:
    def test_the_wheel_holds_the_kernels_under_their_long_name_only(self, wheel):
        names = zipfile.ZipFile(wheel).namelist()
        for path in (ROOT / "kernels").glob("*.py"):
            assert f"nsc_fast/kernels/{path.name}" in names
        assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"nsc_fast"}
        assert "nsc_fast/kernels/__init__.py" not in names

    def test_the_wheel_holds_every_file_of_the_package(self, wheel):
        names = set(zipfile.ZipFile(wheel).namelist())
        missing = {str(p.relative_to(ROOT).as_posix()) for p in sources()} - names
        assert not missing
        data = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix in (".css", ".gz", ".safetensors")]
        assert {str(p.relative_to(ROOT).as_posix()) for p in data} <= names

    def test_an_installed_package_finds_its_kernels(self, wheel, tmp_path):
        run_pip("install", str(wheel), "--target", str(tmp_path / "site"), cwd=tmp_path)
        kernels, package, top_level = fresh(FIND, cwd=tmp_path, path=str(tmp_path / "site")).splitlines()
        assert Path(kernels) == tmp_path / "site" / "nsc_fast" / "kernels" / "launch.py"
        assert Path(package).is_relative_to(tmp_path) and top_level == "None"

    def test_an_editable_install_finds_its_kernels(self, checkout, tmp_path):
        venv = tmp_path / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
        python = str(next(p for p in (venv / "bin/python", venv / "Scripts/python.exe") if p.exists()))
        # pip and setuptools are borrowed for the installation, and not there when the package is looked for.
        borrowed = str(importlib.metadata.distribution("pip").locate_file(""))
        run_pip(
            "install", "-e", ".", "--no-build-isolation", cwd=checkout, python=python, PYTHONPATH=borrowed
        )
        kernels, package, top_level = fresh(FIND, cwd=tmp_path, python=python).splitlines()
        assert Path(kernels) == checkout / "kernels" / "launch.py"
        assert Path(package) == checkout / "nsc_fast" / "__init__.py" and top_level == "None"
