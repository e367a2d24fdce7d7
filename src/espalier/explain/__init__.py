"""Explanations of single predictions: functions from (model, input, class) to a map of attributions."""
