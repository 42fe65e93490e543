"""The command line: one file a command, options and error messages only; what a command does lies in the floors below.

Nothing here imports torch before a command needs it, so that `--help` and a wrong option answer at once.
"""

from fastbert.cli import bench, doctor, embed, finetune, pretrain, serve, verify
from fastbert.cli.application import app

__all__ = ["app", "bench", "doctor", "embed", "finetune", "pretrain", "serve", "verify"]
