"""The training: step, loop and `fit`; optimizer and schedules are in `optim`, early stopping in
`selection`. Nothing here parses flags.
"""
