"""Ranks on the cores of one host: no thread of gloo takes a core from the thread it waits for.

gloo's receiving threads poll for as long as data lie in a socket that nobody has asked for yet. Linux lets a thread that has just been
woken take the core from one that runs, so where ranks have few cores each packet stops whoever is about to ask for it. Threads of the
batch policy wait for their turn. On the machine of the README's figures an all-reduce of 2,000 numbers went from 2.4 to 0.4 ms on two
ranks and from 5.6 to 2.2 ms on four, with two cores.
"""

import os


def run_in_turn() -> bool:
    """Give this thread, and all that it will start, the batch policy, which needs no right and costs no share of the processor's time.

    Returns whether it was done: only on Linux, only where nobody has chosen another policy, and not where a container forbids the call.
    """
    try:
        if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        return False
    return True
