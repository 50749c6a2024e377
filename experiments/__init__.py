"""Commands and configs: the only place where names become functions.

A data worker (multiprocessing's spawn) begins by importing what its parent runs, for seconds, before it is told what to
do. Should the parent be killed meanwhile, nobody would end it: so it does itself, from its first import on.
"""

import os
import sys
import threading
import time

_PARENT = "EXPERIMENTS_PARENT"  # in the environment: the process that workers are to end with


def _lead() -> None:
    os.environ[_PARENT] = str(os.getpid())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if "--multiprocessing-fork" in sys.orig_argv and _PARENT in os.environ:
    threading.Thread(target=_end_with, args=(int(os.environ[_PARENT]),), daemon=True).start()
else:
    _lead()
    os.register_at_fork(after_in_child=_lead)
