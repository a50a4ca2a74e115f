"""Training: build -> loop -> step -> checkpoint.

build.py        the only place where objects are wired
engine.py       the objects of a run
loop.py         data -> step -> metrics -> checkpoint
schedules.py    iteration -> everything that changes from step to step
step.py         counts, forward and backward, optimizer, teacher (counts.py, pipeline.py)
checkpoint.py   save, resume (saved_weights.py: start from other weights)
skips.py        steps whose gradients are not finite
metrics.py      what a run says (profiling.py)
run_lock.py     one run at a time in a folder (exit_signal.py: a run that is told to stop)
"""
