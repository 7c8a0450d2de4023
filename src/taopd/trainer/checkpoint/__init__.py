"""What survives a kill: sealed folders, state of processes, weights of sharded models, and the resume."""
