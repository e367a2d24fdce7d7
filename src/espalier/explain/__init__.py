"""Why a network answers as it does: functions from (model, input, class) to a map of attributions."""
