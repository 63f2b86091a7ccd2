"""What things cost, measured: tools/benchmark.py prints what these functions return.

workload.py    a model of a wanted size and batches for it
saving.py      what a checkpoint costs training, written in a thread and not
converting.py  import and export beside cp of the same bytes
"""
