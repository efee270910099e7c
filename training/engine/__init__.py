"""The training loop of one worker: the same in this process, in local processes and on Ray."""
