"""Sweeps: an experiment becomes run directories (`plan`), and a launcher carries each out as `fbi train RUN_DIR`."""
