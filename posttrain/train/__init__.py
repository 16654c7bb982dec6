"""Trainers: a source of batches, an objective and a schedule, run by one loop."""
