"""diffgraft beside everything a user could pick instead: `bash examples/benchmarks/run.sh`.

cases     what is measured, as data
methods   how a method gets on a pipeline: our plugins, diffusers' own caches and schedulers, other packages
peers     an environment of its own for each other package
models    the pipelines: bundled checkpoints, and real layouts with random weights
bout      one process: a pipeline and some methods on it, measured in turn
cuda      what a GPU alone can tell, in minutes, and syncs: where the host waits for it
rows      the raw results
report    plots and page
"""
