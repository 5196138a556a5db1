"""``python -m nla.train RECIPE``: what ``nla train RECIPE`` does, for launchers of several processes.

On two GPUs: ``accelerate launch --num_processes 2 -m nla.train RECIPE``.
"""

from __future__ import annotations

import sys

from nla.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
