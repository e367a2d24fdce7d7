"""Optimizers that torch lacks, parameter groups, and schedules as functions of the step."""
