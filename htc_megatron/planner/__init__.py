"""Which layout to train on: every one that this project accepts, with its memory a rank and its step time foretold.

hardware.py   what machines can do, from the vendors' data sheets, and this machine measured
trial.py      stages built and run on the meta device under a fake process group of the true world size
memory.py     bytes a rank holds at most, of what trial.py counted and how DeepSpeed keeps it
speed.py      seconds of a step: operations, messages, 1F1B
search.py     the layouts, best first; why there is none, and which would do
"""
