"""Many clients on one machine: a server, a process for each of them, their data, and what came of it."""

from splitlearn.cli.simulation.config import Simulation
from splitlearn.cli.simulation.simulation import simulate
from splitlearn.cli.simulation.summary import ClientSummary, Summary

__all__ = ["ClientSummary", "Simulation", "Summary", "simulate"]
