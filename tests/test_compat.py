"""Lightning's module names lead to lit_fast: the same objects, clear errors, and back again."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator

import new_process
import pytest

import lit_fast
from lit_fast import compat, not_built
from lit_fast.errors import MisconfigurationException
from lit_fast.pytorch import names


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


# The recorder's comparison may have imported Lightning itself into this process.
pytestmark = pytest.mark.skipif("lightning" in sys.modules, reason="Lightning itself is imported in this process")


def test_alias_package_without_install() -> None:
    from lit_fast.pytorch.callbacks import ModelCheckpoint as package
    from lit_fast.pytorch.callbacks.model_checkpoint import ModelCheckpoint as module

    from lit_fast.callbacks import ModelCheckpoint as ours

    assert package is ours and module is ours
    assert importlib.import_module("lit_fast.pytorch.callbacks") is lit_fast.callbacks


def spellings(key: str) -> list[str]:
    """The names under which a program may import what stands at `key` of the table."""
    first, _, rest = key.partition(".")
    twin = {"pytorch": "pytorch_lightning", "fabric": "lightning_fabric"}[first]
    ours = [f"lit_fast.{key}"] if first == "pytorch" else []
    return [f"lightning.{key}", f"{twin}.{rest}".rstrip("."), *ours]


@pytest.mark.parametrize("key", [k for k in names.TABLE if k])
def test_every_name_of_the_table(installed: None, key: str) -> None:
    for spelled in spellings(key):
        assert importlib.import_module(spelled) is names.load(key), spelled
    module = names.load(key)
    entry = names.TABLE[key]
    if isinstance(entry, str):
        assert module is importlib.import_module(entry)
        assert module.__spec__ is not None and module.__spec__.name == entry
    else:
        for name, place in entry.items():
            home, _, attribute = place.partition(":")
            assert getattr(module, name) is getattr(importlib.import_module(home), attribute)


def test_the_three_packages_are_one(installed: None) -> None:
    import lightning
    import lightning.pytorch
    import pytorch_lightning

    assert lightning.Trainer is lit_fast.Trainer
    assert lightning.pytorch is pytorch_lightning
    assert pytorch_lightning.LightningModule is lit_fast.LightningModule
    assert importlib.util.find_spec("lightning") is not None
    assert lightning.__version__ == names.LIGHTNING_VERSION


def test_a_plain_module_stays_plain(installed: None) -> None:
    module = importlib.import_module("lightning.pytorch.callbacks.model_checkpoint")
    assert not hasattr(module, "__path__")
    assert module.__name__ == "lit_fast.callbacks.model_checkpoint"


@pytest.mark.parametrize(
    "name",
    [
        "lightning.app",
        "pytorch_lightning.callbacks.nothing",
        "lightning_fabric.x.y",
    ],
)
def test_what_is_not_there_is_named(installed: None, name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"lit_fast stands in for \w+ here and has no"):
        importlib.import_module(name)


def test_a_single_name_that_is_not_there(installed: None) -> None:
    with pytest.raises(ImportError, match="Fabrik"):
        exec("from lightning import Fabrik")
    with pytest.raises(AttributeError, match=r"no lightning\.Fabrik yet; it has .*Trainer"):
        _ = importlib.import_module("lightning").Fabrik


def test_install_twice_and_take_back() -> None:
    finders = len(sys.meta_path)
    compat.install()
    compat.install()
    assert compat.installed() and len(sys.meta_path) == finders
    importlib.import_module("lightning.pytorch.loggers")
    compat.uninstall()
    assert not compat.installed()
    assert not [name for name in sys.modules if name.partition(".")[0] in compat.ROOTS]
    assert importlib.import_module("lit_fast.pytorch.loggers") is lit_fast.loggers


def test_real_lightning_already_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", type(sys)("lightning"))
    with pytest.raises(MisconfigurationException, match=r"lightning had been imported before.*lit-fast run"):
        compat.install()
    assert not compat.installed()


def test_uninstall_without_install_leaves_lightning_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type(sys)("lightning")
    monkeypatch.setitem(sys.modules, "lightning", stranger)
    compat.uninstall()
    assert sys.modules["lightning"] is stranger


def test_rank_zero_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_fast.rank_zero import rank_zero_only, rank_zero_warn

    said = rank_zero_only(lambda: "said")
    assert said() == "said"
    with pytest.warns(UserWarning, match="careful"):
        rank_zero_warn("careful")
    monkeypatch.setenv("RANK", "1")
    assert said() is None


def test_alias_imports_do_not_load_a_second_copy() -> None:
    program = """
import lit_fast.pytorch.loggers.csv_logs, lit_fast.loggers.csv_logs, sys
assert sys.modules["lit_fast.pytorch.loggers.csv_logs"] is sys.modules["lit_fast.loggers.csv_logs"]
modules = set(sys.modules.values())
copies = [m for m in modules if (getattr(m, "__file__", None) or "").endswith("csv_logs.py")]
assert len(copies) == 1, copies
"""
    new_process.output_of(program)


@pytest.mark.parametrize(
    "line",
    [
        "from lightning import Fabric as Kind",
        "from lightning.fabric import Fabric as Kind",
        "from lightning.pytorch.loggers import WandbLogger as Kind",
        "from lightning.pytorch.loggers.wandb import WandbLogger as Kind",
        "from pytorch_lightning.loggers import MLFlowLogger as Kind",
        "from pytorch_lightning.loggers import CometLogger as Kind",
        "from pytorch_lightning.strategies import XLAStrategy as Kind",
    ],
)
def test_classes_that_are_not_built_can_be_asked_for(installed: None, line: str) -> None:
    names_of: dict[str, type] = {}
    exec(line, names_of)
    kind = names_of["Kind"]
    trainer = lit_fast.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert not isinstance(trainer.logger, kind) and not isinstance(trainer.strategy, kind)
    with pytest.raises(MisconfigurationException, match=rf"^{kind.__name__} is not built yet; "):
        kind(project="a")
    with pytest.raises(MisconfigurationException, match=rf"^{kind.__name__} is not built yet; "):
        type("Own", (kind,), {})()


def places() -> list[tuple[str, str]]:
    """Every module and name of the table that leads to a class that is not built."""
    entries = [(key, entry) for key, entry in names.TABLE.items() if isinstance(entry, dict)]
    return [(key, name) for key, e in entries for name, place in e.items() if place.startswith("lit_fast.not_built:")]


def test_each_class_that_is_not_built_says_so(installed: None) -> None:
    assert len(places()) > 80
    for key, name in places():
        kind = getattr(importlib.import_module(f"lightning.{key}".rstrip(".")), name)
        assert issubclass(kind, not_built.NotBuilt)
        with pytest.raises(MisconfigurationException, match=r"^\w+ is not built yet; (allowed|the|make) "):
            kind("anything", of="any kind")


def test_every_class_that_is_not_built_has_a_place() -> None:
    kinds = {name for name, value in vars(not_built).items() if name[0] != "_" and hasattr(value, "instead")}
    leads = {name.removesuffix("Plugin") for _, name in places()}
    assert kinds - leads == {"NotBuilt"}


def test_a_program_of_the_command_line(installed: None) -> None:
    program = """
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("model.width", "data.width")
CLI(object, save_config_callback=SaveConfigCallback)
"""
    with pytest.raises(MisconfigurationException, match="LightningCLI is not built yet; make the Trainer"):
        exec(program)


@pytest.mark.parametrize("environment", ["SLURMEnvironment", "TorchElasticEnvironment", "XLAEnvironment"])
def test_a_cluster_that_is_not_there_is_not_detected(installed: None, environment: str) -> None:
    found = importlib.import_module("lightning.pytorch.plugins.environments")
    assert getattr(found, environment).detect() is False


def test_modules_are_attributes_of_their_packages() -> None:
    program = f"""
import lit_fast.pytorch as pl
for path in {PATHS!r}:
    found = pl
    for part in path.split("."):
        found = getattr(found, part)
    assert type(found).__name__ in ("module", "Gathered"), path
assert pl.loggers.wandb.WandbLogger is pl.loggers.WandbLogger
"""
    new_process.output_of(program)


# As programs write them after nothing but `import lightning.pytorch as pl`.
PATHS = [
    "loggers.logger",
    "loggers.csv_logs",
    "loggers.wandb",
    "callbacks.model_checkpoint",
    "callbacks.progress.rich_progress",
    "callbacks.progress.tqdm_progress",
    "demos.boring_classes",
    "profilers.simple",
    "profilers.base",
    "plugins.environments",
    "plugins.precision.amp",
    "strategies.single_device",
    "strategies.strategy",
    "strategies.ddp",
    "core.module",
    "tuner.tuning",
    "tuner.lr_finder",
    "trainer.states",
    "trainer.connectors",
    "utilities.types",
    "utilities.rank_zero",
    "utilities.model_summary.model_summary",
]


def test_a_name_that_a_room_does_not_have(installed: None) -> None:
    from lightning.pytorch.loops import _FitLoop

    import lit_fast.loop

    assert _FitLoop is lit_fast.loop.FitLoop
    with pytest.raises(ImportError, match="NoSuchLogger"):
        exec("from lightning.pytorch.loggers import NoSuchLogger")
