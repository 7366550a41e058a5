"""Many clients on one machine: a server, a process for each of them, their data, and what came of it."""
