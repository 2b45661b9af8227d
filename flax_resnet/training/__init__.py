"""The training: step, optimizer, schedules, loop and `fit`. Nothing here parses flags."""
