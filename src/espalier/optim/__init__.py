"""How weights move: parameter groups, schedules as functions of the step, the optimizers torch lacks."""
