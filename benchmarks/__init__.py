"""What it costs, beside what it could cost: ``python -m benchmarks``, or ``make bench``.

A file is a topic, a function marked with ``@measure`` a measure. All of one figure is taken in one
run, side by side in interleaved rounds, and only ratios are judged: how fast this machine is today
is in both numbers of a ratio.
"""
