"""Training: build -> loop -> step -> checkpoint.

build.py        the only place where objects are wired
engine.py       the objects of a run
loop.py         data -> step -> metrics -> checkpoint
schedules.py    iteration -> everything that changes from step to step
step.py         counts, forward and backward, optimizer, teacher (counts.py, pipeline.py)
checkpoint.py   save, resume, start from other weights
metrics.py      what a run says (profiling.py, exit_signal.py)
"""
