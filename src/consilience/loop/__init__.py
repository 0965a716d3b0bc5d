"""What runs: the step, jobs, agents, trials, sessions. It knows `core` and nothing above it."""
