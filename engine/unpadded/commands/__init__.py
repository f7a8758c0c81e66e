"""The commands of `unpadded`: each file adds the flags of one, and runs it."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # what a command adds itself to
