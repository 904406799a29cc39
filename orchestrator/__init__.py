"""The sweep: file, plan, store, executors, tracking, Pareto fronts, report and command line."""
