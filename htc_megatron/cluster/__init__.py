"""A run among the machines of a cluster: its job, the check before it, what the machines are, and how it fares."""
