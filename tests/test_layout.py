"""The shape of the package: who may import whom, what is public, and what an import costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import chatloss

PACKAGE = Path(chatloss.__file__).parent
# Imports only ever point upward in this list.
ORDER = [
    "errors", "frozen", "kept", "values", "chat", "sample", "lazy", "policy", "formats", "streams", "tables",
    "folders", "reader", "meter", "tojson", "sandbox", "traced", "shapes", "stops", "template", "fields", "reference",
    "typed", "places", "cuts", "tokens", "load", "remembered", "fast_tokens", "literal", "rows", "paint", "straight",
    "encoding", "plans", "window", "encode", "markers", "pairs", "pipeline", "reduction", "pack", "batch", "manifest",
    "columns", "dataset", "shards", "runners", "prepare", "cluster",
    # torch starts here
    "loss", "config", "parallel", "step", "attention", "models", "checkpoint", "log", "evaluate", "objective",
    "answers", "references", "preference", "kto", "objectives", "trainer", "verify",
    # edges
    "sft", "hf", "runs", "view", "page", "findings", "switches", "probes",
    "describe_turns", "describe_fields", "describe", "causes", "audit", "tally", "check_report", "check", "labels",
    "compare_shares", "compare_report", "compare", "demo", "options", "commands", "cli", "__main__", "__init__",
]  # fmt: skip
CORE = {*ORDER[: ORDER.index("loss")], *ORDER[ORDER.index("runs") :]}  # all but what trains
# Known only to functions, so that the encoder and its window can speak of each other.
UPWARD_EXCEPTIONS = {("window", "encode"), ("sample", "view"), ("config", "policy")}


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "chatloss" else set()
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_its_place_in_the_order() -> None:
    assert set(modules()) <= set(ORDER)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_upward(module: str) -> None:
    if module == "__init__":
        return
    for path in modules()[module]:
        for name in imports(path):
            if name.startswith("chatloss."):
                target = name.split(".")[1]
                upward = ORDER.index(target) <= ORDER.index(module)
                assert upward or (module, target) in UPWARD_EXCEPTIONS, f"{path.name} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in modules() if m in CORE))
def test_nothing_but_the_trainer_imports_torch_or_transformers(module: str) -> None:
    for path in modules()[module]:
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}


def test_all_is_exactly_the_public_surface() -> None:
    assert len(chatloss.__all__) <= 12
    assert set(dir(chatloss)) == {*chatloss.__all__, "__version__"}
    for name in chatloss.__all__:
        assert getattr(chatloss, name).__name__ == name
    with pytest.raises(AttributeError):
        chatloss.nothing_of_this_name  # noqa: B018


def test_the_version_is_the_one_of_the_metadata() -> None:
    metadata = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text("utf-8"))
    assert metadata["project"]["version"] == chatloss.__version__


def test_files_stay_readable() -> None:
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text("utf-8").splitlines())) > 420}
    assert not long


def test_importing_the_package_or_asking_for_help_loads_nothing_heavy() -> None:
    script = (
        "import sys, json, chatloss, chatloss.cli\n"
        "try:\n    chatloss.cli.cli.main(['view', '--help'], standalone_mode=False)\nexcept SystemExit: pass\n"
        "print('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(run.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "numpy", "jinja2", "tokenizers", "pyarrow", "rich", "datasets"}


def test_the_core_works_without_torch_and_transformers(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'datasets'): sys.modules[name] = None\n"
        "from chatloss.cli import main\n"
        "main(sys.argv[1:])"
    )
    demo = PACKAGE / "assets" / "demo"
    for command in (["view", "-n", "2"], ["encode"], ["check", "--json"]):
        argv = [sys.executable, "-c", script, command[0], str(demo / "chats.jsonl"), "-t", str(demo / "tokenizer")]
        run = subprocess.run([*argv, *command[1:]], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
