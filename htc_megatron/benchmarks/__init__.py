"""What things cost, measured: one file a command of tools/benchmark.py, each with `add_arguments(parser)` and `run(args, say)`.

result.py     what a command returns: the table, the ratios, the figures; and what every one says of the machine
workload.py   a model of a wanted size and batches for it
answering.py  questions to models, their parts timed; what generate.py and latency.py share
"""
