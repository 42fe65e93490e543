"""`python -m benchmarks.gpu`: ops and whole models on a CUDA device against every peer that the machine has.

One command of at most nine minutes: each section has a box of time, and writes its rows as it goes. `--dry-run` takes
every step once, at tiny sizes, on a CPU: what a peer lacks there is named as it would be on the GPU.
"""
