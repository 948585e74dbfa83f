"""The trainer of any model with T5X's model interface.

Here are the loop (`loop.py`, the story of a run), the training step (`step.py`), the programs that a run or
`preflight` compiles (`program.py`, `aot.py`), optimisers, evaluators, and what watches over a run: the
loss-spike guard, preemption, the throughput meter, the profiler and the metric writer. Settings are
arguments: nothing here asks gin or the machine what to do, which is for verbs.
"""
