"""Starting a run's workers: in this process, in local processes, on Ray."""
