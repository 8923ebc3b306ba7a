"""How the processes of a run are started on one machine, where nothing else starts them."""

from lit_fast.strategies.launchers.launcher import Launcher, is_interactive
from lit_fast.strategies.launchers.multiprocessing import MultiProcessingLauncher
from lit_fast.strategies.launchers.subprocess_script import SubprocessScriptLauncher

__all__ = ["Launcher", "MultiProcessingLauncher", "SubprocessScriptLauncher", "is_interactive"]
