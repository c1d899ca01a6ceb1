"""The house's rules: what is packaged, who imports whom, and what importing costs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {
    "lit_rl": "lit_rl",
    "callbacks": "lit_rl.callbacks",
    "datamodules": "lit_rl.datamodules",
    "kernels": "lit_rl.kernels",
}
HEAVY = {"optuna", "vllm", "wandb", "bitsandbytes", "peft", "matplotlib", "reasoning_gym", "transformers", "tokenizers"}
LAYERS = [
    "kernels",
    "ops",
    "task",
    "experience",
    "hooks",
    "generation",
    "forward",
    "actor",
    "inner",
    "policy",
    "rollout",
    "group",
    "methods",
    "cli",
]


def modules():
    for top, package in MAPPED.items():
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            yield name, path


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield base if not node.level else f".{base}"
            yield from (f"{base}.{a.name}" for a in node.names if not node.level)


def test_every_package_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = set()
    for top, package in MAPPED.items():
        for path in (ROOT / top).rglob("*.py"):
            folders.add(".".join([package, *path.parent.relative_to(ROOT / top).parts]))
    assert set(project["packages"]) == folders
    assert project["package-dir"] == {package: top for top, package in MAPPED.items()}
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would shadow the package kernels, which transformers imports"
    )


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_downwards(name, path):
    found = set(imports(path))
    parts = name.split(".")
    area = parts[1] if len(parts) > 1 else ""
    if area == "kernels":
        others = {i.split(".")[0] for i in found if not i.startswith("lit_rl.kernels")}
        assert others <= {
            "torch",
            "triton",
            "typing",
            "collections",
            "dataclasses",
            "functools",
            "itertools",
            "__future__",
            "math",
        }
    if area == "callbacks":
        assert not any(i.startswith(("lit_rl.datamodules", "lit_rl.methods")) for i in found)
        assert name.count(".") < 2 or not any(i.startswith((".", "lit_rl.callbacks")) for i in found), (
            "callbacks do not import each other"
        )
    if area == "datamodules":
        assert not any(
            i.startswith(("lit_rl.callbacks", "lit_rl.methods", "lit_rl.rollout", "lit_rl.policy"))
            for i in found - {"lit_rl.experience"}
        )
        if "families" in parts:
            assert not any(i.split(".")[0] in ("torch", "lightning", "numpy") for i in found)
    if area in LAYERS and area != "cli":
        assert not any(i.startswith(("lit_rl.callbacks", "lit_rl.datamodules", "lit_rl.cli")) for i in found)
        above = LAYERS[LAYERS.index(area) + 1 :]
        runtime = set(imports(path, top_level_only=True))
        assert not any(
            i == f"lit_rl.{layer}" or i.startswith(f"lit_rl.{layer}.") for i in runtime for layer in above
        ), (name, runtime)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_heavy_packages_are_imported_in_functions(name, path):
    engine = name in {
        f"lit_rl.generation.{part}" for part in ("rows", "caches", "recorded")
    }  # imported with the native one
    allowed = {"transformers"} if engine else set()
    assert not {i.split(".")[0] for i in imports(path, top_level_only=True)} & (HEAVY - allowed)


def cpu_seconds(code):
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport time; print(time.process_time())"],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout.split()[-1])


def loaded(before, after):
    """Top-level names of the modules that `after` imports beyond `before`."""
    code = f"import sys\n{before}\nold = set(sys.modules)\n{after}\nprint(*{{m.split('.')[0] for m in set(sys.modules) - old}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_lit_rl_costs_nothing():
    assert min(cpu_seconds("import lit_rl") for _ in range(3)) - min(cpu_seconds("") for _ in range(3)) < 0.3


def test_the_command_line_adds_nothing_heavy_to_lightning():
    assert not loaded("import lightning.pytorch.cli", "import lit_rl.cli") & (HEAVY - {"transformers"})


def test_families_need_the_standard_library_alone():
    new = loaded("", "from lit_rl.datamodules.families import families; families()")
    assert not new & {"torch", "lightning", "numpy"}
